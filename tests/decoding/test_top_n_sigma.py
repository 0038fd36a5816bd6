"""Top n sigma against a float64 computation, and a plain one."""

import pytest
import torch
from decodings import golden, random_batch, run
from reference import top_n_sigma as reference

from whipstaff.decoding.methods.top_n_sigma import TopNSigma, TopNSigmaParams
from whipstaff.decoding.rows import Rows

SAID, TENSORS = golden("temperature_family")
METHOD = TopNSigma()


@pytest.mark.parametrize("case", [c for c in SAID["cases"] if "nsigma" in c["id"]], ids=lambda case: case["id"])
def test_tokens_are_the_golden_ones(case: dict) -> None:  # type: ignore[type-arg]
    rows = Rows(TENSORS["logits"].float(), [1] * 13, [0] * 13)
    result = METHOD.rewrite(rows, [TopNSigmaParams(n=case["n"])] * 13)
    assert torch.equal(result > -torch.inf, TENSORS[case["id"]])


@pytest.mark.parametrize("n", [0.2, 1.0, 3.0, 0.0, -1.0])
def test_a_plain_computation(n: float) -> None:
    batch = random_batch(METHOD, [TopNSigmaParams(n=n)] * 6)
    expected = torch.tensor([reference.rewrite(row, n) for row in batch.rows.logits.tolist()])
    assert torch.equal(run(METHOD, batch), expected)
