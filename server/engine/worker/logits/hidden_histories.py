"""Hidden states of every position of a request, prompt included, for methods that compare a token with all before it.

The model's last hidden states pass into a buffer of fixed address, which a captured graph writes, too. After the
forward pass each request's are put where its positions are, scaled to length 1, so a prompt may come in chunks, and
what a preemption computes again writes over itself. Requests that keep them read no cached prefixes, of which there
would be no hidden states.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import normalize

from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.logits.metadata import sent
from whipstaff.server.engine.worker.logits.request_tables import fed


class HiddenHistories:
    """Of one worker: room for so many requests, taken once and for all."""

    def __init__(
        self, num: int, max_len: int, max_tokens: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """
        Args:
            num: requests that keep theirs at once; the scheduler lets no more in.
            max_len: tokens that a request can have.
            max_tokens: that one forward pass can have.
        """
        self._of_step = torch.zeros(max_tokens, hidden_size, dtype=dtype, device=device)
        self._states = torch.zeros(num, max_len, hidden_size, dtype=dtype, device=device)
        self._free = list(range(num))

    @property
    def num_held(self) -> int:
        return len(self._states) - len(self._free)

    def add(self) -> int:
        """A slot for a request."""
        return self._free.pop()

    def remove(self, slot: int) -> None:
        self._free.append(slot)

    def keep(self, hidden: Tensor) -> None:
        """(T, H) what a forward pass made of its tokens, after the final norm."""
        self._of_step[: len(hidden)].copy_(hidden)

    def note(self, view: BatchView, rows: Sequence[tuple[int, int]]) -> None:
        """Put what the step's pass made of (row, slot) each where it belongs."""
        if rows:
            device = self._states.device
            slots, positions, tokens = (sent(numbers, device) for numbers in fed(view, rows))
            hidden = self._of_step[tokens]
            self._states[slots, positions] = normalize(hidden.float(), dim=1).to(hidden.dtype)

    def of(self, slots: Sequence[int], lengths: Ints) -> list[Tensor]:
        """(length, H) of each slot, as views."""
        return [self._states[slot, :length] for slot, length in zip(slots, lengths.tolist(), strict=True)]
