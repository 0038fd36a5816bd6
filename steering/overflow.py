"""How large a request's edits can make activations: a bound at admission, so that nobody overflows the model.

Beyond MAX_AMPLIFICATION activations overflow: what a request then leaves in the KV cache is not finite, and attention
kernels that multiply masked entries by zero carry that into the next request which gets the block.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from whipstaff.cuda_ext import Phi
from whipstaff.steering.method import HookPoint
from whipstaff.steering.ops import Cross, Diagonal, Directions, EditOp, Replacement

# What activations of size one may become, by dtype. Normalisation squares activations in float32, so bfloat16 and
# float32 models have room for 1e15 and a large activation besides; float16 itself ends at 65504.
MAX_AMPLIFICATION = {"float16": 1e3, "bfloat16": 1e15, "float32": 1e15}
Bound = tuple[float, float]  # (f, c): what is at most s becomes at most f * s + c
_IN_STREAM = ("resid_pre", "resid_post")


def max_amplification(bounds: Iterable[tuple[HookPoint, Bound]]) -> float:
    """How large the edits can make an activation of size one on its way through all layers, at most.

    Args:
        bounds: of every edit, in the order in which the model meets them. Edits of the residual stream act on all that
            came before; those elsewhere act on normalised activations and add what they make to the stream.
    """
    at: dict[HookPoint, Bound] = {}
    for point, (factor, constant) in bounds:  # those of one hook point are made one after the other
        before, plus = at.get(point, (1.0, 0.0))
        at[point] = before * factor, plus * factor + constant
    size = 1.0
    for point, (factor, constant) in at.items():
        if point.site == "router":  # its logits choose and weigh experts; they reach no activation
            continue
        size = size * factor + constant if point.site in _IN_STREAM else size + factor - 1.0 + constant
    return size


def bound(ops: Iterable[EditOp]) -> Bound:
    """Of edits made one after the other."""
    factor, constant = 1.0, 0.0
    for op in ops:
        by, plus = _bound(op)
        factor, constant = factor * by, constant * by + plus
    return factor, constant


def _bound(op: EditOp) -> Bound:
    if isinstance(op, Diagonal):
        return 1.0 if op.mul is None else _peak(op.mul), 0.0 if op.add is None else _peak(op.add)
    if isinstance(op, Cross):
        first = torch.tensor([i for i in range(len(op.mul)) if not i & op.stride])
        second = first ^ op.stride
        pairs = torch.stack([op.mul[first], op.cross[first], op.cross[second], op.mul[second]], 1).view(-1, 2, 2)
        return float(torch.linalg.matrix_norm(pairs, 2).max()), 0.0
    return _bound_directions(op) if op.replacement is None else _bound_replacing(op, op.replacement)


def _bound_replacing(op: Directions, replacement: Replacement) -> Bound:
    """(1 - scale) x + scale * norm^-1(sum + bias), of which a layer norm's mean is no longer than x."""
    factor, constant = _bound_directions(op)  # of x + sum
    mean = float(op.norm == "layer_norm")
    bias = 0.0 if replacement.bias is None else _peak(replacement.bias)
    scale = abs(replacement.scale)
    return abs(1 - replacement.scale) + scale * (factor - 1.0 + mean), scale * (constant + bias)


def _bound_directions(op: Directions) -> Bound:
    a, b, c, d = op.args.unbind(1)
    kind = torch.tensor([int(phi) for phi in op.phi])
    bias = torch.zeros(len(kind)) if op.bias is None else op.bias

    def where(*phis: Phi) -> Tensor:
        return torch.stack([kind == phi for phi in phis]).any(0)

    slope = torch.zeros(len(kind))  # of the part that is linear in the reading
    slope = torch.where(where(Phi.AFFINE), a, slope)
    slope = torch.where(where(Phi.SET, Phi.CLAMP), -1.0, slope)
    bent = torch.zeros(len(kind))  # a Lipschitz bound of the part that is not
    bent = torch.where(where(Phi.GATED, Phi.TOP_K), b.abs(), bent)
    bent = torch.where(where(Phi.SILU), 1.1 * a.abs(), bent)
    bent = torch.where(where(Phi.ANGLE, Phi.ROTATE), 2.0, bent)
    fixed = (slope.abs() + bent) * bias.abs()
    fixed += torch.where(where(Phi.AFFINE), b.abs(), 0) + torch.where(where(Phi.SET, Phi.TANH, Phi.SIGN), a.abs(), 0)
    fixed += torch.where(where(Phi.CLAMP), a.abs().maximum(b.abs()), 0)
    fixed += torch.where(where(Phi.GATED, Phi.TOP_K), c.abs().maximum(d.abs()), 0)
    constant = float((fixed[:, None] * op.write.abs()).sum(0).max())
    if op.read is None:
        return 1.0, constant
    factor = _norm_of_linear(op.write, slope, op.read) if slope.any() else 1.0
    if bent.any():
        reach = bent * op.read.norm(dim=1) * op.write.norm(dim=1)
        factor += float((reach if op.top_k is None else reach.topk(min(op.top_k.k, len(reach))).values).sum())
    return factor, constant


def _norm_of_linear(write: Tensor, slope: Tensor, read: Tensor) -> float:
    """The spectral norm of  x -> x + sum over r of slope_r (read_r . x) write_r: 1 for projections."""
    basis, _ = torch.linalg.qr(torch.cat([write, read]).T)
    core = torch.eye(basis.shape[1]) + (basis.T @ write.T * slope) @ (read @ basis)
    return max(1.0, float(torch.linalg.matrix_norm(core, 2)))


def _peak(tensor: Tensor) -> float:
    return float(tensor.abs().max())
