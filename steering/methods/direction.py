"""One direction d, ablated, added, or a row's component along it set; r = d / (|d| + 1e-8).

    directional_ablation   x <- x - scale (x . r) r            wherever the stream is written or read
    add_direction          x <- x + scale d                    at one layer, with d's own length
    directional_patch      x <- x + scale (value - x . r) r    at one layer

Arditi et al. 2024. The projections are written with d itself, so that the hook points of a file share its numbers.
"""

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from whipstaff.cuda_ext import Phi
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import Combining, HookPoint, S, Scaled, Tensors
from whipstaff.steering.ops import EditOp, diagonal, directions
from whipstaff.steering.shape import ModelShape, Site

STREAM_WIDE: tuple[Site, ...] = ("resid_pre", "attn_in", "attn_out", "mlp_in", "mlp_out", "resid_post")
_PAPER = "Arditi et al. 2024, arXiv:2406.11717"


class OneDirection(ScaledMethod[S]):
    """What the methods below share."""

    sites, where = STREAM_WIDE, "all"
    combines: ClassVar[Combining] = "directions"
    parts: ClassVar = {"direction": ("width",)}

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if not tensors["direction"].any():
            raise SteeringError(f"the direction of {point.site} {point.layer} has length 0")


def _set(tensors: Tensors, scale: float, value: float) -> Sequence[EditOp]:
    direction = tensors["direction"][None]  # (1, width)
    length = direction.norm() + 1e-8
    return (directions(direction, direction, Phi.AFFINE, a=-scale / length**2, b=scale * value / length),)


class DirectionalAblation(OneDirection[Scaled]):
    name, paper, params = "directional_ablation", _PAPER, Scaled

    def hook_points(self, model: ModelShape) -> list[HookPoint]:
        sites: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")
        return [HookPoint(site, layer) for layer in range(model.num_layers) for site in sites]

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return _set(tensors, params.scale, 0.0)


class AddDirection(OneDirection[Scaled]):
    name, paper, params = "add_direction", _PAPER, Scaled
    combines = "alike"

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (diagonal(params.scale, tensors["direction"]),)


class PatchParams(Scaled):
    value: float = Field(ge=-1e6, le=1e6, allow_inf_nan=False, description="the component along the unit direction")


class DirectionalPatch(OneDirection[PatchParams]):
    name, paper, params = "directional_patch", _PAPER, PatchParams
    off: ClassVar = {"scale": 0.0, "value": 0.0}
    example: ClassVar = {"value": 6.0}

    def edits(self, tensors: Tensors, params: PatchParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return _set(tensors, params.scale, params.value)
