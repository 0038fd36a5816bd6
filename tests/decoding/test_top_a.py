"""Top-a against a plain computation."""

import pytest
import torch
from decodings import random_batch, run
from reference import top_a as reference

from whipstaff.decoding.methods.top_a import TopA, TopAParams

METHOD = TopA()


@pytest.mark.parametrize("a", [0.0, 0.05, 0.2, 1.0])
def test_a_plain_computation(a: float) -> None:
    batch = random_batch(METHOD, [TopAParams(a=a)] * 20)
    expected = torch.tensor([reference.rewrite(row, a) for row in batch.rows.logits.tolist()])
    assert torch.equal(run(METHOD, batch), expected)


def test_a_worked_case() -> None:
    """The best has one half: what has less than 0.2 * 0.25 = 0.05 goes."""
    batch = random_batch(METHOD, [TopAParams(a=0.2)])
    batch.rows.logits[:] = torch.tensor([0.5, 0.3, 0.06, 0.04, 0.1] + [0.0] * 35).log()
    assert (run(METHOD, batch)[0] > -torch.inf).nonzero().flatten().tolist() == [0, 1, 2, 4]
