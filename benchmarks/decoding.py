"""What each decoding method costs: a step in which every row uses it, beside a plain step and the forward passes and
head products that the method is made of, in one run.

    python benchmarks/decoding.py [--concurrency N] [--requests N] [--rounds N] [--compiled] [--only NAME ...]

Methods take turns, each between two plain measurements of its own that draw in the same way (greedy, or at temperature
1); the median of the rounds' ratios is shown. Auxiliary models run alone on engines of their own, in turn with the
rest; DoLa's head products are timed in this process, while no engine has anything to do. The models are random Llamas
that the script makes. Requests have 32 tokens of prompt and generate 48. Prefix caching is off.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from load import HIDDEN, LAYERS, VOCABULARY, make_model, throughput
from torch import Tensor
from vllm.engine.arg_utils import AsyncEngineArgs

from whipstaff.decoding.method import StreamMixer
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.plan import DecodingPlan, Rewrite, SamplerSettings
from whipstaff.server.engine.frontend.launch import Engine, Setup, start
from whipstaff.server.plan import RequestPlan
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector, packed, parse

SMALL = {"expert": 1, "anti": 2}  # auxiliary model -> seed
SMALL_HIDDEN, SMALL_LAYERS = 256, 8
CANDIDATES = tuple(range(0, LAYERS, LAYERS // 8))
PAIR = {"expert": "expert", "antiexpert": "anti"}
MIXES: dict[str, dict[str, Any]] = {
    "proxy_tuning": PAIR,
    "dexperts": PAIR,
    "contrastive": {"amateur": "anti"},
    "contrastive_beta": {"amateur": "anti"},
    "adapter_free_ensemble": {"weights": {"expert": 1.0, "anti": 1.0}},
    "co_llm": {"assistant": "expert", "head": "head"},
    "kwd": {"classifier": "head"},
    "dola": {"layers": list(CANDIDATES)},
}
RULES: dict[str, dict[str, Any]] = {"rule_adapter": {}, "dry": {}}
SAMPLERS: dict[str, dict[str, Any]] = {
    "adaptive_temperature": {"head": "head"},
    **{name: {} for name in ("edt", "dynatemp", "top_n_sigma", "typical_p", "top_a", "epsilon_cutoff", "eta_cutoff")},
    **{name: {} for name in ("xtc", "mirostat")},
}
RULE_BAR, DOLA_BAR, MIX_BAR = 0.97, 1.15, 1.05  # of plain throughput, at least; of what they are made of, at most


class Vocabulary:
    """A tokenizer of single letters."""

    eos = (2,)

    def id_of(self, text: str) -> int | None:
        return ord(text) if len(text) == 1 else None

    def ids_with(self, text: str) -> Sequence[int]:
        return [ord(text[0])]

    def encode(self, text: str) -> Sequence[int]:
        return [*map(ord, text)]


@dataclass
class Times:
    """Seconds per step of one method, round by round."""

    plain: list[float] = field(default_factory=list)
    parts: list[float] = field(default_factory=list)  # plain, and the method's other forward passes or head products
    method: list[float] = field(default_factory=list)

    def of_plain(self) -> list[float]:
        """Throughput beside plain's."""
        return [plain / mine for plain, mine in zip(self.plain, self.method, strict=True)]

    def of_parts(self) -> list[float]:
        return [mine / parts for parts, mine in zip(self.parts, self.method, strict=True)]


def make_heads(shape: ModelShape) -> dict[str, Vector]:
    """Of every kind, by kind."""
    random = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return 0.05 * torch.randn(*size, generator=random)

    inner = {"w0": numbers(64, HIDDEN), "b0": numbers(64), "w1": numbers(64, 64), "b1": numbers(64)}
    files = {
        "defer_head": {"weight": numbers(HIDDEN)},
        "token_classifier": {"weight": numbers(VOCABULARY, HIDDEN)},
        "temperature_head": {
            **inner,
            "temperatures": torch.linspace(0.5, 1.5, 4),
            "w2": numbers(4, 64),
            "b2": numbers(4),
        },
    }
    return {kind: parse(packed(Header(method=kind, model=shape), parts)) for kind, parts in files.items()}


def plan_of(name: str, own: Mapping[str, Any], heads: Mapping[str, Vector]) -> RequestPlan:
    """What a request with one method carries into the engine."""
    method: Any = METHODS[name]
    params = method.params(**own)
    if isinstance(method, StreamMixer):
        return RequestPlan(None, DecodingPlan(method.mix(params)))
    early = CANDIDATES if name == "dola" else ()
    digests = tuple(heads[kind].digest for kind in method.head_fields.values())
    setting = method.resolve(params, Vocabulary()).model_dump_json()
    rewrite = Rewrite(name, setting, tuple(method.streams(params).values()), digests, early)
    decoding = DecodingPlan(rewrites=(rewrite,), draw=SamplerSettings() if name in SAMPLERS else None)
    return RequestPlan(SteeringPlan((), keeps=early) if early else None, decoding)


def head_seconds(num_rows: int, num: int = 20) -> float:
    """The fastest of `num` products of a head with rows: others use this machine too."""
    rows, head = torch.randn(num_rows, HIDDEN), torch.randn(VOCABULARY, HIDDEN)
    times = []
    for _ in range(num):
        started = time.perf_counter()
        torch.nn.functional.linear(rows, head)
        times.append(time.perf_counter() - started)
    return min(times)


@contextmanager
def running(options: argparse.Namespace, model: str, aux: Mapping[str, str]) -> Iterator[Engine]:
    args = AsyncEngineArgs(
        model=model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=options.concurrency,
        enable_prefix_caching=False,
        enforce_eager=not options.compiled,
        kv_cache_memory_bytes=1 << 29,
        skip_tokenizer_init=True,
    )
    engine = start(args, Setup(aux.items(), early_layers="all"))
    try:
        yield engine
    finally:
        engine.shutdown()


async def measure(options: argparse.Namespace, folder: str) -> dict[str, Times]:
    base = make_model(f"{folder}/base")
    small = {name: make_model(f"{folder}/{name}", seed, SMALL_HIDDEN, SMALL_LAYERS) for name, seed in SMALL.items()}
    methods = {name: own for name, own in (MIXES | RULES | SAMPLERS).items() if name in (options.only or METHODS)}
    times = {name: Times() for name in methods}
    with ExitStack() as stack:
        engine = stack.enter_context(running(options, base, small))
        alone = stack.enter_context(running(options, small["anti"], {})) if methods.keys() & MIXES.keys() else None
        heads = make_heads(engine.layout.shape)
        for head in heads.values():
            data = packed(head.header, head.shared_parts)
            assert (await engine.collective_rpc("whipstaff_add_vector", args=(data,)))[0] == head.digest
        plans = {name: plan_of(name, own, heads) for name, own in methods.items()}

        async def step(engine: Engine, name: str | None, temperature: float) -> float:
            plan = (lambda index: plans[name]) if name else None
            speed = await throughput(engine, plan, options.requests, options.concurrency, temperature)
            return options.concurrency / speed

        async def others(name: str) -> float:
            """What the method's other forward passes cost alone; both small models have one shape."""
            decoding = plans[name].decoding
            num = len(decoding.models) if decoding else 0
            heads = head_seconds(len(CANDIDATES) * options.concurrency) if name == "dola" else 0.0
            return heads + (num * await step(alone, None, 0.0) if num and alone else 0.0)

        for name in methods:  # warm
            await step(engine, name, 1.0)
        for _ in range(options.rounds):
            for name, mine in times.items():
                temperature = 1.0 if name in SAMPLERS else 0.0
                before = await step(engine, None, temperature)
                mine.method.append(await step(engine, name, temperature))
                mine.plain.append(statistics.mean((before, await step(engine, None, temperature))))
                mine.parts.append(mine.plain[-1] + await others(name))
                last = {"plain_s": mine.plain[-1], "parts_s": mine.parts[-1], "method_s": mine.method[-1]}
                print(json.dumps({"method": name, **last}), flush=True)
    return times


def judged(name: str, times: Times) -> str:
    """A row of the table: medians, and the bar that the method has."""
    plain, parts = statistics.median(times.of_plain()), statistics.median(times.of_parts())
    bars = {"dola": (parts, DOLA_BAR), "proxy_tuning": (parts, MIX_BAR)}
    is_rule = name in RULES or name in SAMPLERS
    value, bar = (plain, RULE_BAR) if is_rule else bars.get(name, (0.0, None))
    is_met = bar is None or (value >= bar if is_rule else value <= bar)
    verdict = "" if bar is None else f"bar {bar} {'met' if is_met else 'MISSED'}"
    spread = f"({min(times.of_plain()):.3f} to {max(times.of_plain()):.3f})"
    return f"{name:24} {plain:9.3f} {spread:18} {parts:9.3f}  {verdict}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--only", nargs="+", choices=[*MIXES, *RULES, *SAMPLERS], help="methods; default: all")
    options = parser.parse_args()
    print(json.dumps({"setup": vars(options), "threads": torch.get_num_threads(), "torch": torch.__version__}))
    with tempfile.TemporaryDirectory() as folder:
        times = asyncio.run(measure(options, folder))
    print(f"\n{'method':24} {'of plain throughput':>28} {'of parts':>9}", file=sys.stderr)
    for name, mine in times.items():
        print(judged(name, mine), file=sys.stderr)


if __name__ == "__main__":
    main()
