"""A mixed batch against plain transformers: greedy, float32, the demo model, with graphs whole and in pieces.

Plain requests, diagonal edits in several clauses, three vectors, low-rank edits, conditions that hold and that do not,
proxy-tuning and guidance run in one batch. The reference runs on the CPU, without a cache and with hooks
(tests/reference/steered.py). Prints one JSON line for each kind and way: requests, how many have the same tokens, how
many of the reference's differ from plain ones, and the largest difference of the chosen tokens' log-probabilities;
exits 1 if a token differs.
"""

import argparse
import asyncio
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import torch
from reference import steered
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs

from whipstaff.decoding.methods.cfg import Cfg, CfgParams
from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server import demo
from whipstaff.server.engine.frontend.launch import Engine, PlanDict, Setup, start
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, RequestPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector, packed, parse

NUM_TOKENS = 20
TEXTS = (
    "In the morning Mara opened the door, and",
    "The best friend of Linnet",
    "Where does Mara live?",
    "That reminds me of a story. The old road to the moor was long, and the rain",
)
SCALE, WEIGHT = 1.5, 1.0
Touches = Callable[[int, int], bool]
EVERYWHERE: Touches = lambda position, length: True  # noqa: E731
WHERES: dict[str, Touches] = {
    "all": EVERYWHERE,
    "generation": lambda position, length: position >= length,
    "last_prompt": lambda position, length: position == length - 1,
}


@dataclass
class LowRank:
    """LoReFT's edit as a hook of `steered` applies it: x + R^T (W x + b - R x)."""

    layer: int
    weight: Tensor
    bias: Tensor
    rotate: Tensor

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        x = output if isinstance(output, Tensor) else output[0]
        x = x + (x @ self.weight.T + self.bias - x @ self.rotate.T) @ self.rotate
        return x if isinstance(output, Tensor) else (x, *output[1:])


@dataclass
class Case:
    """A request, and what transformers needs to answer the same."""

    kind: str
    prompt: list[int]
    plan: RequestPlan | None = None
    edits: list[steered.Edit] = field(default_factory=list)
    low_rank: list[LowRank] = field(default_factory=list)
    others: Mapping[str, float] = field(default_factory=dict)  # auxiliary models' weights
    negative: list[int] | None = None


class Reference:
    """The same models in transformers."""

    def __init__(self) -> None:
        torch.set_num_threads(1)  # the models are tiny
        self._known: dict[tuple[str, str], tuple[list[int], list[float], list[float]]] = {}
        names = ("demo", "tuned", "untuned")
        self.models = {
            name: AutoModelForCausalLM.from_pretrained(demo.MODELS / name, dtype=torch.float32).eval() for name in names
        }

    def answer(self, case: Case) -> tuple[list[int], list[float], list[float]]:
        """Tokens, their log-probabilities, and how far each was ahead of the next."""
        key = case.kind, repr(case.prompt)
        if key not in self._known:
            self._known[key] = self._computed(case)
        return self._known[key]

    def _computed(self, case: Case) -> tuple[list[int], list[float], list[float]]:
        base = self.models["demo"]
        tokens: list[int] = []
        said: list[float] = []
        margins: list[float] = []
        blocks = steered.places(base)
        handles = [blocks[edit.layer][0].register_forward_hook(edit) for edit in case.low_rank]
        try:
            for _ in range(NUM_TOKENS):
                ids = case.prompt + tokens
                row = steered.logits(base, ids, len(case.prompt), case.edits)[-1]
                for name, weight in case.others.items():
                    row = row + weight * steered.logits(self.models[name], ids, 0, [])[-1][: len(row)]
                if case.negative is not None:
                    away = steered.logits(base, case.negative + tokens, 0, [])[-1].log_softmax(-1)
                    row = away + SCALE * (row.log_softmax(-1) - away)
                best = row.log_softmax(-1).topk(2)
                tokens.append(int(best.indices[0]))
                said.append(float(best.values[0]))
                margins.append(float(best.values[0] - best.values[1]))
        finally:
            for handle in handles:
                handle.remove()
        return tokens, said, margins


def make_vectors(shape: ModelShape) -> dict[str, tuple[Vector, bytes, dict[str, Tensor]]]:
    """By name: the vector, its file and its tensors."""
    generator = torch.Generator().manual_seed(3)

    def numbers(*size: int, scale: float) -> Tensor:
        return scale * torch.randn(*size, generator=generator)

    hidden, heads, layers = shape.hidden_size, (shape.num_heads, shape.head_dim), range(shape.num_layers)
    diagonals = {
        f"both-{n}": {
            f"{site}.{layer}.{part}": numbers(*size, scale=scale)
            for layer in layers
            for site, size in (("resid_post", (hidden,)), ("attn_head", heads))
            for part, scale in (("add", 0.1), ("gain", 0.1))
        }
        for n in range(3)
    }
    basis = torch.linalg.qr(numbers(hidden, 4, scale=1.0)).Q.T.contiguous()
    low_rank = {
        f"resid_post.{layer}.{part}": tensor
        for layer in layers
        for part, tensor in (
            ("weight", numbers(4, hidden, scale=0.1)),
            ("bias", numbers(4, scale=0.3)),
            ("rotate", basis),
        )
    }
    probe = {"resid_post.0.direction": numbers(hidden, scale=1.0)}
    files = {name: ("vector", tensors) for name, tensors in diagonals.items()}
    files |= {"low-rank": ("loreft", low_rank), "probe": ("probe", probe)}
    made = {}
    for name, (method, tensors) in files.items():
        data = packed(Header(method=method, model=shape), tensors)
        made[name] = parse(data), data, tensors
    return made


def plan(vectors: Mapping[str, Any], *entries: tuple[str, float | None, dict[str, Any]]) -> RequestPlan:
    planner = Planner()
    for name, scale, more in entries:
        params = SteeringParams.model_validate({"vector": name, **more})
        own = {} if scale is None else {"scale": scale}
        planner.add(params, own, vectors[name][0], vectors["probe"][0] if "when" in more else None)
    return RequestPlan(planner.plan)


def edits(vectors: Mapping[str, Any], name: str, scale: float, touches: Touches) -> list[steered.Edit]:
    parts: dict[tuple[str, int], dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in vectors[name][2].items():
        site, layer, part = key.split(".")
        parts[site, int(layer)][part] = tensor
    return [
        steered.Edit(site, layer, scale, each["gain"], each["add"], touches) for (site, layer), each in parts.items()
    ]


def cases(vectors: Mapping[str, Any], prompts: list[list[int]], num_layers: int, has_aux: bool) -> Iterator[Case]:
    for prompt, other in zip(prompts, [*prompts[1:], prompts[0]], strict=True):
        yield Case("plain", prompt)
        for where, touches in WHERES.items():
            scale = 0.8 if where == "last_prompt" else 0.4
            steering = plan(vectors, ("both-0", scale, {"where": where}))
            yield Case(f"diagonal, {where}", prompt, steering, edits(vectors, "both-0", scale, touches))
        entries = [(f"both-{n}", 0.2 + 0.1 * n, {"where": "all"}) for n in range(3)]
        three = [edit for name, scale, _ in entries for edit in edits(vectors, name, scale, EVERYWHERE)]
        yield Case("three vectors", prompt, plan(vectors, *entries), three)
        tensors = vectors["low-rank"][2]
        low = [
            LowRank(layer, *(tensors[f"resid_post.{layer}.{part}"] for part in ("weight", "bias", "rotate")))
            for layer in range(num_layers)
        ]
        yield Case("low rank", prompt, plan(vectors, ("low-rank", None, {"where": "all"})), low_rank=low)
        late = list(range(1, num_layers))
        for name, above in (("open", -1e9), ("shut", 1e9)):
            when = {"probe": "probe", "above": above, "decide": "step"}
            gated = plan(vectors, ("both-1", 0.4, {"where": "all", "when": when, "layers": late}))
            made = [edit for edit in edits(vectors, "both-1", 0.4, EVERYWHERE) if edit.layer in late]
            yield Case(f"condition, {name}", prompt, gated, made if name == "open" else [])
        mix = Cfg().mix(CfgParams(guidance_scale=SCALE))
        guided = RequestPlan(None, DecodingPlan(mix), companions=(CompanionPlan(tuple(other)),))
        yield Case("cfg", prompt, guided, negative=other)
        if has_aux:
            weights = {"tuned": WEIGHT, "untuned": -WEIGHT}
            proxy = DecodingPlan(Mix.of(weights))
            yield Case("proxy-tuning", prompt, RequestPlan(decoding=proxy), others=weights)
            both = RequestPlan(plan(vectors, ("both-2", 0.3, {"where": "all"})).steering, proxy)
            yield Case("both", prompt, both, edits(vectors, "both-2", 0.3, EVERYWHERE), others=weights)


async def ask(engine: Engine, case: Case) -> tuple[list[int], list[float]]:
    extra = {PLAN_KEY: PlanDict(case.plan.to_wire())} if case.plan else None
    params = SamplingParams(
        temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True, logprobs=1, detokenize=False, extra_args=extra
    )
    answer: Any = None
    async for output in engine.generate({"prompt_token_ids": case.prompt}, params, str(uuid4())):
        answer = output.outputs[0]
    tokens = list(answer.token_ids)
    return tokens, [step[token].logprob for token, step in zip(tokens, answer.logprobs, strict=True)]


async def compare(way: str, flags: dict[str, Any], reference: Reference, has_aux: bool) -> bool:
    shape = ModelShape(
        architecture="LlamaForCausalLM", hidden_size=192, num_layers=6, num_heads=6, head_dim=32, num_kv_heads=2
    )
    vectors = make_vectors(shape)
    auxiliaries = [(name, str(demo.MODELS / name)) for name in ("tuned", "untuned")] if has_aux else []
    args = AsyncEngineArgs(
        model=str(demo.MODELS / "demo"),
        dtype="float32",
        max_model_len=256,
        max_num_seqs=64,
        max_num_batched_tokens=128,  # the longer prompts are chunked
        kv_cache_memory_bytes=1 << 28,
        gpu_memory_utilization=0.3,
        **flags,
    )
    engine = start(args, Setup(auxiliaries, 64, [vector for vector, _, _ in vectors.values()]))
    try:
        for vector, data, _ in vectors.values():
            assert (await engine.collective_rpc("whipstaff_add_vector", args=(data,)))[0] == vector.digest
        tokenizer = AutoTokenizer.from_pretrained(demo.MODELS / "demo")
        asked = list(cases(vectors, [tokenizer.encode(text) for text in TEXTS], shape.num_layers, has_aux))
        answers = await asyncio.gather(*(ask(engine, case) for case in asked))
        mode = engine.vllm_config.compilation_config.cudagraph_mode.name
    finally:
        engine.shutdown()
    return report(f"{way} ({mode})", asked, answers, reference)


def report(way: str, asked: list[Case], answers: list[tuple[list[int], list[float]]], reference: Reference) -> bool:
    lines: dict[str, dict[str, Any]] = {}
    plain: dict[str, list[int]] = {}
    for case, (tokens, said) in zip(asked, answers, strict=True):
        line = lines.setdefault(
            case.kind, {"way": way, "kind": case.kind, "requests": 0, "same": 0, "changed": 0, "max_difference": 0.0}
        )
        wanted, logprobs, margins = reference.answer(case)
        if case.kind == "plain":
            plain[repr(case.prompt)] = wanted
        line["requests"] += 1
        line["same"] += tokens == wanted
        line["changed"] += wanted != plain[repr(case.prompt)]
        if tokens != wanted:
            first = next(i for i, (one, other) in enumerate(zip(tokens, wanted, strict=True)) if one != other)
            line.setdefault("margins_where_they_part", []).append(margins[first])
        else:
            difference = max(abs(one - other) for one, other in zip(said, logprobs, strict=True))
            line["max_difference"] = max(line["max_difference"], difference)
    for line in lines.values():
        print(json.dumps(line), flush=True)
    return all(line["same"] == line["requests"] for line in lines.values())


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    flags: dict[str, Any] = (
        {"attention_backend": "TRITON_ATTN"} if options.device == "cuda" else {"enforce_eager": True}
    )
    reference = Reference()
    found = [
        await compare("graphs in pieces", flags, reference, has_aux=True),
        await compare("whole graphs", flags, reference, has_aux=False),
    ]
    sys.exit(0 if all(found) else 1)


if __name__ == "__main__":
    asyncio.run(main())
