"""What Whipstaff costs a request that asks it for nothing: one at a time, and several, beside stock vLLM.

    python benchmarks/idle.py [--model demo|random|PATH] [--rounds N] [--concurrency N ...] [--eager] [--one-form]

The servers stay up, one at a time under load. In each round they have their turns to and fro (A B B A), so that what
stock vLLM differs from itself stands beside what Whipstaff differs from it. Ratios are formed within rounds; the median
over rounds is shown, and the lowest and highest. CPU time is of all of a server's processes. Compiled graphs are cached
in a folder of their own, so the seconds of each start are those of a first one. About six minutes on two quiet cores.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import servers
from transformers import AutoConfig

from whipstaff.server import demo

FLAGS = (
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "32", "--no-enable-prefix-caching"),
    *("--kv-cache-memory-bytes", "256M", "--disable-uvicorn-access-log", "--served-model-name", "bench"),
)
REQUESTS = 12  # per client and measurement
BAR = 0.99
PLAIN = servers.Variant("plain", "", lambda index: {})
TICKS, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


class Server(NamedTuple):
    """A server that runs."""

    name: str
    port: int
    session: int
    vocabulary: int

    def cpu_seconds(self) -> float:
        return sum(int(stat[11]) + int(stat[12]) for stat in self._processes()) / TICKS

    def resident_mib(self) -> float:
        """What shared libraries take is counted in each of its processes."""
        return sum(int(stat[21]) for stat in self._processes()) * PAGE / 2**20

    def _processes(self) -> list[list[str]]:
        """The fields of /proc/PID/stat behind the name, of every process of its session."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                stat = path.read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it ended just now
            if int(stat[3]) == self.session:
                found.append(stat)
        return found

    def measure(self, concurrency: int, seed: int) -> dict[str, float]:
        num, before = REQUESTS * concurrency, self.cpu_seconds()
        cell = asyncio.run(servers.load(self.port, PLAIN, concurrency, num, seed, self.vocabulary))
        cpu = 1e3 * (self.cpu_seconds() - before) / (num * servers.MAX_TOKENS)
        return {"tokens_per_s": cell["tokens_per_s"], "cpu_ms": cpu}


def start(name: str, model: str, options: argparse.Namespace, folder: Path, stack: ExitStack) -> tuple[Server, float]:
    """A warm server, and the seconds that it took to start."""
    port, vocabulary = servers.free_port(), int(AutoConfig.from_pretrained(model).vocab_size)
    common = ["--host", "127.0.0.1", "--port", str(port), *FLAGS, *(["--enforce-eager"] if options.eager else [])]
    whipstaff = [str(Path(sys.executable).parent / "whipstaff"), "serve", model, *common]
    words = {
        "stock": [sys.executable, "-m", servers.STOCK, "--model", model, *common],
        "idle": whipstaff,
        "one form": [*whipstaff, "--one-form"],
    }[name]
    began = time.monotonic()
    session = stack.enter_context(servers.running(words, port, folder / f"{name}.log"))
    took = time.monotonic() - began
    server = Server(name, port, session, vocabulary)
    for concurrency in options.concurrency:
        server.measure(concurrency, seed=0)
    return server, took


def compare(servers: list[Server], concurrency: int, rounds: int) -> dict[str, list[float]]:
    """By what is compared, one ratio for each round."""
    found: dict[str, list[float]] = {}

    def note(what: str, one: dict[str, float], other: dict[str, float]) -> None:
        for key in one:
            found.setdefault(f"{what}: {key}", []).append(one[key] / other[key])

    for round_ in range(rounds):
        there = [server.measure(concurrency, 1 + round_) for server in servers]
        back = [server.measure(concurrency, 1 + round_) for server in servers[::-1]][::-1]
        both = [{key: one[key] + other[key] for key in one} for one, other in zip(there, back, strict=True)]
        print(json.dumps({"concurrency": concurrency, "round": round_, "there": there, "back": back}), flush=True)
        note("stock / stock", back[0], there[0])
        for server, cell in zip(servers[1:], both[1:], strict=True):
            note(f"{server.name} / stock", cell, both[0])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, random (the base that serving.py serves) or a folder")
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1])
    parser.add_argument("--eager", action="store_true", help="--enforce-eager on every server")
    parser.add_argument("--one-form", action="store_true", help="a third server, which compiles its model once")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout` leaves no server behind
    lines: list[str] = []
    with tempfile.TemporaryDirectory(prefix="whipstaff-idle-") as name, ExitStack() as stack:
        folder = Path(name)
        os.environ["VLLM_CACHE_ROOT"] = str(folder / "cache")
        paths: dict[str, Any] = {
            "demo": lambda: demo.MODELS / "demo",
            "random": lambda: servers.make_models(folder)["base"],
        }
        model = str(paths.get(options.model, lambda: options.model)())
        servers = []
        for one in ("stock", "idle", *(["one form"] if options.one_form else [])):
            server, took = start(one, model, options, folder, stack)
            servers.append(server)
            lines.append(f"{one}: started in {took:.1f} s, holds {server.resident_mib():.0f} MiB")
        for concurrency in options.concurrency:
            for what, ratios in compare(servers, concurrency, options.rounds).items():
                middle = statistics.median(ratios)
                bar = ""
                if what == "idle / stock: tokens_per_s":
                    bar = f", bar {BAR}: " + ("met" if middle >= BAR else "MISSED")
                spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
                lines.append(f"{concurrency} at once, {what}: {middle:.3f} ({spread}, {len(ratios)} rounds){bar}")
    print("\n".join(lines), file=sys.stderr)


if __name__ == "__main__":
    main()
