"""Angular steering: what a row has in a plane is turned to the angle, its length kept.

    x <- x - P x + |P x| (cos angle b1 + sin angle b2)      adaptive: only where x . b1 > 0

P projects on the plane of b1 (the unit first direction) and b2 (the second, made orthonormal to it). It acts on what
attention and MLP receive, in every layer but for the very first norm. The angle is where rows are turned to, not by
how much: no angle is off.
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import Phi
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import EditMethod
from whipstaff.steering.method import EditParams, HookPoint, Tensors
from whipstaff.steering.ops import EditOp, directions
from whipstaff.steering.shape import ModelShape

_EVERYWHERE = torch.finfo(torch.float32).min


class AngularParams(EditParams):
    angle: float = Field(ge=-360, le=360, allow_inf_nan=False, description="degrees from the first direction")
    adaptive: bool = Field(False, description="only rows that lean towards the first direction")


class Angular(EditMethod[AngularParams]):
    name, paper = "angular", "Vu and Nguyen 2025, arXiv:2510.26243"
    params, sites, where = AngularParams, ("attn_in", "mlp_in"), "all"
    off: ClassVar = {}
    example: ClassVar = {"angle": 200}
    parts: ClassVar = {"first_direction": ("width",), "second_direction": ("width",)}

    def hook_points(self, model: ModelShape) -> list[HookPoint]:
        return [HookPoint(site, layer) for layer in range(model.num_layers) for site in self.sites][1:]

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        first, second = tensors["first_direction"], tensors["second_direction"]
        if not first.any() or not second.any():
            raise SteeringError(f"a direction of {point.site} {point.layer} has length 0")
        across = second - (second @ first) / (first @ first) * first
        if across.norm() < 1e-4 * second.norm():
            raise SteeringError(f"the directions of {point.site} {point.layer} are parallel; they span no plane")

    def ops(self, tensors: Tensors, params: AngularParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        plane = _plane(tensors["first_direction"], tensors["second_direction"])
        threshold = 0.0 if params.adaptive else _EVERYWHERE
        return (directions(plane, plane, Phi.ANGLE, a=math.radians(params.angle), b=threshold),)


def _plane(first: Tensor, second: Tensor) -> Tensor:
    """(2, width) orthonormal rows."""
    b1 = first / first.norm()
    across = second - (second @ b1) * b1
    return torch.stack([b1, across / across.norm()])
