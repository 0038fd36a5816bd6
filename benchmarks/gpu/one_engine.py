"""One engine for throughput.py: says that it is ready, then reads commands and says how long each took.

A command is a JSON line {"variant", "concurrency", "requests"}; the answer is {"seconds"}. The input's end ends it.
"""

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import torch
from transformers import LlamaConfig
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.v1.engine.async_llm import AsyncLLM

from whipstaff.decoding.methods.cfg import Cfg, CfgParams
from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.engine.frontend.launch import PlanDict, Setup, start
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, RequestPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector, packed, parse

PROMPT_LEN, MAX_TOKENS, NUM_CONFIGS = 32, 48, 256
NEGATIVE_LEN = 4
Variant = Literal["plain", "steered_1", "steered_256", "vectors_3", "cfg", "proxy"]
Shape = dict[str, int]
SHAPES: dict[str, dict[str, Shape]] = {
    "large": {
        "base": {
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "expert": {
            "vocab_size": 128256,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
    },
    "small": {
        name: {
            "vocab_size": 512,
            "hidden_size": hidden,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
        }
        for name, hidden in (("base", 128), ("expert", 64))
    },
}


def save_config(folder: Path, shape: Shape) -> str:
    """A Llama's configuration, for weights that vLLM makes up; the folder as a string."""
    config = LlamaConfig(max_position_embeddings=512, tie_word_embeddings=True, **shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


def make_vectors(shape: ModelShape) -> dict[str, tuple[Vector, bytes]]:
    """One for both sites of every layer, and one for the stream alone."""
    generator = torch.Generator().manual_seed(0)
    layers = range(shape.num_layers)
    stream = {f"resid_post.{i}.add": 0.02 * torch.randn(shape.hidden_size, generator=generator) for i in layers}
    size = shape.num_heads, shape.head_dim
    heads = {f"attn_head.{i}.add": 0.02 * torch.randn(size, generator=generator) for i in layers}
    files = {"stream": stream, "both": stream | heads}
    data = {name: packed(Header(method="vector", model=shape), tensors) for name, tensors in files.items()}
    return {name: (parse(each), each) for name, each in data.items()}


def steered(vectors: dict[str, tuple[Vector, bytes]], name: str, *scales: float) -> RequestPlan:
    planner = Planner()
    for scale in scales:
        params = SteeringParams.model_validate({"vector": name, "where": "all"})
        planner.add(params, {"scale": scale}, vectors[name][0], None)
    return RequestPlan(planner.plan)


def prompt(index: int, length: int, vocabulary: int) -> list[int]:
    return [(7 * index + 13 * place) % (vocabulary - 3) + 3 for place in range(length)]


class Load:
    """An engine and what its requests may ask for."""

    def __init__(self, engine: Any, vectors: dict[str, tuple[Vector, bytes]]) -> None:
        self._engine, self._vectors = engine, vectors
        self._vocabulary = engine.model_config.get_vocab_size()

    def plan(self, variant: Variant, index: int) -> RequestPlan | None:
        if variant == "plain":
            return None
        if variant in ("steered_1", "steered_256"):
            config = index % NUM_CONFIGS if variant == "steered_256" else 0
            return steered(self._vectors, "both", 1 + 0.001 * config)
        if variant == "vectors_3":
            return steered(self._vectors, "stream", 0.3, 1.3, 2.3)
        if variant == "proxy":
            return RequestPlan(decoding=DecodingPlan(Mix.of({"expert": 1.0, "anti": -1.0})))
        negative = CompanionPlan(tuple(prompt(index + 1000, NEGATIVE_LEN, self._vocabulary)))
        mix = Cfg().mix(CfgParams(guidance_scale=1.5))
        return RequestPlan(decoding=DecodingPlan(mix), companions=(negative,))

    async def seconds(self, variant: Variant, concurrency: int, requests: int) -> float:
        """For that many requests, `concurrency` of them at a time."""
        plans = [self.plan(variant, index) for index in range(requests)]
        wires = [None if plan is None else {PLAN_KEY: PlanDict(plan.to_wire())} for plan in plans]
        gate, begin = asyncio.Semaphore(concurrency), time.perf_counter()

        async def one(index: int) -> None:
            params = SamplingParams(
                temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True, detokenize=False, extra_args=wires[index]
            )
            ids = {"prompt_token_ids": prompt(index, PROMPT_LEN, self._vocabulary)}
            async with gate:
                async for _ in self._engine.generate(ids, params, str(uuid4())):
                    pass

        await asyncio.gather(*map(one, range(requests)))
        return time.perf_counter() - begin


async def serve(options: argparse.Namespace) -> None:
    cuda = {
        "dtype": "bfloat16",
        "max_num_seqs": 256,
        "kv_cache_memory_bytes": 4 << 30,
        "gpu_memory_utilization": 0.2,
        "attention_backend": "TRITON_ATTN",
        "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32, 64, 128, 256]},
    }
    cpu = {"dtype": "float32", "max_num_seqs": 16, "kv_cache_memory_bytes": 1 << 27, "enforce_eager": True}
    args = AsyncEngineArgs(
        model=options.model,
        load_format="dummy",
        max_model_len=256,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        **(cuda if options.device == "cuda" else cpu),
    )
    vectors: dict[str, tuple[Vector, bytes]] = {}
    begin, engine = time.monotonic(), None
    if options.stock:
        engine = AsyncLLM.from_engine_args(args)
    else:
        config = LlamaConfig.from_pretrained(options.model)
        vectors = make_vectors(
            ModelShape(
                architecture="LlamaForCausalLM",
                hidden_size=config.hidden_size,
                num_layers=config.num_hidden_layers,
                num_heads=config.num_attention_heads,
                head_dim=config.hidden_size // config.num_attention_heads,
                num_kv_heads=config.num_key_value_heads,
            )
        )
        auxiliaries = [(name, options.expert) for name in ("expert", "anti")] if options.expert else []
        engine = start(args, Setup(auxiliaries, NUM_CONFIGS + 16, [vector for vector, _ in vectors.values()]))
    try:
        for vector, data in vectors.values():
            assert (await engine.collective_rpc("whipstaff_add_vector", args=(data,)))[0] == vector.digest
        settled = engine.vllm_config.compilation_config
        facts = {"graphs": settled.cudagraph_mode.name, "mode": settled.mode.name}
        print(json.dumps({"ready": round(time.monotonic() - begin, 1)} | facts), flush=True)
        load = Load(engine, vectors)
        while line := await asyncio.to_thread(sys.stdin.readline):
            print(json.dumps({"seconds": await load.seconds(**json.loads(line))}), flush=True)
    finally:
        engine.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--stock", action="store_true", help="vLLM's own engine, nothing of ours in it")
    parser.add_argument("--expert", help="a folder: with two auxiliary models, both of them this one")
    asyncio.run(serve(parser.parse_args()))


if __name__ == "__main__":
    main()
