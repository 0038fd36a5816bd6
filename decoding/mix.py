"""Mixing streams: one row of weights per row of logits, rows of different methods side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor

from whipstaff.cuda_ext import mix_logits_

_MOST_OTHERS = 7  # streams beside the base that one pass of the kernel takes; a batch may need more models than that


def mix_rows(base: Tensor, others: Sequence[Tensor], weights: Tensor) -> Tensor:
    """New float32 logits: row r is base[r] + sum over k of weights[r, k] * others[k][r].

    Args:
        base: (R, V) the served model's logits, any floating dtype; -inf (a banned token) stays -inf.
        others: (R, V_k) each. Columns beyond V are cut; columns that some stream lacks, which is vocabulary padding
            and has no token, keep the base's value.
        weights: (R, len(others)) float32. A row of zeros is left exactly as it was, whatever the streams hold.
    """
    num_rows, width = base.shape[0], min(logits.shape[-1] for logits in (base, *others))
    mixed = base.to(torch.float32, copy=True)
    shared = mixed[:, :width]
    every = torch.arange(num_rows, dtype=torch.int32, device=base.device)
    for first in range(0, len(others), _MOST_OTHERS):
        some, part = others[first : first + _MOST_OTHERS], weights[:, first : first + _MOST_OTHERS]
        rows = every[:, None].repeat(1, 1 + len(some))
        rows[:, 0] = torch.where((part != 0).any(-1), every, -1)
        mix_logits_(shared, [shared, *some], rows, torch.cat([part.new_ones(num_rows, 1), part], dim=1))
    return mixed
