"""cut_rows_: what lies outside two bounds becomes -inf."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whipstaff import cuda_ext
from whipstaff.cuda_ext import reference

from .batches import DTYPES, PROPERTY, strided

pytestmark = pytest.mark.usefixtures("library")

INF = float("inf")


@PROPERTY
@given(st.data())
def test_any_cut_matches_the_reference(data: st.DataObject) -> None:
    num_rows, vocab = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 1200))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    logits = strided(num_rows, vocab, data.draw(st.sampled_from(DTYPES)))
    logits[torch.rand(logits.shape) < 0.1] = -INF
    bounds = [torch.randn(num_rows + 2), torch.randn(num_rows + 2)]
    for bound in bounds:
        bound[torch.rand(bound.shape) < 0.2] = data.draw(st.sampled_from([-INF, INF, math.nan]))
        rows = torch.arange(num_rows)
        bound[rows] = torch.where(torch.rand(num_rows) < 0.3, logits[rows, rows % vocab].float(), bound[rows])
    low, high = (data.draw(st.sampled_from([bound, None])) for bound in bounds)
    want, got = logits.clone(), logits.clone()
    reference.cut_rows_(want, low, high)
    cuda_ext.cut_rows_(got, low, high)
    assert torch.equal(got, want)


def test_bounds_themselves_stay() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0, 4.0, -INF], [1.0, 2.0, 3.0, 4.0, 5.0]])
    cuda_ext.cut_rows_(logits, torch.tensor([2.0, math.nan]), torch.tensor([3.0, 4.0]))
    assert logits.tolist() == [[-INF, 2.0, 3.0, -INF, -INF], [1.0, 2.0, 3.0, 4.0, -INF]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_bound_changes_nothing(dtype: torch.dtype) -> None:
    logits = strided(4, 777, dtype)
    before = logits.clone()
    cuda_ext.cut_rows_(logits)
    cuda_ext.cut_rows_(logits, torch.full((4,), -INF), torch.full((4,), INF))
    assert torch.equal(logits, before)


def test_what_lies_between_rows_is_left_alone() -> None:
    wide = torch.randn(50, 1003)
    before = wide.clone()
    cuda_ext.cut_rows_(wide[:, 1:1001], torch.full((50,), INF))
    assert torch.equal(wide[:, :1], before[:, :1]) and torch.equal(wide[:, 1001:], before[:, 1001:])
    assert torch.isneginf(wide[:, 1:1001]).all()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("low has 1 entries for 2 rows", {"low": torch.ones(1)}),
        ("high must be Float, not Double", {"high": torch.ones(2).double()}),
        ("high must have 1 dimension", {"high": torch.ones(2, 1)}),
        ("logits must be float32, bfloat16 or float16, not Double", {"logits": torch.zeros(2, 8).double()}),
        ("logits must be contiguous in its last dimension", {"logits": torch.zeros(8, 2).t()}),
    ],
)
def test_a_refusal_names_the_tensor(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.cut_rows_(**{"logits": torch.zeros(2, 8)} | changes)
