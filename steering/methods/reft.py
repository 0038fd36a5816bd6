"""ReFT: learned low-rank edits of the stream at chosen prompt tokens, with R's orthonormal columns kept as rows.

    loreft    h + R (act(W h + b) - R^T h)              weight, bias, rotate
    noreft    h + W2^T (act(W1 h + b1) - (W2 h + b2))   weight, bias, project, project_bias
    consreft  h + R (b - R^T h)                         bias, rotate
    lobireft  h + R b                                   bias, rotate
    direft    h + R act(W h + b)                        weight, bias, rotate
    nodireft  h + W2^T act(W1 h + b1)                   weight, bias, project

pyreft's files hold `weight` and `bias` of the learned source, R as `rotate_layer` (width, rank) and W2 as `proj_layer`.
Strength multiplies what is added. Tokens belong to the file: `where_of("f7+l7")` says pyreft's clause in ours.
"""

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import Phi
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, S, Scaled, Tensors
from whipstaff.steering.ops import Directions, EditOp, diagonal, directions
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.where import Where

MAX_RANK = 64  # the directions that read one row together


class ReFTParams(Scaled):
    activation: Literal["linear", "relu", "tanh", "silu"] = Field("linear", description="pyreft's act_fn")


class ReFT(ScaledMethod[S]):
    """What the methods below share."""

    paper, sites, where = "Wu et al. 2024, arXiv:2404.03592", ("resid_post",), "last_prompt"

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        rank = len(tensors["rotate"] if "rotate" in tensors else tensors["project"])
        if not 1 <= rank <= MAX_RANK:
            raise SteeringError(f"layer {point.layer} has rank {rank}, wanted 1 to {MAX_RANK}")


class Subtracting(ReFT[ReFTParams]):
    """What reads twice where its activation is not linear."""

    params = ReFTParams

    def check_params(self, params: ReFTParams, tensors: Mapping[HookPoint, Tensors]) -> None:
        for point, parts in tensors.items():
            if params.activation != "linear" and 2 * len(parts["weight"]) > MAX_RANK:
                raise SteeringError(
                    f"with an activation the rank is at most {MAX_RANK // 2}; layer {point.layer} has "
                    f"{len(parts['weight'])}",
                    "activation",
                )


class LoReFT(Subtracting):
    name = "loreft"
    parts: ClassVar = {"weight": ("rank", "width"), "bias?": ("rank",), "rotate": ("rank", "width")}

    def edits(self, tensors: Tensors, params: ReFTParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (_moved(tensors["weight"], tensors.get("bias"), tensors["rotate"], None, params),)


class NoReFT(Subtracting):
    name = "noreft"
    parts: ClassVar = {
        "weight": ("rank", "width"),
        "bias?": ("rank",),
        "project": ("rank", "width"),
        "project_bias?": ("rank",),
    }

    def edits(self, tensors: Tensors, params: ReFTParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        weight, project = tensors["weight"], tensors["project"]
        return (_moved(weight, tensors.get("bias"), project, tensors.get("project_bias"), params),)


class ConsReFT(ReFT[Scaled]):
    name, params = "consreft", Scaled
    parts: ClassVar = {"bias": ("rank",), "rotate": ("rank", "width")}

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        rotate, scale = tensors["rotate"], params.scale
        return (directions(rotate, rotate, Phi.AFFINE, a=-scale, b=scale * tensors["bias"]),)


class LobiReFT(ReFT[Scaled]):
    name, params = "lobireft", Scaled
    parts: ClassVar = {"bias": ("rank",), "rotate": ("rank", "width")}

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (diagonal(params.scale, tensors["bias"] @ tensors["rotate"]),)


class DiReFT(ReFT[ReFTParams]):
    name, params = "direft", ReFTParams
    parts: ClassVar = {"weight": ("rank", "width"), "bias?": ("rank",), "rotate": ("rank", "width")}

    def edits(self, tensors: Tensors, params: ReFTParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (_added(tensors["weight"], tensors.get("bias"), tensors["rotate"], params),)


class NodiReFT(ReFT[ReFTParams]):
    name, params = "nodireft", ReFTParams
    parts: ClassVar = {"weight": ("rank", "width"), "bias?": ("rank",), "project": ("rank", "width")}

    def edits(self, tensors: Tensors, params: ReFTParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (_added(tensors["weight"], tensors.get("bias"), tensors["project"], params),)


def where_of(spec: str) -> Where:
    """pyreft's `f{n}+l{m}`, the first n and the last m prompt tokens, as a clause.

    pyreft also caps n and m at half the prompt, which shows on odd prompts shorter than n + m: there our clause has one
    token more, the middle one.

    Raises:
        SteeringError: `spec` is not of that form, or selects nothing.
    """
    match = re.fullmatch(r"(?:f(\d{1,6}))?\+?(?:l(\d{1,6}))?", spec)
    first, last = (int(group or 0) for group in match.groups()) if match else (0, 0)
    if not first and not last:
        raise SteeringError(f"{spec!r} is not of the form f7+l7", "where")
    return Where(prompt=[*([(0, first)] if first else []), *([(-last, None)] if last else [])])


def _added(weight: Tensor, bias: Tensor | None, write: Tensor, params: ReFTParams) -> Directions:
    """scale * act(weight x + bias) along write."""
    phi, a, b = _act(params)
    return directions(weight, write, phi, a, b, bias=bias)


def _moved(
    weight: Tensor, bias: Tensor | None, project: Tensor, project_bias: Tensor | None, params: ReFTParams
) -> Directions:
    """scale * (act(weight x + bias) - (project x + project_bias)) along project."""
    zeros = torch.zeros(len(weight))
    bias = zeros if bias is None else bias
    project_bias = zeros if project_bias is None else project_bias
    if params.activation == "linear":
        return directions(weight - project, project, Phi.AFFINE, a=params.scale, bias=bias - project_bias)
    acting = _added(weight, bias, project, params)
    leaving = directions(project, project, Phi.AFFINE, a=-params.scale, bias=project_bias)
    return _together(acting, leaving)


def _together(first: Directions, second: Directions) -> Directions:
    """Directions that read the same row."""
    assert first.read is not None and second.read is not None and first.bias is not None and second.bias is not None
    return Directions(
        torch.cat([first.read, second.read]),
        torch.cat([first.write, second.write]),
        first.phi + second.phi,
        torch.cat([first.args, second.args]),
        torch.cat([first.bias, second.bias]),
    )


def _act(params: ReFTParams) -> tuple[Phi, float, float]:
    """The phi of an activation and its arguments a and b."""
    if params.activation == "relu":
        return Phi.GATED, 0.0, params.scale
    return {"linear": Phi.AFFINE, "tanh": Phi.TANH, "silu": Phi.SILU}[params.activation], params.scale, 0.0
