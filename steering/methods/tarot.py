"""TaRot: every head's output is turned by learned angles, or scaled by a learned number.

The number of angles per head of size D says which rotation it is:
    rotary, D / 2 angles   pairs (2i, 2i + 1)
    givens, D - 1 angles   level r joins (2^(r+1) k, 2^(r+1) k + 2^r) for every k; the last level acts first
and every pair (i, j) becomes  z_i cos + z_j sin,  z_j cos - z_i sin. Strength multiplies the angles. At mlp_out the
whole row is one block.
"""

from collections.abc import Iterator, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import Cross, EditOp, diagonal
from whipstaff.steering.shape import ModelShape


class TaRot(ScaledMethod[Scaled]):
    name, paper = "tarot", "Singh et al. 2024, arXiv:2410.04277"
    params, sites, where = Scaled, ("attn_head", "mlp_out"), "all"
    parts: ClassVar = {"angles?": ("blocks", "angles"), "scale?": ("blocks",)}

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if len(tensors) != 1:
            raise SteeringError(f"{point.site} {point.layer} needs angles or scale; it has {sorted(tensors) or 'none'}")
        ((part, tensor),) = tensors.items()
        num_blocks = model.num_heads if point.site == "attn_head" else 1
        if len(tensor) != num_blocks:
            raise SteeringError(f"{part} of {point.site} {point.layer} has {len(tensor)} rows, wanted {num_blocks}")
        if part == "angles":
            _check_angles(tensor.shape[1], model.width(point.site) // num_blocks)

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        width = model.width(point.site)
        if "scale" in tensors:
            scale = tensors["scale"]
            gain = (scale - 1).repeat_interleave(width // len(scale))
            return (diagonal(params.scale, gain=gain),)
        angles = params.scale * tensors["angles"]  # (blocks, angles)
        return tuple(_turned(level, stride) for level, stride in _levels(angles, width // len(angles)))


def _check_angles(num_angles: int, block: int) -> None:
    if num_angles not in (block // 2, block - 1) or block % 2:
        raise SteeringError(f"{num_angles} angles for rows of {block}: rotary takes {block // 2}, givens {block - 1}")
    if num_angles != block // 2 and block & (block - 1):
        raise SteeringError(f"givens rotations need rows of a power of two; these have {block}")


def _levels(angles: Tensor, block: int) -> Iterator[tuple[Tensor, int]]:
    """The levels in the order in which they act: angles (blocks, block) at every pair's first lane, and the stride."""
    if angles.shape[1] == block // 2:
        yield _spaced(angles, 2), 1
        return
    sizes = [block >> (level + 1) for level in range(block.bit_length() - 1)]
    levels = list(enumerate(torch.split(angles, sizes, dim=1)))
    for level, found in reversed(levels):
        yield _spaced(found, 2 << level), 1 << level


def _spaced(angles: Tensor, step: int) -> Tensor:
    """(blocks, n) as (blocks, n * step) with zeros between."""
    spaced = angles.new_zeros(*angles.shape, step)
    spaced[..., 0] = angles
    return spaced.flatten(1)


def _turned(angles: Tensor, stride: int) -> Cross:
    first = angles.flatten()
    both = first + first.roll(stride)  # (width,) the angle at both lanes of a pair
    return Cross(both.cos(), first.sin() - first.roll(stride).sin(), stride)
