"""Doses are what they are said to be: the root mean square of the change to rows of one length and random direction."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import ops as reference
from torch import Tensor

from whipstaff.cuda_ext import Phi
from whipstaff.steering.dose import Dose, dose, largest
from whipstaff.steering.method import HookPoint
from whipstaff.steering.ops import PER_TOKEN_NORMS, Cross, Diagonal, Directions, EditOp, Replacement, TopK, directions

WIDTH, LENGTH = 48, 7.0


def rows(num: int, length: float = LENGTH) -> Tensor:
    """(num, WIDTH) float64 in random directions."""
    found = torch.randn(num, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return length * found / found.norm(dim=1, keepdim=True)


def measured(op: EditOp, num: int = 700, length: float = LENGTH) -> float:
    """The relative dose by trying it out, with the reference's own edits."""
    changes = [(reference.edited(row, [op]) - row).square().sum() for row in rows(num, length)]
    return math.sqrt(float(torch.stack(changes).mean())) / length


def numbers(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def orthonormal(num: int) -> Tensor:
    return torch.linalg.qr(numbers(WIDTH, num, seed=5)).Q.T.contiguous()


EXACT: dict[str, EditOp] = {
    "add": Diagonal(None, numbers(WIDTH)),
    "scale": Diagonal(1 + numbers(WIDTH, seed=1, scale=0.5)),
    "add and scale": Diagonal(1 + numbers(WIDTH, seed=1, scale=0.5), numbers(WIDTH)),
    "cross": Cross(numbers(WIDTH, seed=2), numbers(WIDTH, seed=3), 4),
    "projection": directions(orthonormal(3), orthonormal(3), Phi.AFFINE, -1.0),
    "affine, with constants": directions(
        numbers(4, WIDTH, seed=4, scale=0.2), numbers(4, WIDTH, seed=6, scale=0.3), Phi.AFFINE, 1.5, 0.7
    ),
    "affine, biased, written to one place": directions(
        numbers(4, WIDTH, seed=4, scale=0.2),
        numbers(1, WIDTH, seed=6, scale=0.3).expand(4, -1).contiguous(),
        Phi.AFFINE,
        torch.tensor([1.0, -0.5, 2.0, 0.3]),
        bias=numbers(4, seed=8),
    ),
    "set": directions(orthonormal(3), orthonormal(3), Phi.SET, torch.tensor([2.0, -1.0, 5.0])),
    "set, not orthogonal": directions(
        numbers(3, WIDTH, seed=4, scale=0.2), numbers(3, WIDTH, seed=6, scale=0.3), Phi.SET, 2.0, bias=numbers(3)
    ),
    "constants only": directions(None, numbers(2, WIDTH, seed=7), Phi.AFFINE, 0.0, 0.5),
}


@pytest.mark.parametrize("name", EXACT)
def test_the_estimate_is_the_mean_over_directions(name: str) -> None:
    assert dose([EXACT[name]], LENGTH) == pytest.approx(measured(EXACT[name]), rel=0.04)


@pytest.mark.parametrize("norm", ["constant_norm", "layer_norm"])
def test_readings_of_normalised_rows(norm: str) -> None:
    """A change made in the normalised space is scaled back, so the dose hardly depends on the length."""
    bare = EXACT["affine, with constants"]
    assert isinstance(bare, Directions)
    op = replace(bare, norm=norm)
    for length in (LENGTH, 90.0):
        assert dose([op], length) == pytest.approx(measured(op, length=length), rel=0.06)


@pytest.mark.parametrize(
    "phi, args", [(Phi.TANH, (1.5,)), (Phi.SIGN, (2.0,)), (Phi.GATED, (0.0, 1.0, 0.0, 0.0)), (Phi.SILU, (1.0,))]
)
def test_other_directions_are_of_the_right_size(phi: Phi, args: tuple[Any, ...]) -> None:
    """Not below what is measured, and at most twice that."""
    op = directions(orthonormal(3), orthonormal(3), phi, *args)
    assert 0.99 <= dose([op], LENGTH) / measured(op) < 2.1


@pytest.mark.parametrize("norm", PER_TOKEN_NORMS)
@pytest.mark.parametrize("length", [LENGTH, 90.0])
def test_what_is_decoded_anew(norm: str, length: float) -> None:
    """Measured too, on other rows than here."""
    read, write = numbers(150, WIDTH, seed=1) / 7, numbers(150, WIDTH, seed=2) / 7
    encoder = TopK(read, numbers(150, seed=3), 40)
    bare = replace(directions(read, write, Phi.TOP_K, 0.0, 1.0, bias=encoder.bias), top_k=encoder, norm=norm)
    for scale in (1.0, -0.5):
        op = replace(bare, replacement=Replacement(scale, numbers(WIDTH, seed=4)))
        assert dose([op], length) == pytest.approx(measured(op, 60, length), rel=0.06)


@settings(max_examples=40, deadline=None)
@given(scale=st.floats(0.01, 100), length=st.floats(0.1, 1e4))
def test_added_vectors_by_formula(scale: float, length: float) -> None:
    add = numbers(WIDTH)
    assert dose([Diagonal(None, scale * add)], length) == pytest.approx(scale * float(add.norm()) / length, rel=1e-4)


def test_several_edits_are_taken_to_be_independent() -> None:
    ops = [EXACT["add"], EXACT["set"]]
    assert dose(ops, LENGTH) == pytest.approx(math.hypot(*(dose([op], LENGTH) for op in ops)), rel=1e-6)


def test_nothing_and_nowhere() -> None:
    assert dose([], LENGTH) == 0
    assert dose([EXACT["add"]], 0.0) == 0
    assert largest({}) is None


def test_the_largest_is_named() -> None:
    hook_points = {HookPoint("resid_post", layer): value for layer, value in enumerate((0.1, 0.7, 0.3))}
    assert largest(hook_points) == Dose(0.7, HookPoint("resid_post", 1))
