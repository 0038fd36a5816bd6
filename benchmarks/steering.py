"""What each kind of steering costs: throughput of steered requests over plain ones, on one engine, in one run.

    python benchmarks/steering.py [--model PATH] [--concurrency N] [--requests N] [--rounds N] [--kinds REGEX]
                                  [--compiled]

Kinds take turns in every round, each between two plain measurements of its own; the median of the rounds' ratios is
shown, and the lowest and highest: of throughput, and of the CPU time that a generated token takes in all processes.
Requests have 32 tokens of prompt and generate 48; what they read is taken as each ends. Prefix caching is off.
"""

import argparse
import asyncio
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from load import MAX_TOKENS, PROMPT_LEN, cpu_seconds, throughput
from vllm.engine.arg_utils import AsyncEngineArgs

from whipstaff.server import demo
from whipstaff.server.engine.frontend.launch import Engine, Setup, start
from whipstaff.server.plan import RequestPlan
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import Capture, PlannedCapture, SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector, packed, parse
from whipstaff.steering.where import Where

NUM_CONFIGS = 256
NUM_READ = 4  # layers
READING = f"reading the stream of {NUM_READ} layers"
RATIOS = {  # of kinds, or of one to plain requests, and what each is to be at least
    "diagonal, 256 configurations / 1": ("diagonal, 256 configurations", "diagonal, 1 configuration", 0.95),
    "low-rank": ("low-rank (r = 4), 1 configuration", None, 0.85),
    "3 vectors / 1": ("3 vectors", "1 vectors", 0.98),
    READING: (READING, None, 0.95),
}


@dataclass(frozen=True)
class Kind:
    """A way to steer or to read: the plan of the i-th request."""

    name: str
    plan: Callable[..., SteeringPlan]  # of i

    def request(self, index: int) -> RequestPlan:
        plan = self.plan(index)
        if not plan.captures:
            return RequestPlan(plan)
        return RequestPlan(plan, captures_id=uuid4().hex, max_fed=PROMPT_LEN + MAX_TOKENS - 1)


class Turn(NamedTuple):
    """One measurement."""

    tokens_per_s: float
    cpu: float  # seconds per generated token, of all processes

    def over(self, before: "Turn", after: "Turn") -> "Turn":
        """Its ratios to the two beside it."""
        return Turn(*(mine / statistics.mean(both) for mine, *both in zip(self, before, after, strict=True)))


def make_vectors(shape: ModelShape) -> dict[str, Vector]:
    """Random vectors, small enough to leave the model a model."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int, scale: float = 0.02) -> torch.Tensor:
        return scale * torch.randn(*size, generator=generator)

    hidden, heads = shape.hidden_size, (shape.num_heads, shape.head_dim)
    basis = torch.linalg.qr(numbers(hidden, 4)).Q.T.contiguous()
    files: dict[str, tuple[str, dict[str, torch.Tensor], dict[str, Any]]] = {
        "stream": ("vector", {f"resid_post.{i}.add": numbers(hidden) for i in range(shape.num_layers)}, {}),
        "both": (
            "vector",
            {f"resid_post.{i}.add": numbers(hidden) for i in range(shape.num_layers)}
            | {f"attn_head.{i}.add": numbers(*heads) for i in range(shape.num_layers)},
            {},
        ),
        "low-rank": (
            "loreft",
            {
                f"resid_post.{i}.{part}": tensor
                for i in range(shape.num_layers)
                for part, tensor in (("weight", numbers(4, hidden)), ("bias", numbers(4)), ("rotate", basis))
            },
            {},
        ),
        "sae": (
            "sae",
            {
                f"resid_post.{shape.num_layers // 2}.{part}": tensor
                for part, tensor in (("encoder", numbers(64, hidden)), ("decoder", numbers(64, hidden)))
            },
            {},
        ),
        "probe": ("probe", {"resid_post.0.direction": numbers(hidden)}, {}),
    }
    return {
        name: parse(packed(Header(method=method, model=shape, defaults=defaults), tensors))
        for name, (method, tensors, defaults) in files.items()
    }


def kinds(vectors: dict[str, Vector], num_layers: int) -> Iterator[Kind]:
    """What is measured."""

    def plan(*entries: tuple[str, dict[str, Any], dict[str, Any]]) -> SteeringPlan:
        planner = Planner()
        for name, own, more in entries:
            probe = vectors["probe"] if "when" in more else None
            params = SteeringParams.model_validate({"vector": name, "where": "all", **more})
            planner.add(params, own, vectors[name], probe)
        return planner.plan

    def scaled(name: str, config: int, **more: Any) -> SteeringPlan:
        return plan((name, {"scale": 1 + 0.001 * config}, more))

    features = [{"feature": feature, "add": 0.05} for feature in range(8)]
    late = list(range(1, num_layers))
    yield Kind("diagonal, 1 configuration", lambda i: scaled("both", 0))
    yield Kind("diagonal, 32 configurations", lambda i: scaled("both", i % 32))
    yield Kind("diagonal, 256 configurations", lambda i: scaled("both", i % NUM_CONFIGS))
    yield Kind("low-rank (r = 4), 1 configuration", lambda i: scaled("low-rank", 0))
    yield Kind("low-rank (r = 4), 256 configurations", lambda i: scaled("low-rank", i % NUM_CONFIGS))
    yield Kind("SAE, 8 features", lambda i: plan(("sae", {"features": features}, {})))
    for num in (1, 3, 8):
        yield Kind(f"{num} vectors", lambda i, num=num: plan(*(("stream", {"scale": 0.3 + j}, {}) for j in range(num))))
    for name, above in (("open", -1e9), ("shut", 1e9)):
        when = {"probe": "probe", "above": above, "decide": "step"}
        yield Kind(f"conditional, {name}", lambda i, when=when: scaled("stream", 0, when=when, layers=late))
    fade = {"shape": "linear", "from": 1.0, "to": 0.0, "tokens": 40}
    yield Kind("scheduled", lambda i: scaled("stream", 0, schedule=fade))
    points = tuple(HookPoint("resid_post", layer) for layer in range(num_layers - NUM_READ, num_layers))
    read = SteeringPlan((), captures=(PlannedCapture(Capture(points, True), Where.of("all")),))
    yield Kind(READING, lambda i: read)


@contextmanager
def running(options: argparse.Namespace, vectors: dict[str, Vector]) -> Iterator[Engine]:
    args = AsyncEngineArgs(
        model=options.model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=options.concurrency,
        enable_prefix_caching=False,
        enforce_eager=not options.compiled,
        kv_cache_memory_bytes=1 << 29,
        skip_tokenizer_init=True,
    )
    engine = start(args, Setup(num_slots=4 * NUM_CONFIGS, vectors=vectors.values(), capture_layers="all"))
    try:
        yield engine
    finally:
        engine.shutdown()


async def turn(engine: Engine, kind: Kind | None, options: argparse.Namespace) -> Turn:
    """Requests of one kind, or plain ones."""
    plan, before = None if kind is None else kind.request, cpu_seconds()
    tokens_per_s = await throughput(engine, plan, options.requests, options.concurrency)
    return Turn(tokens_per_s, (cpu_seconds() - before) / (options.requests * MAX_TOKENS))


async def measure(options: argparse.Namespace) -> dict[str, list[Turn]]:
    """By kind, the ratios to plain requests of every round."""
    config = json.loads((Path(options.model) / "config.json").read_text())
    shape = ModelShape(
        architecture=config["architectures"][0],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    vectors = make_vectors(shape)
    ratios: dict[str, list[Turn]] = {}
    with running(options, vectors) as engine:
        for vector in vectors.values():
            data = packed(vector.header, _tensors(vector))
            assert (await engine.collective_rpc("whipstaff_add_vector", args=(data,)))[0] == vector.digest
        chosen = [kind for kind in kinds(vectors, shape.num_layers) if re.search(options.kinds, kind.name)]
        for kind in (None, *chosen):
            await turn(engine, kind, options)  # warm
        for _ in range(options.rounds):
            for kind in chosen:
                before, steered, after = [await turn(engine, one, options) for one in (None, kind, None)]
                ratios.setdefault(kind.name, []).append(steered.over(before, after))
    return ratios


def _tensors(vector: Vector) -> dict[str, torch.Tensor]:
    return {
        f"{place.site}.{place.layer}.{part}": tensor
        for place, parts in vector.tensors.items()
        for part, tensor in parts.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(demo.MODELS / "demo"), help="default: the demo model")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default="", metavar="REGEX", help="only kinds whose name matches")
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    options = parser.parse_args()
    ratios = asyncio.run(measure(options))
    medians = {name: Turn(*map(statistics.median, zip(*each, strict=True))) for name, each in ratios.items()}
    for name, each in ratios.items():
        print(json.dumps({"kind": name, "of_plain": medians[name]._asdict(), "rounds": each}), flush=True)
    print(f"\n{'kind':40} of plain (lowest to highest of {options.rounds} rounds): throughput, CPU", file=sys.stderr)
    for name, each in ratios.items():
        told = [f"{statistics.median(one):.3f} ({min(one):.3f} to {max(one):.3f})" for one in zip(*each, strict=True)]
        print(f"{name:40} {', '.join(told)}", file=sys.stderr)
    for name, (kind, other, bar) in RATIOS.items():
        if {kind, other} - {None} <= medians.keys():
            found = medians[kind].tokens_per_s / (medians[other].tokens_per_s if other else 1)
            print(f"{name:40} {found:9.3f}  bar {bar} {'met' if found >= bar else 'MISSED'}", file=sys.stderr)


if __name__ == "__main__":
    main()
