"""What requests cost on one GPU: stock vLLM, idle Whipstaff, steered, guided and proxy-tuned, in turns.

Every engine is a process of its own (`one_engine.py`), all of them stay up, and one at a time is under load. The base
has the shape of a Llama of 1.2 billion parameters, bfloat16, the pair of proxy-tuning that of 0.15 billion; their
weights are vLLM's dummy ones. A round asks every variant once at every concurrency, to and fro; stock comes twice, and
the ratio of the two says how much noise there is. Ratios are of seconds for the same number of tokens, formed within a
round. Prints a JSON line for every round as it goes, and one for each variant and ratio when they are over.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from one_engine import MAX_TOKENS, PROMPT_LEN, SHAPES, Variant, save_config

HERE = Path(__file__).parent
REQUESTS = {1: 2, 32: 64, 256: 256}  # by concurrency
ENGINES = ("stock", "whipstaff", "whipstaff_aux", "expert")
# name: (engine, what its requests ask for, sequences per request)
VARIANTS: dict[str, tuple[str, Variant, int]] = {
    "stock": ("stock", "plain", 1),
    "idle": ("whipstaff", "plain", 1),
    "steered, 1 configuration": ("whipstaff", "steered_1", 1),
    "steered, 256 configurations": ("whipstaff", "steered_256", 1),
    "3 vectors": ("whipstaff", "vectors_3", 1),
    "cfg": ("whipstaff", "cfg", 1),
    "two plain requests": ("whipstaff", "plain", 2),
    "idle, auxiliary models loaded": ("whipstaff_aux", "plain", 1),
    "proxy-tuning": ("whipstaff_aux", "proxy", 1),
    "expert alone": ("expert", "plain", 1),
    "stock again": ("stock", "plain", 1),
}
Seconds = dict[str, float]  # of one round, by variant
# name: what it is in a round; below 1 is faster than what it is held against
RATIOS: dict[str, Callable[[Seconds], float]] = {
    "stock again / stock": lambda s: s["stock again"] / s["stock"],
    "idle / stock": lambda s: s["idle"] / stock(s),
    "steered, 1 configuration / idle": lambda s: s["steered, 1 configuration"] / s["idle"],
    "steered, 256 configurations / idle": lambda s: s["steered, 256 configurations"] / s["idle"],
    "steered, 1 configuration / stock": lambda s: s["steered, 1 configuration"] / stock(s),
    "steered, 256 configurations / stock": lambda s: s["steered, 256 configurations"] / stock(s),
    "3 vectors / stock": lambda s: s["3 vectors"] / stock(s),
    "cfg / two plain requests": lambda s: s["cfg"] / s["two plain requests"],
    "idle, auxiliary models loaded / stock": lambda s: s["idle, auxiliary models loaded"] / stock(s),
    "proxy-tuning / its three models alone": lambda s: s["proxy-tuning"] / (stock(s) + 2 * s["expert alone"]),
}


def stock(seconds: Seconds) -> float:
    return (seconds["stock"] + seconds["stock again"]) / 2


class Child:
    """An engine in a process of its own, which answers one command at a time."""

    def __init__(self, name: str, words: list[str], log: Path) -> None:
        self.name = name
        self._log = log.open("w")
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "one_engine.py"), *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.facts: dict[str, Any] = {}

    def wait(self) -> None:
        """Until it is ready to serve."""
        self.facts = self._read()

    def ask(self, **command: Any) -> float:
        """Seconds that a load took."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return float(self._read()["seconds"])

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith('{"'):
                found: dict[str, Any] = json.loads(line)
                return found
        raise RuntimeError(f"the engine {self.name} ended:\n{Path(self._log.name).read_text()[-3000:]}")


def launch(options: argparse.Namespace, folder: Path) -> dict[str, Child]:
    """Engines that are up; those that could not start are named on standard output and left out."""
    size = "small" if options.device == "cpu" else "large"
    models = {name: save_config(folder / name, SHAPES[size][name]) for name in ("base", "expert")}
    children = {}
    for name in ENGINES:
        words = ["--model", models["expert" if name == "expert" else "base"], "--device", options.device]
        words += ["--expert", models["expert"]] if name == "whipstaff_aux" else []
        words += ["--stock"] if name in ("stock", "expert") else []
        children[name] = Child(name, words, options.logs / f"engine-{name}.log")
    for name, child in list(children.items()):
        begin = time.monotonic()
        try:
            child.wait()
        except RuntimeError as error:
            print(json.dumps({"engine": name, "error": str(error)}), flush=True)
            del children[name]
            continue
        print(json.dumps({"engine": name, "waited": round(time.monotonic() - begin, 1)} | child.facts), flush=True)
    return children


def one_round(children: dict[str, Child], concurrency: int, num: int, backward: bool) -> Seconds:
    found: Seconds = {}
    order = list(VARIANTS.items())
    for name, (engine, variant, sequences) in order[::-1] if backward else order:
        if engine in children:
            found[name] = children[engine].ask(
                variant=variant, concurrency=sequences * concurrency, requests=sequences * num
            )
    return found


def say(rounds: dict[int, list[Seconds]]) -> None:
    """Medians and, in brackets, the lowest and highest round."""
    for concurrency, each in rounds.items():
        for name in each[0]:
            times = [seconds[name] for seconds in each]
            sequences = VARIANTS[name][2]
            tokens = sequences * REQUESTS[concurrency] * MAX_TOKENS
            rates = {"median": median(times), "most": min(times), "least": max(times)}
            line = {"variant": name, "concurrency": concurrency, "rounds": len(times)}
            print(json.dumps(line | {f"tokens_per_s_{key}": round(tokens / s) for key, s in rates.items()}), flush=True)
        for name, ratio in RATIOS.items():
            try:
                found = [ratio(seconds) for seconds in each]
            except KeyError:  # an engine did not start
                continue
            line = {"ratio": name, "concurrency": concurrency, "rounds": len(found), "median": round(median(found), 3)}
            print(json.dumps(line | {"low": round(min(found), 3), "high": round(max(found), 3)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=45, help="when the last round begins at the latest")
    parser.add_argument("--rounds", type=int, default=15, help="at most")
    parser.add_argument("--logs", type=Path, default=Path(tempfile.gettempdir()))
    options = parser.parse_args()
    sizes = {1: 1, 4: 4} if options.device == "cpu" else REQUESTS
    if options.device == "cpu":
        REQUESTS.clear()
        REQUESTS.update(sizes)
    with tempfile.TemporaryDirectory() as folder:
        children = launch(options, Path(folder))
        try:
            rounds: dict[int, list[Seconds]] = defaultdict(list)
            for concurrency, num in sizes.items():  # warms up: every variant once
                one_round(children, concurrency, num, backward=False)
            begin = time.monotonic()
            while len(rounds[1]) < options.rounds and time.monotonic() - begin < options.seconds:
                for concurrency, num in sizes.items():
                    found = one_round(children, concurrency, num, backward=len(rounds[concurrency]) % 2 == 1)
                    rounds[concurrency].append(found)
                    print(
                        json.dumps({"round": len(rounds[concurrency]), "concurrency": concurrency} | found), flush=True
                    )
            print(json.dumps({"prompt_tokens": PROMPT_LEN, "generated_tokens": MAX_TOKENS}), flush=True)
            say(rounds)
        finally:
            closing = [threading.Thread(target=child.close) for child in children.values()]
            for thread in closing:
                thread.start()
            for thread in closing:
                thread.join()
    sys.exit(0 if len(children) == len(ENGINES) else 1)


if __name__ == "__main__":
    main()
