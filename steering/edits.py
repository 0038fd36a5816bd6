"""The diagonal edit  x <- x * mul + add  and how several of them become one."""

from collections.abc import Iterable

import torch
from torch import Tensor

from whipstaff.steering.artifacts import Site, Vector


def compose(
    edits: Iterable[tuple[Vector, float, tuple[int, ...] | None]], site: Site, layer: int, width: int
) -> tuple[Tensor, Tensor] | None:
    """One (mul, add) pair, each float32 (width,), equal to the edits applied in the order given.

    Each edit is  x <- x + s * (gain * x + add). Composing x * m1 + a1 with (m2, a2) gives x * m1 * m2 + a1 * m2 + a2.
    None when no edit touches this layer of this site.
    """
    mul, add, touched = torch.ones(width), torch.zeros(width), False
    for vector, scale, layers in edits:
        parts = vector.tensors.get((site, layer))
        if parts is None or (layers is not None and layer not in layers):
            continue
        touched = True
        if "gain" in parts:
            factor = 1 + scale * parts["gain"]
            mul, add = mul * factor, add * factor
        if "add" in parts:
            add = add + scale * parts["add"]
    return (mul, add) if touched else None
