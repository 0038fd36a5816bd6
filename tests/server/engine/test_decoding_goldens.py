"""The decoding goldens through the engine, and settings of methods that must come to something simpler.

Here: plain contrastive decoding, whose golden comes with models; proxy-tuning and DoLa have files of their own. The
others were recorded from stand-ins: random logits (DExperts, contrastive decoding in logit space, ensembles, the
temperatures), tables indexed by the last token (Co-LLM, weighted decoding), a tokenizer without a model (rules), or
GPT-2 models that were not kept (the official contrastive release). No engine can run those; tests/decoding holds the
methods' tensors against them, and test_decoding.py the engine against the methods, token by token.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from decodings import GOLDEN, StubVocabulary, golden
from engines import Ask, EngineUnderTest
from reference import steered
from transformers import AutoModelForCausalLM

from whipstaff.decoding.method import Params, StreamMixer
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.plan import DecodingPlan, Rewrite, SamplerSettings
from whipstaff.server.plan import RequestPlan
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Header, Vector

pytestmark = pytest.mark.engine

MODELS = GOLDEN / "models"
SAID, TENSORS = golden("contrastive_decoding_voidism")
PROMPTS: list[list[int]] = [case["prompt"] for case in SAID["cases"][::2]] + [list(range(60, 97))]
NUM_TOKENS, TOLERANCE = 8, 2e-4
PAIR = {"expert": "expert", "antiexpert": "antiexpert"}
OFF: dict[str, dict[str, Any]] = {
    "proxy_tuning": {**PAIR, "alpha": 0.0},
    "dexperts": {**PAIR, "alpha": 0.0, "top_p": 1.0},
    "contrastive": {"amateur": "antiexpert", "alpha": 0.3, "beta": 0.0},
    "contrastive_beta": {"amateur": "antiexpert", "alpha": 0.3, "beta": 0.0},
    "adapter_free_ensemble": {"weights": {"expert": 1.0}, "base_weight": 1.0},
    "dola": {"layers": [0], "relative_top": 1.0},
    "co_llm": {"assistant": "expert", "head": "head", "threshold": 1.0},
    "rule_adapter": {"ramp": False, "style": False, "repetition": False},
    "dry": {"multiplier": 0.0},
}
"""Under which greedy decoding is the base's."""

ANOTHER: dict[str, tuple[dict[str, Any], str]] = {
    "co_llm": ({"assistant": "expert", "head": "head", "threshold": -1.0}, "expert"),
    "adapter_free_ensemble": ({"weights": {"antiexpert": 2.0}, "base_weight": 0.0}, "antiexpert"),
    "dexperts": ({"expert": "expert", "alpha": 1.0, "top_p": 1.0}, "expert"),  # base + expert - base
}
"""Under which it is another model's."""


@pytest.fixture(scope="module")
def head(recorded: EngineUnderTest) -> Vector:
    """Of Co-LLM: sure of nothing."""
    return recorded.add_vector(
        {"weight": torch.zeros(recorded.shape.hidden_size)}, Header(method="defer_head", model=recorded.shape)
    )


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    names = ("base", "expert", "antiexpert")
    return {name: AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32) for name in names}


def plan(name: str, own: dict[str, Any], head: Vector) -> RequestPlan:
    """A request with one method."""
    method: Any = METHODS[name]
    params: Params = method.params(**own)
    if isinstance(method, StreamMixer):
        return RequestPlan(None, DecodingPlan(method.mix(params)))
    early = tuple(own.get("layers", ()))
    heads = (head.digest,) * len(method.head_fields)
    setting = method.resolve(params, StubVocabulary()).model_dump_json()
    rewrite = Rewrite(name, setting, tuple(method.streams(params).values()), heads, early)
    return RequestPlan(SteeringPlan((), keeps=early) if early else None, DecodingPlan(rewrites=(rewrite,)))


def test_contrastive_decoding_is_the_other_releases(recorded: EngineUnderTest, head: Vector) -> None:
    """Its tokens, and its scores as the distribution that is told."""
    cases = SAID["cases"]
    asks = [
        Ask(
            case["prompt"],
            plan("contrastive", {"amateur": "antiexpert", "alpha": case["relative_top"]}, head),
            len(case["output"]),
            {"logprobs": 3},
        )
        for case in cases
    ]
    for case, output in zip(cases, recorded.generate(*asks), strict=True):
        assert list(output.outputs[0].token_ids) == case["output"]
        scores = TENSORS[f"{case['id']}.scores"].double().log_softmax(-1)
        for step, told in zip(scores, output.outputs[0].logprobs, strict=True):
            for token, one in told.items():
                assert one.logprob == pytest.approx(step[token].item(), abs=TOLERANCE)


def test_contrastive_decoding_in_logit_space_is_its_formula(
    recorded: EngineUnderTest, head: Vector, models: dict[str, Any]
) -> None:
    """In float64, on what transformers computes of both models."""
    own = [(0.1, 0.5), (0.1, 1.0), (0.3, 0.25)]
    asks = [
        Ask(prompt, plan("contrastive_beta", {"amateur": "antiexpert", "alpha": alpha, "beta": beta}, head), NUM_TOKENS)
        for prompt, (alpha, beta) in zip(PROMPTS, own, strict=True)
    ]
    for prompt, (alpha, beta), tokens in zip(PROMPTS, own, recorded.tokens(*asks), strict=True):
        ids = list(prompt)
        for token in tokens:
            expert, amateur = (steered.logits(models[name], ids, 0, [])[-1].double() for name in ("base", "antiexpert"))
            scores = (1 + beta) * expert - beta * amateur
            scores[expert.softmax(-1) < alpha * expert.softmax(-1).max()] = -torch.inf
            assert token == int(scores.argmax())
            ids.append(token)


def test_what_a_method_comes_to_at_its_ends(recorded: EngineUnderTest, head: Vector, models: dict[str, Any]) -> None:
    """All in one batch: the base itself, or one of the others."""
    cases = [(name, own, "base") for name, own in OFF.items()] + [(name, *one) for name, one in ANOTHER.items()]
    prompts = [PROMPTS[index % 3] for index in range(len(cases))]
    asks = [
        Ask(prompt, plan(name, own, head), NUM_TOKENS) for prompt, (name, own, _) in zip(prompts, cases, strict=True)
    ]
    for prompt, (name, _, model), tokens in zip(prompts, cases, recorded.tokens(*asks), strict=True):
        assert tokens == steered.greedy(models[model], prompt, NUM_TOKENS), name


def test_truncation_leaves_greedy_alone_unless_temperature_comes_last(
    recorded: EngineUnderTest, head: Vector, models: dict[str, Any]
) -> None:
    """With temperature first, one token is left to truncate. Last, as in llama.cpp, the best of what was left is taken:
    of the likely tokens, XTC leaves the least likely."""
    bare = plan("xtc", {"probability": 1.0, "threshold": 0.002}, head)
    assert bare.decoding is not None

    def ask(draw: SamplerSettings) -> Ask:
        assert bare.decoding is not None
        return Ask(PROMPTS[0], replace(bare, decoding=replace(bare.decoding, draw=draw)), NUM_TOKENS)

    first, last = recorded.tokens(ask(SamplerSettings(0.0)), ask(SamplerSettings(0.0, is_temperature_last=True)))
    assert first == steered.greedy(models["base"], PROMPTS[0], NUM_TOKENS)
    ids = list(PROMPTS[0])
    for token in last:
        p = steered.logits(models["base"], ids, 0, [])[-1].softmax(-1)
        likely = p.masked_fill(p < 0.002, torch.inf)
        assert token == int(likely.argmin() if len(p[p >= 0.002]) > 1 else p.argmax())
        ids.append(token)
    assert last != first
