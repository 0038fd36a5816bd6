"""Soft prompts: learned rows take the place of placeholder tokens' embeddings.

The module that embeds tokens (see `sites.install_soft_rows`) overrides its output by two persistent buffers, which a
step fills where it has placeholders. That is after the all-reduce of a vocabulary shared out over ranks and before
models such as Gemma scale what the embedding gives.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from whipstaff.server.engine.worker.batch import BatchView, TokenSpan
from whipstaff.steering.kinds.rows import ROWS_PART
from whipstaff.steering.vector_file import Vector

NOTHING = -1


class NoSoftRows:
    """Where learned rows cannot take the place of tokens."""

    is_on = False

    def begin_step(self, view: BatchView) -> None:
        """Nobody asks for any."""


class SoftRows:
    """`rows` (max_tokens, H) in the model's type and `index` (max_tokens,) int32 are on the model's device; their
    addresses never change, so captured graphs read them. Token t of a step gets row index[t], if that is not NOTHING.
    """

    is_on = True

    def __init__(
        self,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        vector_of: Callable[[str], Vector],
    ) -> None:
        self.rows = torch.zeros(max_tokens, hidden_size, dtype=dtype, device=device)
        self.index = torch.full((max_tokens,), NOTHING, dtype=torch.int32, device=device)
        self._own = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self._vector_of = vector_of
        self._dirty = 0  # how many leading entries of `index` may differ from NOTHING

    def begin_step(self, view: BatchView) -> None:
        """Put the learned rows of this step's placeholders where its tokens stand."""
        if self._dirty:
            self.index[: self._dirty] = NOTHING
            self._dirty = 0
        for tokens, rows in self._learned(view):
            own = slice(tokens.first, tokens.last)
            self.rows[own].copy_(rows, non_blocking=True)
            self.index[own] = self._own[own]
            self._dirty = tokens.last

    def _learned(self, view: BatchView) -> Iterator[tuple[TokenSpan, Tensor]]:
        """The step's placeholders and the rows (n, H) that they get, on the host, in order of their tokens."""
        for row, placed in view.planned():
            for digest, start, num in placed.inserts:
                learned = self._vector_of(digest).shared_parts.get(
                    ROWS_PART
                )  # None: keys and values are learned instead
                tokens = view.tokens_at(row, start, start + num)
                if tokens is not None and learned is not None:
                    skipped = tokens.position - start
                    yield tokens, learned[skipped : skipped + tokens.last - tokens.first]
