"""Eta sampling against transformers and a plain computation."""

import pytest
import torch
from decodings import random_batch, run
from reference import eta_cutoff as reference
from transformers.generation.logits_process import EtaLogitsWarper

from whipstaff.decoding.methods.eta_cutoff import EtaCutoff, EtaCutoffParams

METHOD = EtaCutoff()


@pytest.mark.parametrize("epsilon", [3e-4, 0.01, 0.1, 0.9])
def test_transformers_and_a_plain_computation(epsilon: float) -> None:
    batch = random_batch(METHOD, [EtaCutoffParams(epsilon=epsilon)] * 40)
    before = batch.rows.logits.clone()
    result = run(METHOD, batch)
    assert torch.equal(result, EtaLogitsWarper(epsilon)(torch.zeros(40, 1), before))
    assert torch.equal(result, torch.tensor([reference.rewrite(row, epsilon) for row in before.tolist()]))
