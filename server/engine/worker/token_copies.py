"""Companions are given the tokens of their primaries, on the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


class TokenCopies:
    """Gives companions the token that was sampled for their primary, on the device."""

    def __init__(self) -> None:
        self.companion_rows: Sequence[
            tuple[int, int]
        ] = ()  # (companion's row, primary's row) in the step to be sampled
        self._placed: Sequence[tuple[int, int]] = ()
        self._rows = torch.empty(2, 0, dtype=torch.int64)

    def apply_(self, sampled: Tensor) -> None:
        """`sampled` (B, 1) token ids, a row for each of the step's; companions' are overwritten."""
        if not self.companion_rows:
            return
        if self.companion_rows != self._placed or self._rows.device != sampled.device:
            rows = torch.tensor(self.companion_rows, pin_memory=sampled.is_cuda).T.contiguous()
            self._placed, self._rows = self.companion_rows, rows.to(sampled.device, non_blocking=True)
        companions, primaries = self._rows
        sampled[companions] = sampled[primaries]
