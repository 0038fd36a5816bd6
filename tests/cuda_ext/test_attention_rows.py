"""attention_rows: what chosen queries attend to, from keys that lie in pages."""

from itertools import permutations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from whipstaff import cuda_ext
from whipstaff.cuda_ext import reference

from .batches import DTYPES, PROPERTY
from .tolerances import TOLERANCE

pytestmark = pytest.mark.usefixtures("library")


def paged(
    context: list[int],
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    dtype: torch.dtype,
    order_in_page: tuple[int, ...] = (1, 0, 2),
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys scattered over shuffled pages, the block table that finds them, and each row's context length.

    Args:
        order_in_page: of tokens, heads and elements, in memory.
    """
    per_row = [-(-max(length, 0) // block_size) for length in context]
    num_blocks, max_blocks = sum(per_row) + 3, max(per_row, default=0) + 2
    order = torch.randperm(num_blocks)[: sum(per_row)].int().split(per_row) if context else []
    table = torch.full((len(context) + 1, max_blocks), -1, dtype=torch.int32)
    for row, blocks in enumerate(order):
        table[row, : len(blocks)] = blocks
    sizes = block_size, num_kv_heads, head_size + 2
    stored = torch.randn(num_blocks, *(sizes[axis] for axis in order_in_page)).to(dtype)
    keys = stored.permute(0, *(1 + order_in_page.index(axis) for axis in range(3)))[..., 1:-1]
    return keys, table, torch.tensor([*context, 0], dtype=torch.int32)


def check_against_reference(
    query: Tensor, keys: Tensor, table: Tensor, context: Tensor, max_context: int, head_max: bool
) -> None:
    want = reference.attention_rows(query.double(), keys.double(), table, context, 0.3, max_context, head_max)
    got = cuda_ext.attention_rows(query, keys, table, context, 0.3, max_context, head_max)
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("head_max", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [64, 33])
def test_matches_the_reference(head_size: int, dtype: torch.dtype, head_max: bool, order: tuple[int, ...]) -> None:
    context = [1, 31, 32, 33, 700]
    keys, table, lengths = paged(context, 2, head_size, 32, dtype, order)
    query = torch.randn(5, 6, head_size).to(dtype)
    check_against_reference(query, keys, table, lengths, 720, head_max)


@PROPERTY
@given(st.data())
def test_any_shape_matches_the_reference(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    context = data.draw(st.lists(st.integers(-1, 90), max_size=5))
    num_kv_heads, group, head_size = (data.draw(st.integers(1, most)) for most in (3, 3, 70))
    dtype = data.draw(st.sampled_from(DTYPES))
    order = tuple(data.draw(st.permutations(range(3))))
    keys, table, lengths = paged(context, num_kv_heads, head_size, data.draw(st.integers(1, 20)), dtype, order)
    if data.draw(st.booleans()) and context:
        table[0, 0] = data.draw(st.sampled_from([-7, 10**6]))  # a page that is not there
    query = torch.randn(len(context), num_kv_heads * group, head_size).to(dtype)
    check_against_reference(query, keys, table, lengths, data.draw(st.integers(0, 100)), data.draw(st.booleans()))


def test_plain_keys_are_one_page_per_row_and_agree_with_softmax() -> None:
    query, keys = torch.randn(3, 4, 16), torch.randn(3, 50, 4, 16)
    table, context = torch.arange(3, dtype=torch.int32)[:, None], torch.full((3,), 50, dtype=torch.int32)
    got = cuda_ext.attention_rows(query, keys, table, context, 0.25, 50)
    want = (torch.einsum("rhd,rjhd->rhj", query, keys) * 0.25).softmax(2)
    torch.testing.assert_close(got, want)
    assert torch.equal(cuda_ext.attention_rows(query, keys, table, context, 0.25, 50, head_max=True), got.amax(1))


QUERY, KEYS = torch.zeros(2, 4, 8), torch.zeros(3, 16, 2, 8)
TABLE, CONTEXT = torch.zeros(2, 1, dtype=torch.int32), torch.ones(2, dtype=torch.int32)
REFUSED: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {
    r"query must have 3 dimensions, not shape \[4, 8\]": (QUERY[0], KEYS, TABLE, CONTEXT),
    "keys must be Float, not Half": (QUERY, KEYS.half(), TABLE, CONTEXT),
    "keys have head size 7, query has 8": (QUERY, KEYS[..., 1:], TABLE, CONTEXT),
    "keys have 3 heads, which do not divide query's 4": (QUERY, torch.zeros(3, 16, 3, 8), TABLE, CONTEXT),
    "block_table has 1 entries for 2 rows": (QUERY, KEYS, TABLE[1:], CONTEXT),
    "block_table must be Int, not Long": (QUERY, KEYS, TABLE.long(), CONTEXT),
    "context has 1 entries for 2 rows": (QUERY, KEYS, TABLE, CONTEXT[1:]),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_tensor(message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.attention_rows(*REFUSED[message], 1.0, 16)
