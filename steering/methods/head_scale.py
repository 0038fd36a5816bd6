"""Scaling, knocking out and patching of heads:  z_h <- s_h z_h, or mean_h for heads in the mask.

A scale of 0 knocks a head out. A mean over other prompts is the milder control, mean ablation; a mean over prompts of a
task patches the task in (Todd et al. 2023). Strength moves from the head's own output towards that.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import EditOp, diagonal
from whipstaff.steering.shape import ModelShape


class HeadScale(ScaledMethod[Scaled]):
    name, paper = (
        "head_scale",
        "Michel et al. 2019, arXiv:1905.10650; means: Wang et al. 2022, arXiv:2211.00593",
    )
    params, sites, where = Scaled, ("attn_head",), "all"
    parts: ClassVar = {
        "scale?": ("heads",),
        "mean?": ("heads", "head_dim"),
        "mean_mask?": ("heads",),
    }

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if ("mean" in tensors) != ("mean_mask" in tensors):
            raise SteeringError(f"layer {point.layer}: mean and mean_mask (1 for heads to replace) go together")
        if not tensors:
            raise SteeringError(f"layer {point.layer} has neither scale nor mean")
        mask = tensors.get("mean_mask")
        if mask is not None and not ((mask == 0) | (mask == 1)).all():
            raise SteeringError(f"mean_mask of layer {point.layer} holds numbers other than 0 and 1")

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        gain = torch.zeros(model.num_heads)
        if "scale" in tensors:
            gain = tensors["scale"] - 1
        add = None
        if "mean" in tensors:
            is_set = tensors["mean_mask"] > 0
            gain = torch.where(is_set, -1.0, gain)
            add = torch.where(is_set[:, None], tensors["mean"], 0.0)
        return (diagonal(params.scale, add, gain[:, None].expand(-1, model.head_dim)),)
