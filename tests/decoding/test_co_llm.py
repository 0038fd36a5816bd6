"""Co-LLM against the authors' decoding loop on table models, and a plain computation."""

import math
from typing import Any

import pytest
import torch
from decodings import golden, random_batch, run
from pydantic import ValidationError
from reference import co_llm as reference
from torch import Tensor

from whipstaff.decoding.methods.co_llm import CoLlm, CoLlmParams, threshold_at
from whipstaff.decoding.rows import Rows

SAID, TENSORS = golden("co_llm")
CASES = [case for case in SAID["cases"] if case["id"] != "train"]
METHOD = CoLlm()
ONE = {"assistant": "a", "head": "h"}


def step(params: CoLlmParams, last: int, num_generated: int) -> tuple[Tensor, float]:
    """The row after one token of the table models, whose hidden state is the logit of deferring."""
    rows = Rows(
        TENSORS["dec.base_table"][last][None].clone(),
        num_prompt=[5],
        num_generated=[num_generated],
        hidden=TENSORS["dec.defer_logit_table"][last].view(1, 1),
        streams={"assistant": TENSORS["dec.assistant_table"][last][None]},
        heads={"head": {"weight": torch.ones(1)}},
    )
    row = METHOD.rewrite(rows, [params])[0]
    return row, float(rows.facts["defer_probability"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_tokens_are_those_of_the_official_loop(case: dict[str, Any]) -> None:
    params = CoLlmParams(
        **ONE,
        threshold=case["threshold"],
        strategy=case["strategy"],
        warmup=case["warmup"] or "none",
        warmup_tokens=case["warmup_steps"],
    )
    text: list[int] = []
    chances: list[float] = []
    while len(text) < case["max_tokens"]:
        row, chance = step(params, (case["prompt"] + text)[-1], len(text))
        if (token := int(row.argmax())) == 1:
            break
        text.append(token)
        chances.append(chance)
    assert text == case["output"]
    assert chances == pytest.approx(case["deferral_prob"], abs=1e-5)
    assert sum(chance > threshold_at(params, done) for done, chance in enumerate(chances)) == case["n_assistant_calls"]


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("strategy", ["defer", "compose"])
def test_texts_from_every_token_of_the_table_models(strategy: str, threshold: float) -> None:
    """The recorded text never makes the base unsure enough for 0.6; others do."""
    params, differ = CoLlmParams(**ONE, threshold=threshold, strategy=strategy), 0
    for first in range(2, 50):
        last = first
        for done in range(6):
            row, chance = step(params, last, done)
            base, assistant = (TENSORS[f"dec.{name}_table"][last].tolist() for name in ("base", "assistant"))
            logit = float(TENSORS["dec.defer_logit_table"][last])
            expected = reference.rewrite(base, assistant, [logit], [1.0], 0.0, threshold, strategy)
            assert chance == pytest.approx(1 / (1 + math.exp(-logit)), abs=1e-6)
            torch.testing.assert_close(row, torch.tensor(expected), atol=1e-4, rtol=1e-5)
            last = int(row.argmax())
            differ += last != max(range(50), key=lambda v, base=base: base[v])  # type: ignore[misc]
    assert differ > 10


def test_limits_are_one_model_alone() -> None:
    """Threshold 1 is the base, bit for bit; below 0 it is the assistant's row."""
    for threshold in (1.0, -0.5):
        batch = random_batch(METHOD, [CoLlmParams(**ONE, threshold=threshold)] * 4)
        base, assistant = batch.rows.logits.clone(), batch.rows.streams["assistant"]
        expected = base if threshold == 1 else assistant.masked_fill(torch.isneginf(base), -torch.inf)
        assert torch.equal(run(METHOD, batch), expected)


def test_the_threshold_is_strict() -> None:
    batch = random_batch(METHOD, [CoLlmParams(**ONE, threshold=0.5)])
    batch.rows.heads = {"head": {"weight": torch.zeros(8)}}
    before = batch.rows.logits.clone()
    assert torch.equal(run(METHOD, batch), before)


@pytest.mark.parametrize("strategy", ["defer", "compose"])
def test_a_plain_computation(strategy: str) -> None:
    params = [CoLlmParams(**ONE, threshold=0.4, strategy=strategy, warmup="linear", warmup_tokens=9)] * 12
    batch = random_batch(METHOD, params)
    head = batch.rows.heads["head"]
    assert batch.rows.hidden is not None
    expected = []
    for row, done in enumerate(batch.rows.num_generated):
        base, assistant = batch.rows.logits[row].tolist(), batch.rows.streams["assistant"][row].tolist()
        hidden, weight, bias = batch.rows.hidden[row].tolist(), head["weight"].tolist(), float(head["bias"])
        limit = reference.threshold(done, 0.4, "linear", 9)
        expected.append(reference.rewrite(base, assistant, hidden, weight, bias, limit, strategy))
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("warmup", ["none", "linear", "cosine", "exponential"])
def test_thresholds_start_at_one(warmup: Any) -> None:
    params = CoLlmParams(**ONE, threshold=0.2, warmup=warmup)
    for done in range(20):
        assert threshold_at(params, done) == pytest.approx(reference.threshold(done, 0.2, warmup, 15))
    assert threshold_at(params, 0) == (0.2 if warmup == "none" else 1.0)
    assert threshold_at(params, 15) == threshold_at(params, 100) == 0.2


def test_an_exponential_below_zero_is_refused() -> None:
    with pytest.raises(ValidationError, match="linear or cosine") as caught:
        CoLlmParams(**ONE, threshold=-0.1, warmup="exponential")
    assert caught.value.errors()[0]["loc"] == ("warmup",)


def test_an_assistant_may_know_more_or_fewer_tokens() -> None:
    for width in (30, 50):
        batch = random_batch(METHOD, [CoLlmParams(**ONE, threshold=-1)] * 2)
        batch.rows.streams = {"assistant": torch.zeros(2, width)}
        before = batch.rows.logits.clone()
        result = run(METHOD, batch)
        assert torch.equal(result[:, :30] > -torch.inf, before[:, :30] > -torch.inf)
        assert torch.isneginf(result[:, width:]).all()


def test_an_assistant_that_knows_none_of_the_allowed_tokens_is_passed_over() -> None:
    batch = random_batch(METHOD, [CoLlmParams(**ONE, threshold=-1)])
    batch.rows.streams = {"assistant": torch.zeros(1, 30)}
    batch.rows.logits[:, :30] = -torch.inf
    before = batch.rows.logits.clone()
    assert torch.equal(run(METHOD, batch), before)
