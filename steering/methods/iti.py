"""Inference-time intervention: z_h <- z_h + scale * sigma_h * theta_h with |theta_h| = 1, for the chosen heads.

sigma_h is the standard deviation of z_h . theta_h over the fitting data; it is 0 for heads that were not chosen. A file
may hold the product sigma * theta as `add` instead.
"""

from collections.abc import Sequence
from typing import ClassVar

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors, strength
from whipstaff.steering.ops import EditOp, diagonal
from whipstaff.steering.shape import ModelShape


class ITIParams(Scaled):
    scale: float = strength(15.0)


class ITI(ScaledMethod[ITIParams]):
    name, paper = "iti", "Li et al. 2023, arXiv:2306.03341"
    params, sites, where = ITIParams, ("attn_head",), "each_last"
    combines = "added"
    parts: ClassVar = {
        "direction?": ("heads", "head_dim"),
        "sigma?": ("heads",),
        "add?": ("heads", "head_dim"),
    }

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if set(tensors) not in ({"add"}, {"direction", "sigma"}):
            raise SteeringError(
                f"iti needs direction and sigma, or add alone; layer {point.layer} has {sorted(tensors)}"
            )
        if "add" in tensors:
            return
        if (tensors["sigma"] < 0).any():
            raise SteeringError(f"sigma of layer {point.layer} has negative entries; it is a standard deviation")
        lost = (tensors["sigma"] > 0) & (tensors["direction"].norm(dim=1) == 0)
        for head in lost.nonzero().flatten().tolist():
            raise SteeringError(f"the direction of layer {point.layer}, head {head} has length 0")

    def linear_parts(self, tensors: Tensors) -> Tensors:
        """The deviations times the unit directions are one `add`."""
        if "add" in tensors:
            return tensors
        direction = tensors["direction"]  # (heads, head_dim)
        return {"add": (tensors["sigma"] / direction.norm(dim=1).clamp_min(1e-30))[:, None] * direction}

    def edits(self, tensors: Tensors, params: ITIParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (diagonal(params.scale, self.linear_parts(tensors)["add"]),)
