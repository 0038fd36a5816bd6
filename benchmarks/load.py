"""The models that benchmarks make, and the load that they put on an engine."""

import asyncio
import time
from collections.abc import Callable
from uuid import uuid4

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
    """Generated tokens per second of `num` requests, `concurrency` at a time."""
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

    started = time.perf_counter()
    await asyncio.gather(*map(one, range(num)))
    return num * MAX_TOKENS / (time.perf_counter() - started)
