"""Weighted decoding against the authors' step with a classifier for every token, and a plain computation."""

from typing import Any

import pytest
import torch
from decodings import golden, random_batch, run
from reference import kwd as reference

from whipstaff.decoding.methods.kwd import Kwd, KwdParams
from whipstaff.decoding.rows import Rows

SAID, TENSORS = golden("kcts")
METHOD = Kwd()


@pytest.mark.parametrize("case", [case for case in SAID["cases"] if "v2" in case["id"]], ids=lambda case: case["id"])
def test_tokens_are_those_of_the_official_step(case: dict[str, Any]) -> None:
    name = case["id"].removesuffix("_v2")
    logits, class_logits = TENSORS[f"{name}.lm_logits"], TENSORS[f"{name}.v2_class_logits"]
    rows = Rows(logits.clone(), [1] * 3, [0] * 3, hidden=torch.eye(3))  # row r of the classifier's weight is g's row r
    rows.heads = {"classifier": {"weight": class_logits.T.contiguous()}}
    result = METHOD.rewrite(rows, [KwdParams(classifier="c", k=case["k"])] * 3)
    assert result.argmax(1).tolist() == case["chosen"]
    pairs = zip(logits.tolist(), class_logits.tolist(), strict=True)
    expected = torch.tensor([reference.rewrite(*pair, case["k"]) for pair in pairs])
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


def test_a_plain_computation() -> None:
    ks = [1, 3, 40, 256, 10]
    batch = random_batch(METHOD, [KwdParams(classifier="c", k=k) for k in ks])
    head, hidden = batch.rows.heads["classifier"], batch.rows.hidden
    assert hidden is not None
    g = (hidden @ head["weight"].T + head["bias"]).tolist()
    expected = [reference.rewrite(row, own, k) for row, own, k in zip(batch.rows.logits.tolist(), g, ks, strict=True)]
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected), atol=1e-4, rtol=1e-5)


def test_of_equal_tokens_the_first_are_judged() -> None:
    batch = random_batch(METHOD, [KwdParams(classifier="c", k=3), KwdParams(classifier="c", k=9)])
    batch.rows.logits[:] = 1.0
    batch.rows.logits[:, 5] = 2.0
    kept = (run(METHOD, batch) > -torch.inf).int()
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 5]
    assert kept[1].nonzero().flatten().tolist() == list(range(9))
