"""LoRA adapters in whole engines: alone, steered, and as sequences of one request, against merged weights."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from engines import Ask, EngineUnderTest, edit
from loras import merged, random_lora, save_lora
from modes import v2_on_cpu
from reference import steered
from torch import Tensor
from transformers import AutoModelForCausalLM

from whipstaff.decoding.methods.adapter_ensemble import AdapterEnsemble, AdapterEnsembleParams
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.engine.request import Member, RequestPlan
from whipstaff.steering.artifacts import Vector
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.where import Where

pytestmark = pytest.mark.engine

NAMES = ("law", "math")
NEAR = 1e-3
PROMPTS = [[5, 6, 7, 8], [9], list(range(3, 60))]


@dataclass
class Bench:
    engine: EngineUnderTest
    models: dict[str, torch.nn.Module]  # "" is the one without an adapter
    adapters: dict[str, tuple[str, int, str]]
    vector: Vector

    def logits(self, name: str, prompt: list[int], said: list[int], scale: float = 0.0) -> Tensor:
        """(T, V) that each token was chosen from."""
        edits = [
            steered.Edit(site, layer, scale, parts.get("gain"), parts.get("add"), lambda position, length: True)
            for (site, layer), parts in (self.vector.tensors.items() if scale else ())
        ]
        found = steered.logits(self.models[name], prompt + said[:-1], len(prompt), edits)
        return found[len(prompt) - 1 :, : tiny.VOCABULARY]

    def steering(self, scale: float) -> SteeringPlan:
        return SteeringPlan((edit(self.vector, scale, Where.of("all")),))


@pytest.fixture(scope="module", params=["v1", "v2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("models")
    path = tiny.save("llama", folder / "base")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    models, adapters = {"": base}, {}
    for number, name in enumerate(NAMES, 1):
        lora = random_lora(base, number)
        models[name] = merged(base, lora)
        adapters[name] = (name, number, save_lora(folder / name, lora))
    flags: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with v2_on_cpu() if request.param == "v2" else nullcontext():
        engine = EngineUnderTest(
            path, skip_tokenizer_init=True, enforce_eager=True, max_num_seqs=16, max_num_batched_tokens=64, **flags
        )
        try:
            assert engine.facts["runner"] == request.param
            generator = torch.Generator().manual_seed(3)
            sizes = {
                "resid_post": (engine.shape.hidden_size,),
                "attn_head": (engine.shape.num_heads, engine.shape.head_dim),
            }
            tensors = {f"{site}.1.add": torch.randn(size, generator=generator) for site, size in sizes.items()}
            yield Bench(engine, models, adapters, engine.add_vector(tensors))
        finally:
            engine.close()


def assert_best(scores: Tensor, said: list[int]) -> None:
    gaps = scores.amax(-1) - scores[torch.arange(len(said)), said]
    assert float(gaps.max()) < NEAR, gaps.tolist()


def test_an_ensemble(bench: Bench) -> None:
    """Beside plain and steered requests."""
    weights = {"law": 1.0, "math": 3.0}
    mix = AdapterEnsemble().mix(AdapterEnsembleParams(weights=weights))
    asks = []
    for prompt in PROMPTS:
        members = tuple(Member(tuple(prompt), adapter=bench.adapters[name]) for name in weights)
        asks += [Ask(prompt), Ask(prompt, RequestPlan(bench.steering(0.5)))]
        asks.append(Ask(prompt, RequestPlan(None, DecodingPlan(mix), members=members)))
    found = iter(bench.engine.tokens(*asks))
    for prompt in PROMPTS:
        said = next(found)
        assert_best(bench.logits("", prompt, said), said)
        said = next(found)
        assert_best(bench.logits("", prompt, said, 0.5), said)
        said = next(found)
        base, law, math = (bench.logits(name, prompt, said) for name in ("", *NAMES))
        assert_best(0.5 * base + 0.5 * (0.25 * law + 0.75 * math), said)


def test_adapters_that_are_steered(bench: Bench) -> None:
    """The same adapter over the same prompt, steered and not: activations are edited, and caches told apart."""
    mix = Mix((Term(MAIN, 1.0), Term(Stream("", 1), 1.0), Term(Stream("", 2), -0.5)))
    for prompt in PROMPTS:
        law = bench.adapters["law"]
        members = Member(tuple(prompt), bench.steering(0.5), adapter=law), Member(tuple(prompt), adapter=law)
        (said,) = bench.engine.tokens(Ask(prompt, RequestPlan(None, DecodingPlan(mix), members=members)))
        rows = [
            bench.logits("", prompt, said),
            bench.logits("law", prompt, said, 0.5),
            bench.logits("law", prompt, said),
        ]
        assert_best(rows[0] + rows[1] - 0.5 * rows[2], said)
