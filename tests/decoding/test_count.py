"""Tokens that a row allows."""

import torch

from whipstaff.decoding.count import num_allowed


def test_rows_are_counted_and_stay_as_they_are() -> None:
    logits = torch.randn(5, 3000)
    logits[1, ::3], logits[2], logits[3, 7] = -torch.inf, -torch.inf, 3e38
    before = logits.clone()
    assert num_allowed(logits).tolist() == [3000, 2000, 0, 3000, 3000]
    assert torch.equal(logits, before)


def test_no_rows() -> None:
    assert num_allowed(torch.zeros(0, 9)).shape == (0,)
