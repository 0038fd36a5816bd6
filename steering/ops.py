"""Edits: what happens to one row of activations at one hook point, as plain numbers.

Every method compiles to a short list of these, applied in order; `programs` turns a request's lists into the
instructions that `cuda_ext.run_edits_` executes. All tensors are float32 on the host.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from whipstaff.cuda_ext import Phi

PER_TOKEN_NORMS = ("none", "constant_norm", "layer_norm")  # what a sparse autoencoder does to its input first


@dataclass(frozen=True, eq=False)
class Diagonal:
    """x <- x * mul + add, each (width,); None is ones, or zeros."""

    mul: Tensor | None = None
    add: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Cross:
    """x[i] <- mul[i] * x[i] + cross[i] * x[i ^ stride]: rotations of disjoint pairs of columns.

    mul, cross (width,); stride a power of two.
    """

    mul: Tensor
    cross: Tensor
    stride: int


@dataclass(frozen=True, eq=False)
class TopK:
    """Only the `k` largest of all readings encoder @ x + bias count as active (sparse autoencoders with TopK)."""

    encoder: Tensor  # (features, width)
    bias: Tensor  # (features,)
    k: int


@dataclass(frozen=True, eq=False)
class Replacement:
    """Directions give the row itself and not a change of it: x <- x + scale * (norm^-1(their sum + bias) - x)."""

    scale: float
    bias: Tensor | None = None  # (width,)


@dataclass(frozen=True, eq=False)
class Directions:
    """x <- x + sum over r of phi_r(read[r] . x + bias[r]) * write[r]; all directions read the same x.

    With a `replacement` that sum takes x's place, as far as its scale goes.

    Pairs (Phi.ANGLE, Phi.ROTATE) are two directions in a row, the first at an even r.
    """

    read: Tensor | None  # (R, width); None: every reading is its bias
    write: Tensor  # (R, width)
    phi: tuple[Phi, ...]  # (R,)
    args: Tensor  # (R, 4): a, b, c, d of every phi
    bias: Tensor | None = None  # (R,)
    # One of PER_TOKEN_NORMS: readings and changes live in the normalised space. With layer_norm each row of `read` and
    # of `top_k.encoder` has a mean of 0, so that it does not read the mean of x.
    norm: str = "none"
    top_k: TopK | None = None
    replacement: Replacement | None = None


EditOp = Diagonal | Cross | Directions


def diagonal(scale: float, add: Tensor | None = None, gain: Tensor | None = None) -> Diagonal:
    """x <- x + scale * (gain * x + add), for numbers of any shape with `width` elements."""
    return Diagonal(
        None if gain is None else 1 + scale * gain.flatten(), None if add is None else scale * add.flatten()
    )


def directions(
    read: Tensor | None,
    write: Tensor,
    phi: Phi,
    a: Tensor | float = 0.0,
    b: Tensor | float = 0.0,
    c: Tensor | float = 0.0,
    d: Tensor | float = 0.0,
    bias: Tensor | None = None,
) -> Directions:
    """Directions that share one phi; its arguments are numbers or (R,) tensors."""
    args = torch.stack([torch.as_tensor(value, dtype=torch.float32).expand(len(write)) for value in (a, b, c, d)], 1)
    return Directions(read, write, (phi,) * len(write), args, bias)
