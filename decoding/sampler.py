"""What vLLM's sampler does to logits before it draws, for rows whose own temperature or truncation we do."""

import torch
from torch import Tensor

from whipstaff.cuda_ext import apply_temperature_

_GREEDY_BELOW = 1e-5  # as in vLLM


def apply_temperature(logits: Tensor, temperature: Tensor) -> Tensor:
    """logits / temperature; 0 leaves the first best token alone.

    logits (R, V) float32, changed in place and returned; temperature (R,) float32.
    """
    apply_temperature_(logits, temperature.masked_fill(temperature < _GREEDY_BELOW, 0.0))
    return logits


def apply_top_k_top_p_min_p(
    logits: Tensor, top_k: Tensor | None = None, top_p: Tensor | None = None, min_p: Tensor | None = None
) -> Tensor:
    """-inf for all but the plausible tokens: min_p, then top_k, then top_p of what those leave, as vLLM orders them.

    min_p keeps what is at least that share of the best token's probability. top_k keeps what is at least the k-th
    best. top_p sorts the least likely first and drops those whose mass so far is at most 1 - p, never the last.

    Args:
        logits: (R, V) float32, changed in place and returned.
        top_k: (R,) int64, 0 is off. None: off for all.
        top_p, min_p: (R,) float32, 1 and 0 are off. None: off for all.
    """
    if min_p is not None:
        p = logits.softmax(1)
        logits.masked_fill_(p < p.amax(1, keepdim=True) * min_p[:, None], -torch.inf)
    if top_k is None and top_p is None:
        return logits
    ascending, order = logits.sort(dim=1, stable=True)
    if top_k is not None:
        ascending.masked_fill_(ascending < _least_of_top(ascending, top_k), -torch.inf)
    if top_p is not None:
        share = top_p[:, None]
        is_tail = (ascending.softmax(1).cumsum(1) <= 1 - share) & (share < 1)
        is_tail[:, -1:] = False
        ascending.masked_fill_(is_tail, -torch.inf)
    return logits.scatter_(1, order, ascending)


def _least_of_top(ascending: Tensor, top_k: Tensor) -> Tensor:
    """(R, 1) the k-th best logit; -inf where k is off."""
    vocab = ascending.shape[1]
    place = (vocab - top_k).clamp(0, vocab - 1)[:, None]
    return ascending.gather(1, place).masked_fill(top_k[:, None] <= 0, -torch.inf)
