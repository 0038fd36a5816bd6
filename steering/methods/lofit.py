"""LoFiT: z <- (1 + scale * A) * z + scale * v on head outputs. Stage 1 learns A to select heads, stage 2 learns v."""

from collections.abc import Sequence
from typing import ClassVar

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import EditOp, diagonal
from whipstaff.steering.shape import ModelShape


class LoFiT(ScaledMethod[Scaled]):
    name, paper = "lofit", "Yin et al. 2024, arXiv:2406.01563"
    params, sites, where = Scaled, ("attn_head",), "all"
    combines = "alike"
    parts: ClassVar = {"A?": ("heads", "head_dim"), "v?": ("heads", "head_dim")}

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if not tensors:
            raise SteeringError(f"layer {point.layer} has neither A nor v")

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (diagonal(params.scale, tensors.get("v"), tensors.get("A")),)
