"""SITE, soft injection of task embeddings: z_h <- z_h + scale * alpha_h * (task_h - z_h) at the last prompt token."""

from collections.abc import Sequence
from typing import ClassVar

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import EditOp, diagonal
from whipstaff.steering.shape import ModelShape


class SITE(ScaledMethod[Scaled]):
    name, paper = "site", "Park and Rhee 2025, arXiv:2507.20906"
    params, sites, where = Scaled, ("attn_head",), "last_prompt"
    parts: ClassVar = {"task": ("heads", "head_dim"), "alpha": ("heads",)}  # alpha after its sigmoid

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if ((tensors["alpha"] < 0) | (tensors["alpha"] > 1)).any():
            raise SteeringError(f"alpha of layer {point.layer} lies outside [0, 1]; store it after the sigmoid")

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        task, alpha = tensors["task"], tensors["alpha"][:, None]
        return (diagonal(params.scale, alpha * task, (-alpha).expand_as(task)),)
