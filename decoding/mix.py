"""Mixing streams: one row of weights per row of logits, rows of different methods side by side."""

from collections.abc import Mapping

import torch
from torch import Tensor


def mix_rows(base: Tensor, others: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> Tensor:
    """New float32 logits: row i is base[i] + sum over streams k of weights[k][i] * others[k][i].

    Args:
        base: (B, V) the served model's logits, any floating dtype.
        others: (B, V_k) by stream; columns beyond V are cut, and columns that a shorter stream lacks (vocabulary
            padding, which has no token) keep the base's value.
        weights: (B,) float32 by stream; a row of weight 0 is left exactly as it was, whatever the stream holds.

    Where the base is -inf (a banned token) the result is -inf.
    """
    mixed = base.to(torch.float32)
    if mixed is base:
        mixed = base.clone()
    for name, logits in others.items():
        width = min(base.shape[-1], logits.shape[-1])
        weight = weights[name][:, None]
        moved = mixed[:, :width] + weight * logits[:, :width].to(torch.float32)
        mixed[:, :width] = torch.where((weight == 0) | torch.isneginf(mixed[:, :width]), mixed[:, :width], moved)
    return mixed
