"""How many tokens a row of logits allows, counted without a mask as large as the rows."""

import torch
from torch import Tensor

from whipstaff.cuda_ext import mix_logits_


def num_allowed(logits: Tensor) -> Tensor:
    """(R,) int32 how many of (R, V) logits are not -inf. A row that is mixed of itself alone stays, and is counted."""
    own = torch.arange(len(logits), device=logits.device)[:, None]
    num = torch.zeros_like(own[:, 0], dtype=torch.int32)
    mix_logits_(logits, [logits], own, torch.ones_like(own, dtype=torch.float32), num_allowed=num)
    return num
