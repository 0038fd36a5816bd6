"""Doses: how large an edit is beside what it edits.

The dose of an edit at a hook point is the root mean square length of the change that it makes to an activation of the
point's usual length pointing anywhere, over that length. The usual lengths are measured on the served model at start.
"""

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from whipstaff.cuda_ext import Phi
from whipstaff.steering.apply import applied
from whipstaff.steering.method import HookPoint
from whipstaff.steering.ops import Cross, Diagonal, Directions, EditOp

_NUM_TRIED = 256


class Dose(NamedTuple):
    """The largest of an edit's doses and where it is given."""

    relative: float
    point: HookPoint


def largest(doses: Mapping[HookPoint, float]) -> Dose | None:
    """The largest of some doses; None of none."""
    if not doses:
        return None
    point = max(doses, key=lambda each: doses[each])
    return Dose(doses[point], point)


def dose(ops: Iterable[EditOp], length: float) -> float:
    """Of some edits at one hook point where activations have this length; their changes are taken to be independent."""
    if length <= 0:
        return 0.0
    return math.sqrt(sum(_mean_square(op, length) for op in ops)) / length


def _mean_square(op: EditOp, length: float) -> float:
    """The mean squared length of the change to a row of that length and random direction."""
    if isinstance(op, Diagonal):
        stretch = 0.0 if op.mul is None else float((op.mul - 1).square().mean())
        return stretch * length**2 + (0.0 if op.add is None else float(op.add.square().sum()))
    if isinstance(op, Cross):
        return float(((op.mul - 1).square() + op.cross.square()).mean()) * length**2
    return _mean_square_of_directions(op, length)


def _mean_square_of_directions(op: Directions, length: float) -> float:
    """Exact where the change is linear in the row; the other directions are taken to be independent."""
    if op.replacement is not None:
        return _mean_square_of_replacing(op, length)
    width = op.write.shape[1]
    if op.norm != "none":  # readings are made at about length sqrt(width), changes scaled back
        return _mean_square_of_directions(_plain(op), math.sqrt(width)) * length**2 / width
    read = torch.zeros(len(op.phi), width) if op.read is None else op.read
    bias = torch.zeros(len(op.phi)) if op.bias is None else op.bias
    a, b, c, d = op.args.unbind(1)
    spread = read.norm(dim=1) * length / math.sqrt(width)  # of a reading about its bias
    gated = ((b * bias + c).square() + (b * spread).square()).maximum(d.square())
    changes = {
        Phi.CLAMP: _beyond(bias, spread, a, b),
        Phi.GATED: gated,
        Phi.TOP_K: gated,
        Phi.TANH: a.square(),
        Phi.SILU: a.square() * (bias.square() + spread.square()),
        Phi.SIGN: a.square(),
        Phi.ANGLE: 2 * spread.square(),
        Phi.ROTATE: 2 * spread.square() * (1 - a.cos()),
    }
    per_direction = torch.stack([changes[phi][r] if phi in changes else a[r] * 0 for r, phi in enumerate(op.phi)])
    apart = float((per_direction * op.write.square().sum(1)).sum())
    slope, constant = torch.zeros_like(a), torch.zeros_like(a)  # of phi_r(z) = slope[r] z + constant[r]
    for phi, its_slope, its_constant in ((Phi.AFFINE, a, b), (Phi.SET, -torch.ones_like(a), a)):
        chosen = torch.tensor([each == phi for each in op.phi])
        slope, constant = slope.where(~chosen, its_slope), constant.where(~chosen, its_constant)
    shift = (slope * bias + constant) @ op.write  # (width,): what the mean row gets
    which = slope.nonzero().flatten()
    grams = (read[which] @ read[which].T) * (op.write[which] @ op.write[which].T)
    turned = float(slope[which] @ grams @ slope[which]) * length**2 / width
    return apart + float(shift.square().sum()) + max(turned, 0.0)


def _mean_square_of_replacing(op: Directions, length: float) -> float:
    """Measured on _NUM_TRIED rows: what replaces a row has too much in common with it to be taken as independent."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(_NUM_TRIED, op.write.shape[1], generator=generator)) * length
    return float((applied(rows, [op]) - rows).square().sum(1).mean())


def _beyond(bias: Tensor, spread: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """About how far readings lie outside of [low, high], squared."""
    return (bias + spread - high).clamp(min=0).square() + (low - (bias - spread)).clamp(min=0).square()


def _plain(op: Directions) -> Directions:
    return Directions(op.read, op.write, op.phi, op.args, op.bias)
