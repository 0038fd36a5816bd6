"""Task vectors: x <- x + scale * (state - x) at the last prompt token; strength 1 replaces the state."""

from collections.abc import Sequence
from typing import ClassVar

import torch

from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import EditOp, diagonal
from whipstaff.steering.shape import ModelShape


class TaskVector(ScaledMethod[Scaled]):
    name, paper = "task_vector", "Hendel et al. 2023, arXiv:2310.15916"
    params, sites, where = Scaled, ("resid_post",), "last_prompt"
    parts: ClassVar = {"state": ("width",)}

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        state = tensors["state"]
        return (diagonal(params.scale, state, -torch.ones_like(state)),)
