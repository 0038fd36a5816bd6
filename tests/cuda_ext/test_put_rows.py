"""put_rows_: rows of a table take the place of chosen rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from whipstaff import cuda_ext
from whipstaff.cuda_ext import reference

from .batches import BATCHES, DTYPES, HIDDEN, POPULARITY, PROPERTY, slots, strided

pytestmark = pytest.mark.usefixtures("library")

NUM_ROWS = 5


def check_against_a_loop(x: Tensor, rows: Tensor, index: Tensor) -> None:
    """Compiled and reference alike: what is put and what is left alone, both bit for bit."""
    want = [rows[i] if 0 <= i < len(rows) else row for row, i in zip(x, index.tolist(), strict=False)]
    for put in (cuda_ext.put_rows_, reference.put_rows_):
        got = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)
        put(got, rows, index)
        assert torch.equal(got, torch.stack(want) if want else x)


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("num_tokens", BATCHES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_put_where_the_index_says(popularity: str, num_tokens: int, hidden: int, dtype: torch.dtype) -> None:
    index = slots(popularity, num_tokens, NUM_ROWS, torch.int32)
    check_against_a_loop(strided(num_tokens, hidden, dtype), strided(NUM_ROWS, hidden, dtype), index)


@PROPERTY
@given(st.data())
def test_any_rows(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    num_tokens, width = data.draw(st.integers(0, 12)), data.draw(st.integers(0, 130))
    dtype, num_rows = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(0, NUM_ROWS))
    index = torch.randint(-2, num_rows + 2, (num_tokens + 1,), dtype=torch.int32)
    check_against_a_loop(strided(num_tokens, width, dtype), strided(num_rows, width, dtype), index)


def test_what_was_there_does_not_matter() -> None:
    x = torch.tensor([[float("nan"), float("inf")], [float("nan"), 1.0]])
    cuda_ext.put_rows_(x, torch.tensor([[3.0, -0.0]]), torch.tensor([0, -1], dtype=torch.int32))
    assert x[0].tolist() == [3.0, 0.0]
    assert x[0, 1].signbit()
    assert x[1].isnan().tolist() == [True, False]


def test_an_index_outside_the_rows_is_harmless() -> None:
    x = torch.ones(4, 8)
    cuda_ext.put_rows_(x, torch.zeros(5, 8), torch.tensor([5, 2**31 - 1, -1, -(2**31)], dtype=torch.int32))
    assert torch.equal(x, torch.ones(4, 8))


X, ROWS, INDEX = torch.ones(4, 8), torch.ones(5, 8), torch.zeros(4, dtype=torch.int32)
REFUSED = {
    "x must be float32, bfloat16 or float16, not Double": (X.double(), ROWS, INDEX),
    r"x must have 2 dimensions, not shape \[8\]": (X[0], ROWS, INDEX),
    "x must be contiguous in its last dimension, not stride 2": (torch.ones(4, 16)[:, ::2], ROWS, INDEX),
    "rows has 3 columns, x has 8": (X, ROWS[:, :3], INDEX),
    "rows must be Float, not Half": (X, ROWS.half(), INDEX),
    "index must be Int, not Long": (X, ROWS, INDEX.long()),
    "index has 3 entries for 4 rows": (X, ROWS, INDEX[1:]),
    r"index must have 1 dimension, not shape \[4, 1\]": (X, ROWS, INDEX[:, None]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_tensor(message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.put_rows_(*REFUSED[message])
