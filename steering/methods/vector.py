"""The generic edit: x <- x + scale * (gain * x + add). It serves files of methods that have no code of their own."""

from collections.abc import Sequence
from typing import ClassVar

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import EditOp, diagonal
from whipstaff.steering.shape import SITES, ModelShape


class GenericVector(ScaledMethod[Scaled]):
    name, paper = "vector", "the file's own"
    params, sites, where = Scaled, tuple(SITES), "each_last"
    combines = "added"
    parts: ClassVar = {"add?": ("width",), "gain?": ("width",)}

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if not tensors:
            raise SteeringError(f"{point.site} {point.layer} has neither add nor gain")

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (diagonal(params.scale, tensors.get("add"), tensors.get("gain")),)
