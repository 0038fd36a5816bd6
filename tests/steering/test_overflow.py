"""Growth bounds what edits can make of activations, and lets through what only takes away."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.ops import edited

from whipstaff.cuda_ext import Phi
from whipstaff.steering.method import HookPoint
from whipstaff.steering.ops import Cross, Diagonal, EditOp, Replacement, TopK, directions
from whipstaff.steering.overflow import MAX_AMPLIFICATION, bound, max_amplification
from whipstaff.steering.programs import merged

WIDTH = 16


def ops(seed: int) -> list[EditOp]:
    """Some edits of every kind."""
    torch.manual_seed(seed)
    angle = torch.rand(WIDTH)
    rows = torch.randn(3, WIDTH) / 4
    kinds: list[EditOp] = [
        Diagonal(torch.randn(WIDTH), torch.randn(WIDTH)),
        Diagonal(None, torch.randn(WIDTH)),
        Cross(angle.cos(), angle.sin(), 1),
        directions(rows, torch.randn(3, WIDTH) / 4, Phi.AFFINE, -1.5, 0.5, bias=torch.randn(3)),
        directions(rows, rows, Phi.SET, torch.randn(3)),
        directions(rows, rows, Phi.GATED, 0.1, -0.5, 2.0, 1.0),
        directions(rows, rows, Phi.TANH, 3.0),
        directions(rows, rows, Phi.SIGN, 3.0),
        replace(
            directions(rows, rows, Phi.GATED, 0.1, 1.0, 2.0, 1.0), replacement=Replacement(-0.7, torch.randn(WIDTH))
        ),
        replace(
            directions(rows, rows, Phi.TOP_K, -9.0, 1.5),
            top_k=TopK(rows, torch.zeros(3), 2),
            replacement=Replacement(1.5),
        ),
    ]
    return [kinds[index] for index in torch.randint(len(kinds), (3,)).tolist()]


@given(seed=st.integers(0, 1 << 16), size=st.floats(0.0, 1e3))
@settings(deadline=None)
def test_the_bound_holds(seed: int, size: float) -> None:
    """In Euclidean length, for rows of any length; a constant counts once per column."""
    made = ops(seed)
    factor, constant = bound(made)
    x = torch.randn(WIDTH, dtype=torch.float64)
    x = x / x.norm() * size
    assert edited(x, made).norm() <= factor * size + constant * WIDTH**0.5 + 1e-6 * (1 + size)


def test_taking_a_direction_away_everywhere_grows_nothing() -> None:
    direction = torch.nn.functional.normalize(torch.randn(1, WIDTH))
    ablate = bound([directions(direction, direction, Phi.AFFINE, -1.0)])
    hook_points = [HookPoint(site, layer) for layer in range(200) for site in ("resid_pre", "resid_post")]
    assert max_amplification((point, ablate) for point in hook_points) == pytest.approx(1.0, rel=1e-3)


def test_doubling_in_every_layer_ends_beyond_what_float16_holds() -> None:
    twice = bound([Diagonal(torch.full((WIDTH,), 2.0))])
    assert (
        max_amplification((HookPoint("resid_post", layer), twice) for layer in range(11)) > MAX_AMPLIFICATION["float16"]
    )
    assert max_amplification((HookPoint("router", layer), twice) for layer in range(11)) == 1.0


@given(seed=st.integers(0, 1 << 16))
@settings(deadline=None)
def test_merging_neighbours_changes_nothing(seed: int) -> None:
    made = ops(seed) + ops(seed + 1)
    x = torch.randn(WIDTH, dtype=torch.float64)
    together = list(merged(made, is_partial=False))
    torch.testing.assert_close(edited(x, together), edited(x, made), rtol=1e-5, atol=1e-5)
    kinds = [isinstance(op, Diagonal) for op in together]
    assert not any(one and other for one, other in pairwise(kinds))
