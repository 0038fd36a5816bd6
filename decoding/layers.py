"""Contrasting layers: which early layer differs most from the last one, and what the last one says beyond it.

    q = softmax(mature)    p = softmax(early)    m = (p + q) / 2
    d = 1/2 sum over v of  m (log m - log q) + m (log m - log p)

The divergence has its arguments the other way round than Jensen and Shannon's: so it is in the authors' code, with
which all published numbers were made. Chuang et al. 2024, arXiv:2309.03883.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from whipstaff.cuda_ext import mix_logits_


def choose(divergence: Tensor, num_early: Sequence[int]) -> Tensor:
    """(R,) int64: for each mature row which of its early rows differs most, the first of equals.

    Args:
        divergence: (P,) row after row.
        num_early: (R,) how many belong to each; at least one.
    """
    counts = torch.tensor(num_early, dtype=torch.int64)[:, None]
    starts = counts.cumsum(0) - counts
    own = starts + torch.arange(max(num_early, default=1)).minimum(counts - 1)  # the last one again where it has fewer
    own = own.to(divergence.device, non_blocking=True)
    return own.gather(1, divergence[own].argmax(1, keepdim=True))[:, 0]


def contrast(mature: Tensor, early: Tensor, chosen: Tensor, relative_top: Tensor) -> Tensor:
    """(R, V) float32: log-softmax(mature) - log-softmax(early[chosen]) on the tokens that the mature row finds
    plausible, -inf elsewhere.

    Args:
        mature: (R, V) logits; banned tokens stay banned.
        early: (P, >= V) logits.
        chosen: (R,) int64, a row of `early` for each.
        relative_top: (R,) float32. A token is plausible if it is at least this times as likely as the best; 0: all are.
    """
    scores = mature.to(torch.float32, copy=True)
    rows = torch.stack([torch.arange(len(mature), device=mature.device), chosen], 1)
    weights = scores.new_tensor([[1.0, -1.0]]).expand(len(mature), -1).contiguous()
    alphas = torch.stack([relative_top, torch.zeros_like(relative_top)], 1)
    mix_logits_(scores, [scores, early], rows, weights, log_softmax=weights != 0, alphas=alphas)
    return scores


def scored(
    mature: Tensor, early: Tensor, chosen: Tensor, relative_top: Tensor, post_softmax: Tensor, fill: Tensor
) -> Tensor:
    """(R, V) float32 what the authors sum over an answer's tokens: the contrast of all tokens, normalised or not, and
    another value where a token is not plausible.

    Args:
        mature, early, chosen, relative_top: as for `contrast`.
        post_softmax: (R,) bool whether scores are normalised, before some are replaced.
        fill: (R,) float32 the score of what is not plausible.
    """
    plausible = contrast(mature, early, chosen, relative_top) > -torch.inf
    scores = contrast(mature, early, chosen, torch.zeros_like(relative_top))
    scores = torch.where(post_softmax[:, None], scores.log_softmax(-1), scores)
    return torch.where(plausible | (scores == -torch.inf), scores, fill[:, None])
