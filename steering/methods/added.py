"""Vectors that are added: x <- x + scale * add. The papers differ in how they find the vector and in its tokens."""

from collections.abc import Sequence
from typing import ClassVar

from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import EditOp, diagonal
from whipstaff.steering.shape import ModelShape


class Added(ScaledMethod[Scaled]):
    """What the methods below share."""

    params, combines = Scaled, "added"
    parts: ClassVar = {"add": ("width",)}

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (diagonal(params.scale, tensors["add"]),)


class CAA(Added):
    """Mean difference of contrastive pairs at the answer letter. The release steers from the last token of the
    instruction's end marker on, inclusive; with a template that ends the prompt there, that is `each_last`."""

    name, paper = "caa", "Rimsky et al. 2023, arXiv:2312.06681"
    sites, where = ("resid_post",), "each_last"


class FunctionVector(Added):
    """Sum over the top heads of their mean outputs through W_o; at attn_head, the heads' mean outputs themselves."""

    name, paper = "function_vector", "Todd et al. 2023, arXiv:2310.15213"
    sites, where = ("resid_post", "attn_head"), "each_last"


class ControlVector(Added):
    """repeng: representation engineering with one unit vector per layer."""

    name, paper = "control_vector", "Zou et al. 2023, arXiv:2310.01405, as in repeng"
    sites, where = ("resid_post",), "all"


class ShiftVector(Added):
    """xl-vlms: mean of the target's states less mean of the base's, or a difference of concept centroids."""

    name, paper = "shift_vector", "Khayatan et al. 2025, arXiv:2501.03012"
    sites, where = ("resid_post",), "all"
