"""Exclude top choices against a plain computation."""

import pytest
import torch
from decodings import random_batch, run
from reference import xtc as reference

from whipstaff.decoding.methods.xtc import Xtc, XtcParams

METHOD = Xtc()


@pytest.mark.parametrize("own", [(0.5, 0.1), (1.0, 0.02), (1.0, 0.4), (1.0, 0.6), (0.0, 0.1), (1.0, 0.0)])
def test_a_plain_computation(own: tuple[float, float]) -> None:
    batch = random_batch(METHOD, [XtcParams(probability=own[0], threshold=own[1])] * 30)
    assert batch.rows.random is not None
    pairs = zip(batch.rows.logits.tolist(), batch.rows.random.tolist(), strict=True)
    if own[1] == 0:  # every token is likely: the least likely of those that are not banned stays
        expected = [[x if x == min(y for y in row if y > -torch.inf) else -torch.inf for x in row] for row, _ in pairs]
    else:
        expected = [reference.rewrite(row, *own, uniform) for row, uniform in pairs]
    assert torch.equal(run(METHOD, batch), torch.tensor(expected))


def test_of_the_likely_the_least_likely_stays() -> None:
    batch = random_batch(METHOD, [XtcParams(probability=0.5, threshold=0.1)] * 2)
    batch.rows.logits[:] = torch.tensor([0.4, 0.3, 0.15, 0.09, 0.06] + [0.0] * 35).log()
    batch.rows.random = torch.tensor([0.49, 0.5])
    kept = [row.nonzero().flatten().tolist() for row in run(METHOD, batch) > -torch.inf]
    assert kept == [[2, 3, 4], [0, 1, 2, 3, 4]]
