"""What fitting CAA from pairs takes through a running server, beside transformers on the same machine.

    python benchmarks/fitting.py [--pairs N] [--rounds N] [--model demo|random]

Three ways to the same vectors: through a server (the source of `whipstaff fit --server`: several requests of several
texts); the plain loop that most repositories ship (one text at a time, `output_hidden_states`); and the source of
`whipstaff fit --model`, which sorts by length and pads. Each reads the last token of both texts of every pair at every
layer and keeps running means. They take turns to and fro (A B C C B A); ratios of tokens per second are formed within
rounds, the median is shown, and the lowest and highest. CPU time is of all processes that a way needs, the client too.
Loading a model and starting a server are not counted. Prefix caching is off, so no round has what another computed.
"""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import servers
import torch
from idle import Server
from torch import Tensor

from whipstaff.server import demo
from whipstaff.server.commands.fit_server import PARALLEL, served
from whipstaff.server.demo.mood import contrast
from whipstaff.server.demo.world import build
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.source import Asked, Source
from whipstaff.steering.method import HookPoint

FLAGS = (
    *("--dtype", "float32", "--max-model-len", "256", "--max-num-seqs", "64", "--no-enable-prefix-caching"),
    *("--kv-cache-memory-bytes", "256M", "--disable-uvicorn-access-log", "--enforce-eager"),
)
BAR = 3.0
Texts = list[tuple[int, ...]]


def texts_of(model: LocalModel, num: int) -> Texts:
    """Two of every pair: scenes of the demo's world, told cheerfully and gloomily."""
    world, draws = build(0), Random(7)
    if model.tokenizer.vocab_size == servers.VOCABULARY:  # words without meaning, as many as those have
        lengths = [draws.randint(20, 60) for _ in range(2 * num)]
        return [tuple(draws.randrange(2, servers.VOCABULARY) for _ in range(length)) for length in lengths]
    told = [contrast(world, draws) for _ in range(num)]
    return [tuple(model.tokenizer.encode(each[mood])) for each in told for mood in ("cheerful", "gloomy")]


def difference(rows: Iterator[list[Tensor]], num_layers: int) -> Tensor:
    """(layers, width) mean of the even texts less that of the odd ones, float64."""
    total = [torch.zeros(()), torch.zeros(())]
    count = 0
    for index, each in enumerate(rows):
        total[index % 2] = total[index % 2] + torch.stack(each).double()
        count += 1
    return (total[0] - total[1]) / (count / 2)


def by_source(source: Source, texts: Texts) -> Tensor:
    points = [HookPoint("resid_post", layer) for layer in range(source.shape.num_layers)]
    found = source.read([Asked(ids, (len(ids) - 1,)) for ids in texts], points)
    return difference(([each[point][0] for point in points] for each in found), len(points))


def by_loop(model: LocalModel, texts: Texts) -> Tensor:
    """Hidden states after the last block are those behind the final norm, so the last layer is left as it is there."""

    def rows() -> Iterator[list[Tensor]]:
        for ids in texts:
            with torch.inference_mode():
                found = model.model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
            yield [each[0, -1] for each in found[1:]]

    return difference(rows(), model.shape.num_layers)


def timed(run: Callable[[], Tensor], server: Server | None, tokens: int) -> tuple[dict[str, float], Tensor]:
    before = time.process_time() + (server.cpu_seconds() if server else 0.0)
    began = time.perf_counter()
    found = run()
    took = time.perf_counter() - began
    cpu = time.process_time() + (server.cpu_seconds() if server else 0.0) - before
    return {"tokens_per_s": tokens / took, "cpu_ms": 1e3 * cpu / tokens}, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="demo", help="demo, or random: 8 layers of 512")
    parser.add_argument("--batch-size", type=int, default=32, help="texts of one request, and of one padded batch")
    parser.add_argument("--parallel", type=int, default=PARALLEL)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that `timeout` leaves no server behind
    with tempfile.TemporaryDirectory(prefix="whipstaff-fitting-") as name:
        folder, port = Path(name), servers.free_port()
        path = str(demo.MODELS / "demo") if options.model == "demo" else servers.make_models(folder)["base"]
        words = [sys.executable, "-c", "from whipstaff.server.commands.main import main; main()", "serve", path]
        words += ["--host", "127.0.0.1", "--port", str(port), *FLAGS]
        model = LocalModel.load(path, batch_size=options.batch_size)
        texts = texts_of(model, options.pairs)
        tokens = sum(map(len, texts))
        with servers.running(words, port, folder / "server.log") as session:
            server = Server("server", port, session, 0)
            remote = served(f"http://127.0.0.1:{port}", None, path, options.batch_size, options.parallel)
            ways: dict[str, Callable[[], Tensor]] = {
                "server": lambda: by_source(remote, texts),
                "loop": lambda: by_loop(model, texts),
                "padded": lambda: by_source(model, texts),
            }
            for source in (remote, model):
                by_source(source, texts[:64])  # warm
            ratios: dict[str, list[float]] = {}
            for number in range(options.rounds):
                cells: dict[str, list[dict[str, float]]] = {}
                vectors: dict[str, Tensor] = {}
                for way in (*ways, *reversed(ways)):
                    cell, vectors[way] = timed(ways[way], server if way == "server" else None, tokens)
                    cells.setdefault(way, []).append(cell)
                apart = [
                    float((vectors["server"] - vectors[way])[:-1].abs().max() / vectors[way][:-1].abs().max())
                    for way in ("loop", "padded")
                ]
                print(json.dumps({"round": number, "tokens": tokens, "load": os.getloadavg()[0], **cells}), flush=True)
                print(json.dumps({"largest_difference": apart}), flush=True)
                for way in ("loop", "padded"):
                    for key in ("tokens_per_s", "cpu_ms"):
                        one, other = (sum(each[key] for each in cells[each_way]) for each_way in ("server", way))
                        ratios.setdefault(f"server / {way}: {key}", []).append(one / other)
    for what, found in ratios.items():
        middle = statistics.median(found)
        bar = ""
        if what == "server / loop: tokens_per_s":
            bar = f", bar {BAR}: " + ("met" if middle >= BAR else "MISSED")
        print(f"{what}: {middle:.2f} ({min(found):.2f} to {max(found):.2f}, {len(found)} rounds){bar}", file=sys.stderr)


if __name__ == "__main__":
    main()
