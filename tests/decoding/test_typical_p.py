"""Locally typical sampling against transformers and a plain computation."""

import pytest
import torch
from decodings import random_batch, run
from reference import typical_p as reference
from transformers.generation.logits_process import TypicalLogitsWarper

from whipstaff.decoding.methods.typical_p import TypicalP, TypicalPParams

METHOD = TypicalP()


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5, 0.95])
def test_transformers_and_a_plain_computation(p: float) -> None:
    batch = random_batch(METHOD, [TypicalPParams(p=p)] * 40)
    before = batch.rows.logits.clone()
    result = run(METHOD, batch)
    assert torch.equal(result, TypicalLogitsWarper(mass=p)(torch.zeros(40, 1), before))
    assert torch.equal(result, torch.tensor([reference.rewrite(row, p) for row in before.tolist()]))


def test_the_likeliest_token_may_go() -> None:
    batch = random_batch(METHOD, [TypicalPParams(p=0.2)])
    batch.rows.logits[:] = torch.tensor([0.05] * 10 + [0.0] * 29 + [0.5]).log()
    assert torch.isneginf(run(METHOD, batch)[0, -1])
