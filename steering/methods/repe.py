"""Representation engineering: h <- h + c v, or with the piecewise operator h <- h + c v sign(h . c v).

The paper's `normalize` is the request's `renorm`. Directions keep their length; the release's are unit vectors with
the sign of their labels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from whipstaff.cuda_ext import Phi
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import EditOp, diagonal, directions
from whipstaff.steering.shape import ModelShape


class RepEParams(Scaled):
    operator: Literal["linear", "piecewise_linear"] = Field(
        "linear", description="add the vector, or push every token further along it in the direction it already leans"
    )


class RepE(ScaledMethod[RepEParams]):
    name, paper = "repe", "Zou et al. 2023, arXiv:2310.01405"
    params, sites, where = RepEParams, ("resid_post",), "all"
    combines = "added"
    parts: ClassVar = {"add": ("width",)}

    def edits(self, tensors: Tensors, params: RepEParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        if params.operator == "linear":
            return (diagonal(params.scale, tensors["add"]),)
        add = tensors["add"][None]  # (1, width)
        return (directions(add, add, Phi.SIGN, a=abs(params.scale)),)  # c sign(c s) = |c| sign(s)

    def check_linear(self, defaults: Mapping[str, Any]) -> None:
        if defaults.get("operator", "linear") != "linear":
            raise SteeringError("an edit with a piecewise operator is not linear in its numbers; it cannot be combined")
