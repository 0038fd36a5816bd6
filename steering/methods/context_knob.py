"""Context-sensitivity knob: h <- h + scale * sum over i of (value_i - h . u_i) u_i, with orthonormal u.

One direction decides whether the model answers from its context or from what it knows. Sign and size of the value
belong to the model (+6 prior, -6 context for Llama-3.1-8B at layer 16), so a file states them among its defaults.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from whipstaff.cuda_ext import Phi
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import EditOp, directions
from whipstaff.steering.shape import ModelShape

MAX_RANK = 64
_Value = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class KnobParams(Scaled):
    value: _Value | Annotated[list[_Value], Field(min_length=1, max_length=MAX_RANK)] = Field(
        description="what the components are set to; a list has one per row of the basis"
    )


class ContextKnob(ScaledMethod[KnobParams]):
    name, paper = "context_knob", "Minder et al. 2024, arXiv:2411.07404"
    params, sites, where = KnobParams, ("resid_post",), "each_last"
    off: ClassVar = {"scale": 0.0, "value": 0.0}
    example: ClassVar = {"value": 6.0}
    parts: ClassVar = {"basis": ("rank", "width")}

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        basis = tensors["basis"]
        if not 1 <= len(basis) <= MAX_RANK:
            raise SteeringError(f"the basis of layer {point.layer} has {len(basis)} rows, wanted 1 to {MAX_RANK}")
        if (basis.norm(dim=1) == 0).any():
            raise SteeringError(f"the basis of layer {point.layer} has a row of length 0")
        unit = basis / basis.norm(dim=1, keepdim=True)
        cosines = unit @ unit.T
        if (cosines - torch.eye(len(basis))).abs().max() > 1e-2:
            raise SteeringError(f"the rows of layer {point.layer}'s basis are not at right angles")

    def check_params(self, params: KnobParams, tensors: Mapping[HookPoint, Tensors]) -> None:
        for point, parts in tensors.items():
            if isinstance(params.value, list) and len(params.value) != len(parts["basis"]):
                raise SteeringError(
                    f"{len(params.value)} values for the {len(parts['basis'])} rows of layer {point.layer}", "value"
                )

    def edits(self, tensors: Tensors, params: KnobParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        basis = tensors["basis"]  # (rank, width)
        length = basis.norm(dim=1)
        value = params.scale * torch.tensor(params.value) / length
        return (directions(basis, basis, Phi.AFFINE, a=-params.scale / length**2, b=value),)
