"""typical_rows_: all but a row's locally typical set becomes -inf."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from whipstaff import cuda_ext
from whipstaff.cuda_ext import reference

from .batches import DTYPES, PROPERTY, strided

pytestmark = pytest.mark.usefixtures("library")

INF = float("inf")
NEAR = 2e-5  # nats, or of all mass: what rounding may do


def apart(num_rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows on a grid of 1/16 nat, some tokens banned: equal ones are many, others lie further apart than rounding."""
    logits = strided(num_rows, vocab)
    logits.copy_((logits * 40).round() / 16)
    logits[torch.rand(logits.shape) < 0.1] = -INF
    logits[:, vocab // 2] = 0
    return _as(logits, dtype)


def _as(logits: Tensor, dtype: torch.dtype) -> Tensor:
    other = strided(len(logits), logits.shape[1], dtype)
    return other.copy_(logits.clamp(max=torch.finfo(dtype).max))


def check(before: Tensor, after: Tensor, mass: Tensor) -> None:
    """Every row against the definition, in float64."""
    log_p = before.double().log_softmax(1)
    p = log_p.exp()
    deviation = (log_p - torch.where(p > 0, p * log_p, 0).sum(1, keepdim=True)).abs()
    for row, share in enumerate(mass[: len(before)].tolist()):
        kept = after[row] > -INF
        assert torch.equal(after[row, kept], before[row, kept])
        if share >= 1:
            assert torch.equal(after[row], before[row])
            continue
        limit = deviation[row, kept].max()
        assert kept[deviation[row] < limit - NEAR].all()
        assert p[row, kept].sum() >= min(share, 1) - NEAR
        assert p[row, deviation[row] < limit - NEAR].sum() <= share + NEAR


@PROPERTY
@given(st.data())
def test_any_rows_are_cut_as_defined(data: st.DataObject) -> None:
    num_rows, vocab = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 3000))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    logits = strided(num_rows, vocab) * data.draw(st.sampled_from([0.0, 0.001, 0.1, 1.0, 3.0, 60.0, 1e30]))
    logits[torch.rand(logits.shape) < data.draw(st.sampled_from([0.0, 0.3, 0.99]))] = -INF
    logits[:, vocab // 2] = 0
    logits = _as(logits, data.draw(st.sampled_from(DTYPES)))
    mass = torch.rand(num_rows + 2) * 1.1
    if data.draw(st.booleans()):
        mass = mass**20
    for implementation in (cuda_ext, reference):
        result = logits.clone()
        implementation.typical_rows_(result, mass)
        check(logits, result, mass)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 64, 1111, 32000])
@pytest.mark.parametrize("num_rows", [0, 1, 7, 33])
def test_equals_the_reference(num_rows: int, vocab: int, dtype: torch.dtype) -> None:
    logits, mass = apart(num_rows, vocab, dtype), torch.rand(num_rows + 3) * 1.1
    want, got = logits.clone(), logits.clone()
    reference.typical_rows_(want, mass)
    cuda_ext.typical_rows_(got, mass)
    assert torch.equal(got, want)


def test_hand_worked() -> None:
    """Surprises of 1, 2, 3 and 3 bits around an entropy of 1.75: the second token is the most typical."""
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125, 0.0]).log()
    for mass, kept in ((0.2, [1]), (0.25, [1]), (0.3, [0, 1]), (0.75, [0, 1]), (0.8, [0, 1, 2, 3])):
        result = logits[None].clone()
        cuda_ext.typical_rows_(result, torch.tensor([mass - 1e-6]))
        assert (result[0] > -INF).nonzero().flatten().tolist() == kept, mass


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_mass_leaves_rows_alone(dtype: torch.dtype) -> None:
    logits = strided(4, 777, dtype).mul_(60)  # most have next to no mass
    logits[0], logits[1, 3:9], logits[2, 5] = math.nan, -INF, INF
    result = logits.clone()
    cuda_ext.typical_rows_(result, torch.tensor([1.0, 1.0, 7.0, INF]))
    assert torch.equal(result.view(torch.uint8), logits.contiguous().view(torch.uint8))


@pytest.mark.parametrize("mass", [0.0, -1.0, 1e-30, 1e-13, 0.5, 1 - 2**-24])
def test_a_token_stays(mass: float) -> None:
    rows = torch.full((5, 4000), -INF)
    rows[0, 17] = -1e30  # the only one
    rows[1] = 3.0  # all equal
    rows[2, ::2], rows[2, 3] = -3e38, 3e38
    rows[3] = torch.linspace(-80, 80, 4000)
    cuda_ext.typical_rows_(rows, torch.full((5,), mass))
    kept = (rows > -INF).sum(1).tolist()
    assert kept[:3] == [1, 4000, 1] and kept[3] >= 1
    assert kept[4] == 0  # none was left before


def test_what_has_no_mass_is_not_needed() -> None:
    """However the masses of n equal tokens round, the rest adds nothing to them."""
    num = torch.arange(1, 300)
    rows = torch.where(torch.arange(400) < num[:, None], 0.0, -60.0)
    cuda_ext.typical_rows_(rows, torch.full((len(num),), 1 - 2**-24))
    assert torch.equal((rows > -INF).sum(1), num)


def test_rows_that_are_no_distribution_harm_nobody() -> None:
    rows = torch.randn(3, 2000)
    rows[0], rows[1, 7], rows[1, 9] = math.nan, math.nan, INF
    alone = rows[2:].clone()
    cuda_ext.typical_rows_(rows, torch.full((3,), 0.5))
    cuda_ext.typical_rows_(alone, torch.full((1,), 0.5))
    assert torch.equal(rows[2:], alone)


def test_what_lies_between_rows_is_left_alone() -> None:
    wide = torch.randn(5, 1003)
    before = wide.clone()
    cuda_ext.typical_rows_(wide[:, 1:1001], torch.full((5,), 0.3))
    assert torch.equal(wide[:, :1], before[:, :1]) and torch.equal(wide[:, 1001:], before[:, 1001:])
    assert torch.isneginf(wide[:, 1:1001]).any(1).all()


def test_threads_do_not_change_a_bit() -> None:
    logits, mass, threads = torch.randn(33, 40000), torch.rand(33), torch.get_num_threads()
    results = []
    try:
        for num in (1, 2, 5):
            torch.set_num_threads(num)
            results.append(logits.clone())
            cuda_ext.typical_rows_(results[-1], mass)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


FINE = {"logits": torch.zeros(2, 8), "mass": torch.ones(2)}


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("mass has 1 entries for 2 rows", {"mass": torch.ones(1)}),
        ("mass must be Float, not Double", {"mass": torch.ones(2).double()}),
        ("mass must have 1 dimension", {"mass": torch.ones(2, 1)}),
        ("logits must be float32, bfloat16 or float16, not Double", {"logits": torch.zeros(2, 8).double()}),
        ("logits must have 2 dimensions", {"logits": torch.zeros(8)}),
        ("logits must be contiguous in its last dimension", {"logits": torch.zeros(8, 2).t()}),
    ],
)
def test_a_refusal_names_the_tensor(message: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.typical_rows_(**FINE | changes)
