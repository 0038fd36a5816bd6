"""What guidance costs: a request of two sequences against two plain requests, and against transformers, in one run.

    python benchmarks/coupled.py [--model PATH] [--concurrency N] [--requests N] [--rounds N] [--compiled]

Ways take turns in every round, each between two measurements of what it is compared with; the median of the rounds'
ratios is shown, and the lowest and highest. Prompts have 32 tokens, negative prompts 4 or 128, answers 48. Prefix
caching is off, so that every sequence is computed.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
from load import MAX_TOKENS, PROMPT_LEN, Job, beside, make_model, prompt, run
from transformers import AutoModelForCausalLM
from vllm.engine.arg_utils import AsyncEngineArgs

from whipstaff.decoding.methods.cfg import Cfg, CfgParams
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.engine.frontend.launch import Engine, start
from whipstaff.server.plan import CompanionPlan, RequestPlan

SCALE = 1.5
NEGATIVES = {"short": 4, "long": 128}  # tokens
MAX_COST, MIN_GAIN, MIN_NEIGHBOURS = 1.05, 10.0, 0.95  # bars


def guided(num: int, length: int, vocabulary: int) -> list[Job]:
    mix = DecodingPlan(Cfg().mix(CfgParams(guidance_scale=SCALE)))
    return [
        Job(
            [prompt(index, PROMPT_LEN, vocabulary)],
            RequestPlan(None, mix, companions=(CompanionPlan(tuple(prompt(index + num, length, vocabulary))),)),
        )
        for index in range(num)
    ]


def pairs(num: int, length: int, vocabulary: int) -> list[Job]:
    """The same sequences as requests of their own."""
    return [
        Job([prompt(index, PROMPT_LEN, vocabulary), prompt(index + num, length, vocabulary)]) for index in range(num)
    ]


@contextmanager
def running(options: argparse.Namespace) -> Iterator[Engine]:
    args = AsyncEngineArgs(
        model=options.model,
        dtype="float32",
        max_model_len=256,
        max_num_seqs=4 * options.concurrency,
        enable_prefix_caching=False,
        enforce_eager=not options.compiled,
        kv_cache_memory_bytes=1 << 29,
        skip_tokenizer_init=True,
    )
    engine = start(args)
    try:
        yield engine
    finally:
        engine.shutdown()


def transformers_rate(options: argparse.Namespace, num: int) -> float:
    """Tokens per second of `generate(guidance_scale=...)`, one request after the other."""
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    vocabulary, num_threads = model.config.vocab_size, torch.get_num_threads()

    def seconds(index: int) -> float:
        started = time.perf_counter()
        model.generate(
            torch.tensor([prompt(index, PROMPT_LEN, vocabulary)]),
            guidance_scale=SCALE,
            negative_prompt_ids=torch.tensor([prompt(index + num, NEGATIVES["short"], vocabulary)]),
            max_new_tokens=MAX_TOKENS,
            min_new_tokens=MAX_TOKENS,
            do_sample=False,
        )
        return time.perf_counter() - started

    seconds(0)  # warms up
    best = 0.0
    for threads in {1, num_threads}:  # whichever is faster
        torch.set_num_threads(threads)
        best = max(best, num * MAX_TOKENS / sum(map(seconds, range(num))))
    torch.set_num_threads(num_threads)
    return best


async def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """By ratio, what it was in every round."""
    ratios: dict[str, list[float]] = {}
    num, concurrency = options.requests, options.concurrency
    with running(options) as engine:
        vocabulary = engine.model_config.get_vocab_size()
        plain = [Job([prompt(index, PROMPT_LEN, vocabulary)]) for index in range(num)]
        await run(engine, pairs(num, NEGATIVES["long"], vocabulary), concurrency)  # warms up
        for _ in range(options.rounds):
            for name, length in NEGATIVES.items():
                two = pairs(num, length, vocabulary)
                before = await run(engine, two, concurrency)
                cost = await run(engine, guided(num, length, vocabulary), concurrency)
                after = await run(engine, two, concurrency)
                note(ratios, f"cost of two plain requests, {name} negative prompt", 2 * cost / (before + after))
                if name == "short":
                    note(ratios, "tokens per second", num * MAX_TOKENS / cost)
            two, one = pairs(num, 4, vocabulary), guided(num, 4, vocabulary)
            before = await beside(engine, plain, two, concurrency)
            during = await beside(engine, plain, one, concurrency)
            after = await beside(engine, plain, two, concurrency)
            note(ratios, "plain neighbours' throughput, of beside plain pairs", (before + after) / (2 * during))
    for _ in range(options.rounds):
        note(ratios, "transformers' tokens per second", transformers_rate(options, max(2, num // 16)))
    return ratios


def note(ratios: dict[str, list[float]], name: str, value: float) -> None:
    ratios.setdefault(name, []).append(value)
    print(json.dumps({"what": name, "round": len(ratios[name]), "value": value}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: a random Llama of 16 layers that the script makes")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        options.model = options.model or make_model(folder)
        ratios = asyncio.run(measure(options))
    setup: dict[str, Any] = vars(options) | {"threads": torch.get_num_threads(), "torch": torch.__version__}
    medians = {name: statistics.median(each) for name, each in ratios.items()}
    for name, each in ratios.items():
        print(json.dumps({**setup, "what": name, "median": medians[name], "rounds": each}), flush=True)
        print(f"{name:60} {medians[name]:9.3f}  ({min(each):.3f} to {max(each):.3f})", file=sys.stderr)
    gain = medians["tokens per second"] / medians["transformers' tokens per second"]
    costs = [medians[f"cost of two plain requests, {name} negative prompt"] for name in NEGATIVES]
    neighbours = medians["plain neighbours' throughput, of beside plain pairs"]
    for what, found, bar, is_met in (
        ("cost of two plain requests", max(costs), MAX_COST, max(costs) <= MAX_COST),
        ("plain neighbours", neighbours, MIN_NEIGHBOURS, neighbours >= MIN_NEIGHBOURS),
        ("of transformers' tokens per second", gain, MIN_GAIN, gain >= MIN_GAIN),
    ):
        print(f"{what:60} {found:9.3f}  bar {bar} {'met' if is_met else 'MISSED'}", file=sys.stderr)


if __name__ == "__main__":
    main()
