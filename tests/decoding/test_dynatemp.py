"""Dynamic temperature against a plain computation."""

import pytest
import torch
from decodings import random_batch, run
from reference import dynatemp as reference
from reference.plain import tempered

from whipstaff.decoding.methods.dynatemp import Dynatemp, DynatempParams

METHOD = Dynatemp()


@pytest.mark.parametrize("own", [(0.5, 1.0), (0.1, 3.0), (2.0, 0.5), (0.0, 1.0), (0.7, 0.0)])
def test_a_plain_computation(own: tuple[float, float]) -> None:
    """Row 2 asks for greedy decoding, row 3 has one token left, row 4 is flat."""
    batch = random_batch(METHOD, [DynatempParams(range=own[0], exponent=own[1])] * 6)
    assert batch.rows.temperature is not None
    batch.rows.temperature[2] = 0.0
    batch.rows.logits[3, 8:] = batch.rows.logits[3, :7] = -torch.inf
    batch.rows.logits[4, :] = 0.5
    pairs = zip(batch.rows.logits.tolist(), batch.rows.temperature.tolist(), strict=True)
    expected = [tempered(row, reference.temperature(row, temperature, *own)) for row, temperature in pairs]
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected), atol=1e-4, rtol=1e-4)


def test_a_flat_distribution_is_as_warm_as_it_gets() -> None:
    batch = random_batch(METHOD, [DynatempParams(range=0.3)])
    batch.rows.logits[:] = 0.0
    batch.rows.temperature = torch.tensor([0.7])
    run(METHOD, batch)
    assert batch.rows.facts["temperature"].tolist() == pytest.approx([1.0])


def test_the_ends_may_be_said_instead() -> None:
    """Of whatever temperature the request has, unless it is 0."""
    batch = random_batch(METHOD, [DynatempParams(low=0.4, high=1.6, exponent=2.0)] * 3)
    batch.rows.temperature = torch.tensor([1.0, 0.3, 0.0])
    rows = batch.rows.logits.tolist()
    expected = [reference.temperature(row, 1.0, 0.6, 2.0) for row in rows[:2]] + [0.0]
    run(METHOD, batch)
    assert batch.rows.facts["temperature"].tolist() == pytest.approx(expected, rel=1e-4)
