"""The models that benchmarks make, and the load that they put on an engine."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple
from uuid import uuid4

import psutil
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import SamplingParams

from whipstaff.server.engine.frontend.launch import Engine, PlanDict
from whipstaff.server.plan import PLAN_KEY, RequestPlan

PROMPT_LEN, MAX_TOKENS = 32, 48
VOCABULARY, HIDDEN, LAYERS = 16384, 512, 16  # a vocabulary as large beside the blocks as in models that people serve


def make_model(folder: str, seed: int = 0, hidden: int = HIDDEN, layers: int = LAYERS) -> str:
    """Write a random Llama into a folder, and say which."""
    torch.manual_seed(seed)
    shape = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_hidden_layers": layers}
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=512, num_attention_heads=8, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


async def throughput(
    engine: Engine,
    plan: Callable[[int], RequestPlan] | None,
    num: int,
    concurrency: int,
    temperature: float = 0.0,
) -> float:
    """Generated tokens per second of `num` requests, `concurrency` at a time. What they read is taken as each ends."""
    vocabulary = engine.model_config.get_vocab_size()
    gate = asyncio.Semaphore(concurrency)
    wires = [None if plan is None else plan(index).to_wire() for index in range(num)]

    async def one(index: int) -> None:
        prompt = {"prompt_token_ids": [(7 * index + 13 * i) % (vocabulary - 3) + 3 for i in range(PROMPT_LEN)]}
        wire = wires[index]
        params = SamplingParams(
            temperature=temperature,
            max_tokens=MAX_TOKENS,
            ignore_eos=True,
            detokenize=False,
            extra_args=None if wire is None else {PLAN_KEY: PlanDict(wire)},
        )
        async with gate:
            async for _ in engine.generate(prompt, params, str(uuid4())):
                pass
            if wire is not None and wire["captures_id"]:
                told = await engine.collective_rpc("whipstaff_captures", args=(wire["captures_id"],))
                assert all(told), "nothing was read"

    started = time.perf_counter()
    await asyncio.gather(*map(one, range(num)))
    return num * MAX_TOKENS / (time.perf_counter() - started)


class Job(NamedTuple):
    """A client's turn: the requests that it has going at once."""

    prompts: Sequence[list[int]]
    plan: RequestPlan | None = None  # of each


def prompt(index: int, length: int, vocabulary: int) -> list[int]:
    return [(7 * index + 13 * place) % (vocabulary - 3) + 3 for place in range(length)]


async def run(engine: Engine, jobs: Sequence[Job], concurrency: int) -> float:
    """Seconds for all, `concurrency` at a time."""
    gate, started = asyncio.Semaphore(concurrency), time.perf_counter()

    async def one(job: Job) -> None:
        async with gate:
            await asyncio.gather(*(answer(engine, ids, job.plan) for ids in job.prompts))

    await asyncio.gather(*map(one, jobs))
    return time.perf_counter() - started


async def answer(engine: Engine, ids: list[int], plan: RequestPlan | None) -> None:
    extra = None if plan is None else {PLAN_KEY: PlanDict(plan.to_wire())}
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, extra_args=extra)
    async for _ in engine.generate({"prompt_token_ids": ids}, params, str(uuid4())):
        pass


async def beside(engine: Engine, mine: Sequence[Job], others: Sequence[Job], concurrency: int) -> float:
    """Seconds that requests take while others keep the engine busy."""
    busy = asyncio.create_task(forever(engine, others, concurrency))
    await asyncio.sleep(0.5)
    try:
        return await run(engine, mine, concurrency)
    finally:
        busy.cancel()
        await asyncio.gather(busy, return_exceptions=True)


async def forever(engine: Engine, jobs: Sequence[Job], concurrency: int) -> None:
    while True:
        await run(engine, jobs, concurrency)


def cpu_seconds() -> float:
    """Of this process and all that it started, so far."""
    mine = psutil.Process()
    return sum(one.cpu_times().user + one.cpu_times().system for one in (mine, *mine.children(recursive=True)))
