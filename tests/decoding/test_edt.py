"""EDT against a float64 computation from the formula, and a plain one."""

import pytest
import torch
from decodings import golden, random_batch, run
from reference import edt as reference
from reference.plain import tempered

from whipstaff.decoding.methods.edt import Edt, EdtParams
from whipstaff.decoding.rows import Rows

SAID, TENSORS = golden("temperature_family")
METHOD = Edt()


@pytest.mark.parametrize("index", [0, 1])
def test_temperatures_are_the_golden_ones(index: int) -> None:
    """The last row is certain: its temperature is 0, and the best token alone stays."""
    case, logits = SAID["cases"][index], TENSORS["logits"].float()
    rows = Rows(logits.clone(), [1] * 13, [0] * 13)
    result = METHOD.rewrite(rows, [EdtParams(t0=case["T0"], theta=case["theta"], n=case["N"])] * 13)
    torch.testing.assert_close(rows.facts["temperature"], TENSORS[case["id"]].float(), atol=1e-4, rtol=0)
    assert (result[12] > -torch.inf).nonzero().flatten().tolist() == [int(logits[12].argmax())]


@pytest.mark.parametrize("own", [(0.6, 1.0, 0.8), (1.3, 0.0, 0.8), (1.0, 0.5, 1.0), (0.0, 1.0, 0.5)])
def test_a_plain_computation(own: tuple[float, float, float]) -> None:
    batch = random_batch(METHOD, [EdtParams(t0=own[0], theta=own[1], n=own[2])] * 6)
    batch.rows.logits[3, 8:] = batch.rows.logits[3, :7] = -torch.inf  # a certain row
    expected = [tempered(row, reference.temperature(row, *own)) for row in batch.rows.logits.tolist()]
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected), atol=1e-4, rtol=1e-4)
