"""Proxy-tuning through the engine against the authors' own code: scores, tokens, and the order of penalties."""

from dataclasses import replace
from typing import Any

import pytest
from decodings import golden
from engines import Ask, EngineUnderTest, plan
from reference import seeded

pytestmark = pytest.mark.engine

SAID, TENSORS = golden("proxy_tuning")
CASES: list[dict[str, Any]] = SAID["cases"]
SAMPLING = {"reppen": {"repetition_penalty": 1.2}}
TOLERANCE, NEAR = 2e-4, 1e-3  # log-probabilities; scores of tokens that may change places between implementations
WARP = next(case for case in CASES if case["id"] == "warp")


def ask(case: dict[str, Any]) -> Ask:
    expert = "expert_bigvocab" if case["id"] == "bigvocab" else "expert"
    mix = {expert: case["alpha"], "antiexpert": -case["alpha"]}
    sampling = {"logprobs": 10} | SAMPLING.get(case["id"], {})
    return Ask(case["prompt"], plan(None, mix), len(case["output"]), sampling)


def test_all_cases_in_one_batch(recorded: EngineUnderTest) -> None:
    outputs = recorded.generate(*map(ask, CASES))
    for case, output in zip(CASES, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["output"], case["id"]


def test_temperature_and_top_p_come_after_the_mix(recorded: EngineUnderTest) -> None:
    """Of what was recorded behind all three, every step draws with vLLM's own noise: the best is taken there, so that
    each step is asked for by itself."""
    scores, seeds = TENSORS["warp.dexperts"].double(), range(12)
    warp = {name: WARP[name] for name in ("temperature", "top_p")}
    asks, expected = [], []
    for step, row in enumerate(scores):
        prompt = WARP["prompt"] + WARP["output"][:step]
        for seed in seeds:
            asks.append(replace(ask(WARP | {"prompt": prompt}), max_tokens=1, sampling=warp | {"seed": seed}))
            (noise,) = seeded.noise(recorded.facts["runner"], seed, len(prompt), 1, len(row))
            expected.append(row + noise)
    for row, (token,) in zip(expected, recorded.tokens(*asks), strict=True):
        assert row.max() - row[token] < NEAR
    assert {int(row.argmax()) for row in expected} - set(WARP["output"])


def test_log_probabilities_are_those_of_the_mixed_distribution(recorded: EngineUnderTest) -> None:
    """`logprobs` are taken after mixing and before penalties, temperature and truncation."""
    plain_cases = [case for case in CASES if case["id"] not in ("warp", "reppen")]
    for case, output in zip(plain_cases, recorded.generate(*map(ask, plain_cases)), strict=True):
        expected = TENSORS[f"{case['id']}.dexperts"].double().log_softmax(-1)
        for step, said in zip(expected, output.outputs[0].logprobs, strict=True):
            for token, entry in said.items():
                assert entry.logprob == pytest.approx(step[token].item(), abs=TOLERANCE), case["id"]
