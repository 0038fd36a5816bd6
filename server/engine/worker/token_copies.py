"""Companions are given the tokens of their primaries, on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenCopies:
    """Keeps the rows on the device, since a batch that decodes has the same from step to step."""

    def __init__(self) -> None:
        self._sent: Sequence[tuple[int, int]] = ()  # what `_rows` holds
        self._rows = torch.empty(2, 0, dtype=torch.int64)

    def apply_(self, sampled: Tensor, companion_rows: Sequence[tuple[int, int]]) -> None:
        """Overwrite companions' tokens.

        Args:
            sampled: (B, 1) token ids, a row for each of the step's.
            companion_rows: see `BatchView`.
        """
        if not companion_rows:
            return
        if companion_rows != self._sent or self._rows.device != sampled.device:
            rows = torch.tensor(companion_rows, pin_memory=sampled.is_cuda).T.contiguous()
            self._sent, self._rows = companion_rows, rows.to(sampled.device, non_blocking=True)
        companions, primaries = self._rows
        sampled[companions] = sampled[primaries]
