"""Contrastive decoding in logit space against a float64 computation from the formula, and a plain one."""

import math
from typing import Any

import pytest
import torch
from decodings import golden, random_batch, run
from reference import contrastive_beta as reference
from torch import Tensor

from whipstaff.decoding.methods.contrastive_beta import ContrastiveBeta, ContrastiveBetaParams
from whipstaff.decoding.mix import MixedRow, mix_rows

SAID, TENSORS = golden("contrastive_decoding_logit_beta")
METHOD = ContrastiveBeta()
CASES = pytest.mark.parametrize("case", SAID["cases"][:3], ids=lambda case: case["id"])


def scores(case: dict[str, Any]) -> Tensor:
    """What the method makes of the file's rows."""
    expert, amateur = TENSORS["expert"].float(), TENSORS["amateur"].float()
    mix = METHOD.mix(ContrastiveBetaParams(amateur="first", alpha=case["alpha"], beta=case["beta"]))
    return mix_rows(expert, {"first": amateur}, [MixedRow(row, mix, [row]) for row in range(len(expert))])


@CASES
def test_scores_are_the_golden_ones(case: dict[str, Any]) -> None:
    result = scores(case)
    torch.testing.assert_close(result, TENSORS[case["id"]].float(), atol=1e-4, rtol=0)
    assert (result > -torch.inf).sum(1).tolist() == case["kept"]
    assert result.argmax(1).tolist() == case["greedy"]


def test_the_mask_looks_at_the_expert_not_at_the_mix() -> None:
    """A public re-implementation holds the mixed score against the expert's limit: it keeps other tokens, as many as
    the file counts beside ours."""
    case, wrong = SAID["cases"][0], SAID["cases"][3]
    mixed = (1 + case["beta"]) * TENSORS["expert"] - case["beta"] * TENSORS["amateur"]
    theirs = mixed >= TENSORS["expert"].amax(1, keepdim=True) + math.log(case["alpha"])
    assert int((theirs != (scores(case) > -torch.inf)).sum()) == wrong["n_positions_differ"]


@pytest.mark.parametrize("own", [(0.1, 0.5), (0.0, 1.0), (0.3, 0.0)])
def test_a_plain_computation(own: tuple[float, float]) -> None:
    batch = random_batch(METHOD, [ContrastiveBetaParams(amateur="first", alpha=own[0], beta=own[1])] * 5)
    pairs = zip(batch.rows.logits.tolist(), batch.rows.streams["first"].tolist(), strict=True)
    expected = torch.tensor([reference.rewrite(*pair, *own) for pair in pairs])
    torch.testing.assert_close(run(METHOD, batch), expected, atol=1e-4, rtol=1e-5)
