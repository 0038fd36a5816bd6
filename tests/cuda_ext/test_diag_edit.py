"""diag_edit_: scale and shift chosen rows in place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from whipstaff import cuda_ext
from whipstaff.cuda_ext import reference

from .batches import BATCHES, DTYPES, HIDDEN, INDEX_TYPES, POPULARITY, PROPERTY, slots, strided
from .tolerances import TOLERANCE

S = 5


def double(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def check_against_reference(x, mul, add, slot, gain=None, residual=None, renorm=False):
    """Runs both on copies: the edited stream within tolerance, tokens left alone equal bit for bit."""
    want = [double(t).clone() if t is not None else None for t in (x, residual)]
    got = [t.clone() if t is not None else None for t in (x, residual)]
    reference.diag_edit_(want[0], double(mul), double(add), slot, double(gain), want[1], renorm)
    cuda_ext.diag_edit_(got[0], mul, add, slot, gain, got[1], renorm)
    untouched = (slot[: len(x)] < 0) | (slot[: len(x)] >= S)
    for result, wanted, given_ in zip(got, want, (x, residual), strict=True):
        if result is not None:
            torch.testing.assert_close(result.double(), wanted, **TOLERANCE[x.dtype])
            assert torch.equal(result[untouched], given_[untouched])


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("num_tokens", BATCHES)
@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(popularity, num_tokens, hidden, dtype):
    slot = slots(popularity, num_tokens, S)
    check_against_reference(strided(num_tokens, hidden, dtype), strided(S, hidden), strided(S, hidden), slot)


TABLES = [(None, True), *((scales, with_add) for scales in (1, 7, 21, 1029) for with_add in (False, True))]


@pytest.mark.parametrize("renorm", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize(("scales", "with_add"), TABLES)
def test_every_combination_of_parts(scales, with_add, with_gain, with_residual, renorm):
    check_against_reference(
        strided(9, 1029, torch.bfloat16),
        strided(S, scales) if scales else None,
        strided(S, 1029) if with_add else None,
        slots("zipf", 9, S, torch.int32),
        torch.rand(12).round(decimals=1) if with_gain else None,
        strided(9, 1029, torch.bfloat16) if with_residual else None,
        renorm,
    )


@PROPERTY
@given(st.data())
def test_any_shape_matches_the_reference(data):
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    groups, width = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 130))
    num_tokens, hidden = data.draw(st.integers(0, 12)), groups * width
    dtype, index = data.draw(st.sampled_from(DTYPES)), data.draw(st.sampled_from(INDEX_TYPES))
    table = data.draw(st.sampled_from([torch.float32, dtype]))
    slot = data.draw(st.lists(st.integers(-3, S + 2), min_size=num_tokens, max_size=num_tokens))
    check_against_reference(
        strided(num_tokens, hidden, dtype),
        data.draw(st.sampled_from([strided(S, groups, table), strided(S, hidden, table)])),
        strided(S, hidden, table),
        torch.tensor(slot, dtype=index),
        data.draw(st.sampled_from([None, torch.rand(num_tokens)])),
        data.draw(st.sampled_from([None, strided(num_tokens, hidden, dtype)])),
        data.draw(st.booleans()),
    )


def test_hand_worked():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    residual = torch.tensor([[1.0, 0.0], [5.0, 5.0]])
    mul, add = torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0, 1.0]])
    cuda_ext.diag_edit_(x, mul, add, torch.tensor([0, -1]), torch.tensor([0.5, 1.0]), residual)
    assert x.tolist() == [[2 + 0.5 * (5 - 2), 2 + 0.5 * (2 - 2)], [3.0, 4.0]]
    assert residual.tolist() == [[0.0, 0.0], [5.0, 5.0]]


def test_renorm_keeps_the_length_and_a_row_edited_to_zero_stays_zero():
    x = torch.tensor([[3.0, 4.0], [3.0, 4.0]])
    mul, add = torch.tensor([[0.0, 2.0], [0.0, 0.0]]), torch.zeros(2, 2)
    cuda_ext.diag_edit_(x, mul, add, torch.tensor([0, 1]), renorm=True)
    assert x.tolist() == [[0.0, 5.0], [0.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gain_zero_changes_nothing(dtype):
    x, residual = strided(4, 33, dtype), strided(4, 33, dtype)
    before = x.clone(), residual.clone()
    cuda_ext.diag_edit_(x, strided(S, 33), strided(S, 33), torch.arange(4), torch.zeros(4), residual, renorm=True)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_kernel_equals_the_reference_bit_for_bit(dtype):
    x, mul, add, slot = strided(50, 1029, dtype), strided(S, 1029), strided(S, 1029), slots("zipf", 50, S)
    want = x.clone()
    reference.diag_edit_(want, mul, add, slot)
    cuda_ext.diag_edit_(x, mul, add, slot)
    assert torch.equal(x, want)


@pytest.mark.parametrize("special", [float("inf"), float("nan"), 1e30, 7e4, 1e-7])
@pytest.mark.parametrize("dtype", DTYPES)
def test_overflow_and_special_values_round_like_torch(dtype, special):
    x = torch.tensor([[special, -special, 1.0, 0.1]]).to(dtype)
    want = (x.float() * 3.0 + 1e-8).to(dtype)
    cuda_ext.diag_edit_(x, torch.full((1, 4), 3.0), torch.full((1, 4), 1e-8), torch.tensor([0]))
    assert torch.equal(x.nan_to_num(123.0), want.nan_to_num(123.0))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_empty_batches(shape):
    tables = torch.ones(S, shape[1])
    cuda_ext.diag_edit_(torch.ones(shape), None, tables, torch.zeros(4, dtype=torch.int64), renorm=True)


def test_slots_outside_the_table_are_harmless():
    x = torch.ones(4, 8)
    cuda_ext.diag_edit_(x, torch.zeros(S, 8), None, torch.tensor([S, 2**40, -1, -(2**40)]))
    assert torch.equal(x, torch.ones(4, 8))


def step(x: Tensor, mul: Tensor, slot: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    x, residual = x * 2, residual + 1
    cuda_ext.diag_edit_(x, mul, mul, slot, None, residual)
    return x + 1, residual


def test_under_torch_compile():
    arguments = torch.randn(6, 32), torch.randn(S, 32), torch.tensor([0, -1, 2, -1, 4, 0]), torch.randn(6, 32)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*arguments), step(*arguments))


@pytest.mark.parametrize("with_residual", [False, True])
def test_registration(with_residual):
    residual = torch.randn(6, 32) if with_residual else None
    arguments = (torch.randn(6, 32), torch.randn(S, 32), None, torch.arange(6), torch.ones(6), residual, True)
    torch.library.opcheck(torch.ops.whipstaff.diag_edit_.default, arguments)


X, TABLE, SLOT = torch.ones(4, 8), torch.ones(S, 8), torch.zeros(4, dtype=torch.int64)
REFUSED = {
    "needs mul, add or both": (X, None, None, SLOT),
    "x must be float32, bfloat16 or float16, not Double": (X.double(), TABLE, TABLE, SLOT),
    r"x must have 2 dimensions, not shape \[8\]": (X[0], TABLE, TABLE, SLOT),
    "x must be contiguous in its last dimension, not stride 2": (torch.ones(4, 16)[:, ::2], TABLE, TABLE, SLOT),
    "mul has 3 scales per row, which does not divide x's 8 columns": (X, torch.ones(S, 3), None, SLOT),
    "add has 3 columns, x has 8": (X, None, torch.ones(S, 3), SLOT),
    "mul has 5 rows, add has 4": (X, TABLE, TABLE[1:], SLOT),
    "mul must be float32 or of x's type Float, not Half": (X, TABLE.half(), None, SLOT),
    "add must be Float, not Half": (X.half(), TABLE, TABLE.half(), SLOT),
    "slot must be int32 or int64, not Short": (X, TABLE, None, SLOT.short()),
    "slot has 3 entries for 4 rows": (X, TABLE, None, SLOT[1:]),
    r"slot must have 1 dimension, not shape \[4, 1\]": (X, TABLE, None, SLOT[:, None]),
    "gain has 3 entries for 4 rows": (X, TABLE, None, SLOT, torch.ones(3)),
    "gain must be Float, not Double": (X, TABLE, None, SLOT, torch.ones(4).double()),
    r"residual has shape \[3, 8\], x has \[4, 8\]": (X, TABLE, None, SLOT, None, X[1:]),
    "residual must be Float, not Half": (X, TABLE, None, SLOT, None, X.half()),
    "a tensor is on meta, x on cpu": (X, TABLE, TABLE.to("meta"), SLOT),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_tensor(message):
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.diag_edit_(*REFUSED[message])
