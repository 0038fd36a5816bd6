"""Proxy-tuning through the engine against the authors' own code: scores, tokens, and the order of penalties."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engines import Ask, EngineUnderTest, plan
from safetensors.torch import load_file

pytestmark = pytest.mark.engine

GOLDEN = Path(__file__).parents[2] / "golden" / "decoding"
CASES: list[dict[str, Any]] = json.loads((GOLDEN / "proxy_tuning.json").read_text())["cases"]
TENSORS = load_file(GOLDEN / "proxy_tuning.safetensors")
SAMPLING = {"reppen": {"repetition_penalty": 1.2}}  # "warp" is greedy too: temperature and top-p keep the argmax
TOLERANCE = 2e-4


@pytest.fixture(scope="module")
def engine() -> Iterator[EngineUnderTest]:
    aux = [(name, str(GOLDEN / "models" / name)) for name in ("expert", "antiexpert", "expert_bigvocab")]
    flags: dict[str, Any] = {"enforce_eager": True, "skip_tokenizer_init": True, "max_num_seqs": 16}
    found = EngineUnderTest(str(GOLDEN / "models" / "base"), aux, **flags)
    try:
        yield found
    finally:
        found.close()


def ask(case: dict[str, Any]) -> Ask:
    expert = "expert_bigvocab" if case["id"] == "bigvocab" else "expert"
    mix = {expert: case["alpha"], "antiexpert": -case["alpha"]}
    sampling = {"logprobs": 10} | SAMPLING.get(case["id"], {})
    return Ask(case["prompt"], plan(None, mix), len(case["output"]), sampling)


def test_all_cases_in_one_batch(engine: EngineUnderTest) -> None:
    outputs = engine.generate(*map(ask, CASES))
    for case, output in zip(CASES, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == case["output"], case["id"]


def test_log_probabilities_are_those_of_the_mixed_distribution(engine: EngineUnderTest) -> None:
    """`logprobs` are taken after mixing and before penalties, temperature and truncation."""
    plain_cases = [case for case in CASES if case["id"] not in ("warp", "reppen")]
    for case, output in zip(plain_cases, engine.generate(*map(ask, plain_cases)), strict=True):
        expected = TENSORS[f"{case['id']}.dexperts"].double().log_softmax(-1)
        for step, said in zip(expected, output.outputs[0].logprobs, strict=True):
            for token, entry in said.items():
                assert entry.logprob == pytest.approx(step[token].item(), abs=TOLERANCE), case["id"]
