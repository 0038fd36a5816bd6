"""What each kind of steering costs: throughput of steered requests over plain ones, on one engine, in one run.

    python benchmarks/steering.py [--model PATH] [--concurrency N] [--requests N] [--rounds N] [--compiled]

Kinds take turns in every round, each beside a plain measurement of its own; the median of the rounds' ratios is shown,
and the lowest and highest. Requests have 32 tokens of prompt and generate 48. Prefix caching is off.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from load import throughput
from vllm.engine.arg_utils import AsyncEngineArgs

from whipstaff.server import demo
from whipstaff.server.engine.frontend.launch import Engine, Setup, start
from whipstaff.server.plan import RequestPlan
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector, packed, parse

NUM_CONFIGS = 256
BARS = {"diagonal, 256 configurations / 1": 0.95, "low-rank": 0.85, "3 vectors / 1": 0.98}


@dataclass(frozen=True)
class Kind:
    """A way to steer: the plan of the i-th request."""

    name: str
    plan: Callable[..., SteeringPlan]  # of i


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
    engine = start(args, Setup(num_slots=4 * NUM_CONFIGS, vectors=vectors.values()))
    try:
        yield engine
    finally:
        engine.shutdown()


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """By kind, the ratios to plain throughput of every round."""
    config = json.loads((Path(options.model) / "config.json").read_text())
    shape = ModelShape(
        architecture=config["architectures"][0],
        hidden_size=config["hidden_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
    )
    vectors = make_vectors(shape)
    ratios: dict[str, list[float]] = {}
    with running(options, vectors) as engine:
        for vector in vectors.values():
            data = packed(vector.header, _tensors(vector))
            assert (await engine.collective_rpc("whipstaff_add_vector", args=(data,)))[0] == vector.digest
        await throughput(engine, None, options.requests, options.concurrency)  # warm
        for _ in range(options.rounds):
            for kind in kinds(vectors, shape.num_layers):
                plain = await throughput(engine, None, options.requests, options.concurrency)
                plan = lambda index, kind=kind: RequestPlan(kind.plan(index))  # noqa: E731
                steered = await throughput(engine, plan, options.requests, options.concurrency)
                again = await throughput(engine, None, options.requests, options.concurrency)
                ratios.setdefault(kind.name, []).append(steered / statistics.mean((plain, again)))
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
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    options = parser.parse_args()
    ratios = asyncio.run(measure(options))
    medians = {name: statistics.median(each) for name, each in ratios.items()}
    for name, each in ratios.items():
        print(json.dumps({"kind": name, "of_plain": medians[name], "rounds": each}), flush=True)
    print(f"\n{'kind':40} {'of plain':>9}  (lowest to highest of {options.rounds} rounds)", file=sys.stderr)
    for name, each in ratios.items():
        print(f"{name:40} {medians[name]:9.3f}  ({min(each):.3f} to {max(each):.3f})", file=sys.stderr)
    found = {
        "diagonal, 256 configurations / 1": medians["diagonal, 256 configurations"]
        / medians["diagonal, 1 configuration"],
        "low-rank": medians["low-rank (r = 4), 1 configuration"],
        "3 vectors / 1": medians["3 vectors"] / medians["1 vectors"],
    }
    for name, bar in BARS.items():
        print(f"{name:40} {found[name]:9.3f}  bar {bar} {'met' if found[name] >= bar else 'MISSED'}", file=sys.stderr)


if __name__ == "__main__":
    main()
