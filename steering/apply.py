"""Edits in plain torch, differentiable: what `programs` makes instructions of, done to whole batches of rows.

`cuda_ext.run_edits_` is what the engine runs; tests hold the two equal. Gradients flow to the numbers of an edit as
well as to the rows, so that a fit trains the very formula that is served.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from whipstaff.cuda_ext.reference import apply_phi
from whipstaff.steering.ops import Cross, Diagonal, Directions, EditOp


def applied(x: Tensor, ops: Sequence[EditOp], renorm: bool = False) -> Tensor:
    """Rows (..., width) after the edits, in order; computed in float32 or better, in the rows' type again.

    Args:
        renorm: bring every row back to the length that it had.
    """
    before = x.to(torch.promote_types(x.dtype, torch.float32))
    found = before
    for op in ops:
        if isinstance(op, Diagonal):
            found = found if op.mul is None else found * op.mul.to(found)
            found = found if op.add is None else found + op.add.to(found)
        elif isinstance(op, Cross):
            partner = torch.arange(found.shape[-1], device=found.device) ^ op.stride
            found = op.mul.to(found) * found + op.cross.to(found) * found[..., partner]
        else:
            found = _directed(found.flatten(0, -2), op).view_as(found)
    if renorm:
        found = found * (before.norm(dim=-1, keepdim=True) / found.norm(dim=-1, keepdim=True).clamp_min(1e-30))
    return found.to(x.dtype)


def _directed(rows: Tensor, op: Directions) -> Tensor:
    """(N, width) rows after directions that all read the rows as they were."""
    seen, back, mean = _normed(rows, op.norm)
    num = len(op.phi)
    z = rows.new_zeros(len(rows), num) if op.read is None else seen @ op.read.to(rows).T
    z = z if op.bias is None else z + op.bias.to(rows)
    tau: float | Tensor = -math.inf
    if op.top_k is not None:
        readings = seen @ op.top_k.encoder.to(rows).T + op.top_k.bias.to(rows)
        tau = readings.topk(op.top_k.k, dim=-1).values[:, -1:]
    kinds = torch.tensor([[int(phi) for phi in op.phi]], device=rows.device)
    change = apply_phi(kinds, op.args.to(rows)[None], z, tau) @ op.write.to(rows)
    if op.replacement is None:
        return rows + back * change
    decoded = change if op.replacement.bias is None else change + op.replacement.bias.to(rows)
    return rows + op.replacement.scale * (back * decoded + mean - rows)


def _normed(rows: Tensor, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """(rows as they are read, the factor back, what is added then), the latter two (N, 1)."""
    one, zero = rows.new_ones(len(rows), 1), rows.new_zeros(len(rows), 1)
    if norm == "constant_norm":
        back = rows.norm(dim=1, keepdim=True) / math.sqrt(rows.shape[1])
        return rows / back, back, zero
    if norm == "layer_norm":
        mean, back = rows.mean(1, keepdim=True), rows.std(1, keepdim=True)
        return (rows - mean) / (back + 1e-5), back, mean
    return rows, one, zero
