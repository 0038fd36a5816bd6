"""The best tokens of rows, each with a number of its own."""

import torch
from torch import Tensor


def only_best(logits: Tensor, k: Tensor, most: int) -> Tensor:
    """(R, V) with -inf for all but each row's k (R, 1) best tokens, of equal ones the first; `most` is the largest
    k."""
    values = logits.topk(most).values
    least = values.gather(1, k - 1)
    room = k - (values > least).sum(1, keepdim=True)  # for those that equal the k-th
    is_tied = logits == least
    is_late = is_tied.cumsum(1, dtype=torch.int32) > room
    return logits.masked_fill((logits < least) | (is_tied & is_late), -torch.inf)
