"""What is kept of requests between steps, on the device: their tokens, and the floats that methods remember."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.logits.metadata import MethodCall, sent

NO_TOKEN = -1
_FIRST_SLOTS = 8


class RequestTables:
    """A slot for each request with a method that reads tokens or remembers something. They grow as more are needed."""

    def __init__(self, max_len: int, device: torch.device) -> None:
        self._max_len, self._device = max_len, device
        self._free: list[int] = []
        self._tokens = torch.zeros(0, max_len, dtype=torch.int32, device=device)
        self._state = torch.zeros(0, 0, device=device)

    def add(self, prompt: Sequence[int], state_size: int) -> int:
        """A slot for a request whose methods remember so many floats, NaN at first."""
        if not self._free:
            num = len(self._tokens)
            more = max(num, _FIRST_SLOTS)
            self._free = list(range(num, num + more))
            self._tokens = torch.cat([self._tokens, self._tokens.new_zeros(more, self._max_len)])
            self._state = torch.cat([self._state, self._state.new_zeros(more, self._state.shape[1])])
        if (missing := state_size - self._state.shape[1]) > 0:
            self._state = torch.cat([self._state, self._state.new_zeros(len(self._state), missing)], 1)
        slot = self._free.pop()
        self._state[slot] = torch.nan
        self._tokens[slot, : len(prompt)] = torch.tensor(prompt, dtype=torch.int32)
        return slot

    def remove(self, slot: int) -> None:
        self._free.append(slot)

    def copy(self, slots: Sequence[tuple[int, int]]) -> None:
        """What is kept in the first of each pair is kept in the second, too; all at once."""
        sources, targets = sent(slots, self._device).unbind(1)
        self._tokens[targets], self._state[targets] = self._tokens[sources], self._state[sources]

    def note_tokens(self, view: BatchView, rows: Sequence[tuple[int, int]], input_ids: Tensor) -> None:
        """Keep the tokens that a step feeds to (row, slot) each. Ids of tokens just drawn are on the device only."""
        slots, positions, tokens = (sent(numbers, self._device) for numbers in fed(view, rows))
        self._tokens[slots, positions] = input_ids[tokens].to(torch.int32)

    def tokens_of(self, call: MethodCall, positions: Ints) -> Tensor:
        """(R, W) int64 of a call's rows, up to the token at `positions` (R,) each."""
        lengths, width = sent(positions + 1, self._device), int(positions.max()) + 1
        tokens = self._tokens[call.slots, :width].long()
        return tokens.masked_fill(torch.arange(width, device=self._device) >= lengths[:, None], NO_TOKEN)

    def state_of(self, call: MethodCall) -> Tensor:
        """(R, state_size), a copy."""
        return self._state[call.slots, call.state]

    def keep_state(self, call: MethodCall, state: Tensor) -> None:
        self._state[call.slots, call.state] = state


def fed(view: BatchView, rows: Sequence[tuple[int, int]]) -> tuple[Ints, Ints, Ints]:
    """Of every token that a step feeds to (row, slot) each: that slot, its absolute position, its number in the
    step."""
    index, slots = np.array(rows, np.int64).T
    lengths = np.diff(view.starts)[index]
    offsets = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
    positions = np.repeat(view.positions[index], lengths) + offsets
    return np.repeat(slots, lengths), positions, np.repeat(view.starts[index], lengths) + offsets
