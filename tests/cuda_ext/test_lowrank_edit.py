"""lowrank_edit_: read the stream along a few directions, change what was read, write it back."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from whipstaff import cuda_ext
from whipstaff.cuda_ext import Phi, reference

from .batches import BATCHES, DTYPES, INDEX_TYPES, POPULARITY, PROPERTY, slots, strided
from .tolerances import TOLERANCE

S = 5
SINGLES = [kind for kind in Phi if kind < Phi.ANGLE]
PAIRS = [Phi.ANGLE, Phi.ROTATE]


def directions(rank: int, hidden: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(S, rank, hidden) of length about one, rows apart in memory."""
    return torch.stack([strided(rank, hidden) for _ in range(S)]).div(hidden**0.5).to(dtype)


def phis(rank: int) -> Tensor:
    """(S, rank) every kind, pairs at even directions."""
    kinds = [[kind, kind] for kind in PAIRS] + [[a, b] for a, b in zip(SINGLES, reversed(SINGLES), strict=True)]
    chosen = [kinds[i] for i in torch.randint(0, len(kinds), (S * (rank + 1) // 2 + S,)).tolist()]
    return torch.tensor(chosen).flatten()[: S * (rank + rank % 2)].view(S, -1)[:, :rank].int().contiguous()


def away_from_thresholds(x, read, phi, bias, args, slot, residual):
    """Moves thresholds that a reading nearly meets, where rounding decides: both answers would be right."""
    stream = x.double() if residual is None else x.double() + residual.double()
    for t, s in enumerate(slot[: len(x)].tolist()):
        if 0 <= s < S:
            z = read[s].double() @ stream[t] + (0 if bias is None else bias[s].double())
            near = lambda threshold, z=z: (z - threshold).abs() < 0.02  # noqa: E731
            args[s, :, 0] += torch.where((phi[s] == Phi.GATED) & near(args[s, :, 0]), 0.1, 0)
            args[s, :, 1] += torch.where((phi[s] == Phi.ANGLE) & near(args[s, :, 1]), 0.1, 0)


def check_against_reference(x, read, write, phi, args, slot, bias=None, gain=None, residual=None):
    want, got = x.double().clone(), x.clone()
    doubles = [None if t is None else t.double() for t in (bias, gain, residual)]
    reference.lowrank_edit_(want, read.double(), write.double(), phi, args, slot, *doubles)
    cuda_ext.lowrank_edit_(got, read, write, phi, args, slot, bias, gain, residual)
    torch.testing.assert_close(got.double(), want, **TOLERANCE[x.dtype])
    untouched = (slot[: len(x)] < 0) | (slot[: len(x)] >= S)
    assert torch.equal(got[untouched], x[untouched])


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("num_tokens", BATCHES)
@pytest.mark.parametrize(("rank", "hidden"), [(1, 4096), (7, 133), (64, 64)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_the_reference(popularity, num_tokens, rank, hidden, dtype):
    slot = slots(popularity, num_tokens, S)
    phi = torch.full((S, rank), Phi.AFFINE, dtype=torch.int32)
    args = torch.randn(S, rank, 4)
    check_against_reference(
        strided(num_tokens, hidden, dtype), directions(rank, hidden), directions(rank, hidden), phi, args, slot
    )


@PROPERTY
@given(st.data())
def test_any_edit_matches_the_reference(data):
    num_tokens, hidden, rank = (
        data.draw(st.integers(0, 9)),
        data.draw(st.integers(1, 700)),
        data.draw(st.integers(1, 64)),
    )
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    dtype = data.draw(st.sampled_from(DTYPES))
    table = data.draw(st.sampled_from([torch.float32, dtype]))
    x, read, write = (
        strided(num_tokens, hidden, dtype),
        directions(rank, hidden, table),
        directions(rank, hidden, table),
    )
    phi, args = phis(rank), torch.randn(S, rank, 4)
    slot = torch.randint(-2, S + 2, (num_tokens + 2,)).to(data.draw(st.sampled_from(INDEX_TYPES)))
    bias = data.draw(st.sampled_from([None, torch.randn(S, rank)]))
    residual = data.draw(st.sampled_from([None, strided(num_tokens, hidden, dtype)]))
    away_from_thresholds(x, read, phi, bias, args, slot, residual)
    gain = data.draw(st.sampled_from([None, torch.rand(num_tokens).round(decimals=1)]))
    check_against_reference(x, read, write, phi, args, slot, bias, gain, residual)


def edited(x: list[float], kind: Phi, args: list[float], rank: int = 1) -> list[float]:
    """One token of two columns, read and written along the axes."""
    row = torch.tensor([x])
    axes, kinds = torch.eye(2)[None, :rank].contiguous(), torch.full((1, rank), kind, dtype=torch.int32)
    table = torch.tensor([args + [0.0] * (4 - len(args))]).repeat(1, rank, 1).view(1, rank, 4)
    cuda_ext.lowrank_edit_(row, axes, axes, kinds, table, torch.tensor([0]))
    return row[0].tolist()


def test_hand_worked_readings():
    assert edited([3.0, 5.0], Phi.OFF, [9.0]) == [3.0, 5.0]
    assert edited([3.0, 5.0], Phi.AFFINE, [-1.0, 0.5]) == [0.5, 5.0]
    assert edited([3.0, 5.0], Phi.SET, [-6.0]) == [-6.0, 5.0]
    assert edited([3.0, 5.0], Phi.CLAMP, [-1.0, 2.0]) == [2.0, 5.0]
    assert edited([-3.0, 5.0], Phi.CLAMP, [-1.0, 2.0]) == [-1.0, 5.0]
    assert edited([3.0, 5.0], Phi.GATED, [2.0, -1.0, 10.0, 7.0]) == [10.0, 5.0]
    assert edited([2.0, 5.0], Phi.GATED, [2.0, -1.0, 10.0, 7.0]) == [9.0, 5.0]
    assert edited([3.0, 5.0], Phi.TOP_K, [2.0, -1.0, 10.0, 7.0]) == [10.0, 5.0]  # as GATED: nothing is compared here
    assert edited([-3.0, 5.0], Phi.SIGN, [2.0]) == [-5.0, 5.0]
    assert edited([0.5, 5.0], Phi.TANH, [2.0])[0] == pytest.approx(0.5 + 2 * math.tanh(0.5))
    assert edited([0.5, 5.0], Phi.SILU, [2.0])[0] == pytest.approx(0.5 + 2 * 0.5 / (1 + math.exp(-0.5)))


def test_hand_worked_pairs():
    assert edited([3.0, 4.0], Phi.ANGLE, [math.pi / 2, -math.inf], rank=2) == pytest.approx([0.0, 5.0], abs=1e-6)
    assert edited([3.0, 4.0], Phi.ANGLE, [math.pi / 2, 3.5], rank=2) == [3.0, 4.0]
    assert edited([3.0, 4.0], Phi.ROTATE, [math.pi / 2], rank=2) == pytest.approx([-4.0, 3.0], abs=1e-6)


def test_ablating_a_direction_removes_it():
    x, direction = torch.randn(6, 512), torch.nn.functional.normalize(torch.randn(512), dim=0)
    table = direction[None, None]
    phi, args = torch.full((1, 1), Phi.SET, dtype=torch.int32), torch.zeros(1, 1, 4)
    cuda_ext.lowrank_edit_(x, table, table, phi, args, torch.zeros(6, dtype=torch.int32))
    torch.testing.assert_close(x @ direction, torch.zeros(6), rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gain_zero_changes_nothing(dtype):
    x = strided(4, 33, dtype)
    before = x.clone()
    tables = directions(3, 33), directions(3, 33), phis(3), torch.randn(S, 3, 4)
    cuda_ext.lowrank_edit_(x, *tables, torch.arange(4), gain=torch.zeros(4))
    assert torch.equal(x, before)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
def test_empty_batches(shape):
    tables = directions(2, shape[1]) if shape[1] else torch.ones(S, 2, 0)
    slot = torch.zeros(4, dtype=torch.int64)
    cuda_ext.lowrank_edit_(torch.ones(shape), tables, tables, phis(2), torch.ones(S, 2, 4), slot)


def test_under_torch_compile():
    def step(x, table, phi, args, slot):
        x = x * 2
        cuda_ext.lowrank_edit_(x, table, table, phi, args, slot)
        return x + 1

    arguments = torch.randn(6, 32), directions(3, 32), phis(3), torch.randn(S, 3, 4), torch.tensor([0, -1, 2, -1, 4, 0])
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*arguments), step(*arguments))


def test_registration():
    tables = directions(3, 32).contiguous(), directions(3, 32).contiguous(), phis(3), torch.randn(S, 3, 4)
    arguments = (torch.randn(6, 32), *tables, torch.arange(6), torch.randn(S, 3), torch.ones(6), torch.randn(6, 32))
    torch.library.opcheck(torch.ops.whipstaff.lowrank_edit_.default, arguments)


X, TABLE, SLOT = torch.ones(4, 8), torch.ones(S, 2, 8), torch.zeros(4, dtype=torch.int64)
PHI, ARGS = torch.ones(S, 2, dtype=torch.int32), torch.ones(S, 2, 4)
REFUSED = {
    r"read must have 3 dimensions, not shape \[2, 8\]": (X, TABLE[0], TABLE, PHI, ARGS, SLOT),
    "write has 7 columns, x has 8": (X, TABLE, TABLE[:, :, 1:], PHI, ARGS, SLOT),
    r"read has shape \[5, 2, 8\], write has \[5, 1, 8\]": (X, TABLE, TABLE[:, 1:], PHI, ARGS, SLOT),
    "read has rank 65, at most 64 is supported": (X, torch.ones(S, 65, 8), torch.ones(S, 65, 8), PHI, ARGS, SLOT),
    "read must be float32 or of x's type Float, not Half": (X, TABLE.half(), TABLE.half(), PHI, ARGS, SLOT),
    "write must be Float, not Half": (X.half(), TABLE, TABLE.half(), PHI, ARGS, SLOT),
    "phi must be Int, not Long": (X, TABLE, TABLE, PHI.long(), ARGS, SLOT),
    r"phi has shape \[4, 2\] for 5 slots of 2 directions": (X, TABLE, TABLE, PHI[1:], ARGS, SLOT),
    r"phi_args has shape \[5, 2, 3\] for 5 slots of 2 directions": (X, TABLE, TABLE, PHI, ARGS[:, :, 1:], SLOT),
    "slot has 3 entries for 4 rows": (X, TABLE, TABLE, PHI, ARGS, SLOT[1:]),
    r"bias has shape \[5, 1\] for 5 slots": (X, TABLE, TABLE, PHI, ARGS, SLOT, torch.ones(S, 1)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_tensor(message):
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.lowrank_edit_(*REFUSED[message])
