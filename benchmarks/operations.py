"""What metrics and keys cost a request that asks for nothing else: one server, switched to and fro (A B B A).

    python benchmarks/operations.py [--rounds N] [--concurrency N] [--eager]

Compared: our metrics on and off; a file of one key without a policy, and one of 1,000 with limits of their own; and
each with itself, which says how far apart two equal things come out here. The server is the demo's, with a switch: it
takes our watching of requests away on one signal and gives it back on another; keys change as they do for operators. A
round's ratio is of both its times of each; the median over rounds is shown, and the lowest and highest. CPU time is of
all of the server's processes, per token. Draining is timed at the end: from SIGTERM, idle, to the exit.
"""

import argparse
import asyncio
import hashlib
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import servers
from idle import FLAGS, REQUESTS, Server
from transformers import AutoConfig

from whipstaff.server import demo

KEY = "a-key-of-the-bench"
NUM_KEYS = 1000
BAR = 0.01  # that a median may differ from 1
OFF, ON = signal.SIGRTMIN + 1, signal.SIGRTMIN + 2  # which the server itself does not use
PLAIN = servers.Variant("plain", "", lambda index: {}, f"Authorization: Bearer {KEY}\r\n")
CHILD = """
import asyncio, signal
from whipstaff.server import app, metrics
from whipstaff.server.commands.main import main

extend = app.extend

async def switched(built, engine, *more):
    made = await extend(built, engine, *more)
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGRTMIN + 1, setattr, engine, "watch", None)
    loop.add_signal_handler(signal.SIGRTMIN + 2, setattr, engine, "watch", metrics.watch)
    return made

app.extend = switched
main()
"""
Cell = dict[str, float]
Switch = Callable[[], None]


def write_keys(path: Path, num: int) -> None:
    """The bench's key and others; of several, each has a policy that limits everything, and is never reached."""
    digest = hashlib.sha256(KEY.encode()).hexdigest()
    limits = {"per_minute": {"requests": 10**9, "tokens": 10**12, "cost": 10**12}, "concurrent": 1000, "n": 8}
    policies = {f"p{number}": limits for number in range(num)} if num > 1 else {}
    policy = {"policy": "p0"} if policies else {}
    keys = [{"id": "bench", "sha256": [digest], **policy}]
    for number in range(1, num):
        other = hashlib.sha256(f"other {number}".encode()).hexdigest()
        keys.append({"id": f"k{number}", "sha256": [other], "policy": f"p{number}"})
    new = path.with_suffix(".new")
    new.write_text(json.dumps({"keys": keys, "policies": policies}))
    new.chmod(0o600)
    os.replace(new, path)


def measure(server: Server, concurrency: int, seed: int) -> Cell:
    num, before = REQUESTS * concurrency, server.cpu_seconds()
    cell = asyncio.run(servers.load(server.port, PLAIN, concurrency, num, seed, server.vocabulary))
    kept = {name: cell[name] for name in ("tokens_per_s", "answer_ms_p50", "answer_ms_p99")}  # gaps may all be 0
    return kept | {"cpu_ms": 1e3 * (server.cpu_seconds() - before) / (num * servers.MAX_TOKENS)}


def compare(server: Server, one: Switch, other: Switch, rounds: int, concurrency: int) -> dict[str, list[float]]:
    """Of each figure, the ratio of the other to the one in each round; and "... (itself)", of the one to itself."""
    found: dict[str, list[float]] = {}
    for round_ in range(rounds):
        cells = []
        for switch in (one, other, other, one):
            switch()
            time.sleep(0.3)  # until the server has it
            cells.append(measure(server, concurrency, 1 + round_))
        for name in cells[0]:
            ratio = (cells[1][name] + cells[2][name]) / (cells[0][name] + cells[3][name])
            found.setdefault(name, []).append(ratio)
            found.setdefault(f"{name} (itself)", []).append(cells[3][name] / cells[0][name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--eager", action="store_true", help="--enforce-eager")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout` leaves no server behind
    with tempfile.TemporaryDirectory(prefix="whipstaff-operations-") as name:
        keys, log, port = Path(name) / "keys.json", Path(name) / "server.log", servers.free_port()
        write_keys(keys, 1)
        model = str(demo.MODELS / "demo")
        words = [sys.executable, "-c", CHILD, "serve", model, "--host", "127.0.0.1", "--port", str(port), *FLAGS]
        words += ["--keys", str(keys), *(["--enforce-eager"] if options.eager else [])]
        with servers.running(words, port, log) as session:
            server = Server("switched", port, session, int(AutoConfig.from_pretrained(model).vocab_size))
            measure(server, options.concurrency, seed=0)

            def told(sent: int) -> Switch:
                return lambda: os.kill(session, sent)

            def keyed(num: int) -> Switch:
                def switch() -> None:
                    write_keys(keys, num)
                    os.kill(session, signal.SIGHUP)

                return switch

            pairs = {
                "metrics on / off": (told(OFF), told(ON)),
                f"{NUM_KEYS} keys / 1 key": (keyed(1), keyed(NUM_KEYS)),
            }
            for what, (one, other) in pairs.items():
                for figure, ratios in compare(server, one, other, options.rounds, options.concurrency).items():
                    middle, spread = statistics.median(ratios), f"{min(ratios):.3f} to {max(ratios):.3f}"
                    bar = "" if "itself" in figure else f", bar {BAR}: {'met' if abs(middle - 1) <= BAR else 'MISSED'}"
                    print(f"{what}: {figure} {middle:.3f} ({spread}){bar}", flush=True)
                print(f"load: {', '.join(f'{each:.1f}' for each in os.getloadavg())}", flush=True)
            os.kill(session, signal.SIGTERM)
            began = time.monotonic()
            while Path(f"/proc/{session}/stat").exists() and " Z " not in Path(f"/proc/{session}/stat").read_text():
                time.sleep(0.01)
            print(f"an idle server ended {time.monotonic() - began:.2f} s after SIGTERM")


if __name__ == "__main__":
    main()
