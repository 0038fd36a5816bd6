"""What DoLa costs: a step in which every row contrasts 8 early layers, beside a plain step and the head products that
the method is made of, on one engine, in one run.

    python benchmarks/decoding.py [--model PATH] [--concurrency N] [--requests N] [--rounds N] [--compiled]

Plain decoding and DoLa take turns; the median of the rounds' ratios is shown. The head products are timed alone, in
this process, while the engine has nothing to do: the model's head on 8 rows for each row of a step. The default model
is a random Llama that the script makes. Requests have 32 tokens of prompt and generate 48. Prefix caching is off.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from load import throughput
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from vllm.engine.arg_utils import AsyncEngineArgs

from whipstaff.decoding.methods.dola import DolaParams
from whipstaff.decoding.plan import DecodingPlan, Rewrite
from whipstaff.server.engine.launch import Engine, start
from whipstaff.server.engine.request import RequestPlan
from whipstaff.steering.plan import SteeringPlan

NUM_CANDIDATES = 8
BAR = 1.15  # at most, of a plain step and its head products


@dataclass(frozen=True)
class Round:
    """Seconds per step."""

    plain: float
    heads: float
    dola: float

    @property
    def ratio(self) -> float:
        return self.dola / (self.plain + self.heads)


def make_model(folder: str) -> str:
    """A random Llama whose vocabulary is as large beside its blocks as in models that people serve."""
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=16384, max_position_embeddings=512, **shape)).save_pretrained(folder)
    return folder


def dola(num_layers: int) -> RequestPlan:
    """Every so many layers, 8 in all."""
    layers = tuple(range(0, num_layers, max(1, num_layers // NUM_CANDIDATES)))[:NUM_CANDIDATES]
    rewrite = Rewrite("dola", DolaParams(layers=list(layers)).model_dump_json(), early=layers)
    return RequestPlan(SteeringPlan((), keeps=layers), DecodingPlan(rewrites=(rewrite,)))


def head_seconds(head: Tensor, num_rows: int, num: int = 20) -> float:
    """The fastest of `num` products of the model's head (V, H) with rows: others use this machine too."""
    rows = torch.randn(num_rows, head.shape[1], dtype=head.dtype)
    times = []
    for _ in range(num):
        started = time.perf_counter()
        torch.nn.functional.linear(rows, head)
        times.append(time.perf_counter() - started)
    return min(times)


@contextmanager
def running(options: argparse.Namespace) -> Iterator[Engine]:
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
    engine = start(args, early_layers="all")
    try:
        yield engine
    finally:
        engine.shutdown()


async def measure(options: argparse.Namespace) -> list[Round]:
    head = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).lm_head.weight.detach()
    rounds = []
    with running(options) as engine:
        plan = dola(engine.layout.shape.num_layers)

        async def step(plan: Callable[[int], RequestPlan] | None) -> float:
            return options.concurrency / await throughput(engine, plan, options.requests, options.concurrency)

        await step(lambda index: plan)  # warm
        for _ in range(options.rounds):
            before, with_dola, after = await step(None), await step(lambda index: plan), await step(None)
            heads = head_seconds(head, NUM_CANDIDATES * options.concurrency)
            rounds.append(Round(statistics.mean((before, after)), heads, with_dola))
            print(json.dumps({"plain": rounds[-1].plain, "heads": heads, "dola": with_dola}), flush=True)
    return rounds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a random Llama of 16 layers, width 512 and 16384 tokens")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or make_model(folder)
        rounds = asyncio.run(measure(options))
    ratios = [one.ratio for one in rounds]
    found = statistics.median(ratios)
    print(
        f"DoLa, {NUM_CANDIDATES} candidates: {found:.3f} of plain and its head products "
        f"({min(ratios):.3f} to {max(ratios):.3f}); bar {BAR} {'met' if found <= BAR else 'MISSED'}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    main()
