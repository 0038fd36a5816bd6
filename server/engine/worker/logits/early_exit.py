"""Early layers: what the model's own head makes of streams that were kept on their way through it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from whipstaff.server.engine.worker.lora import StepAdapters
from whipstaff.steering.tables import Tables


class EarlyStream(NamedTuple):
    """One token's stream at an early layer, as it stands there or after the model's final norm."""

    layer: int
    token: int  # of the step
    is_normed: bool


class EarlyHead:
    """Reads the buffers of `Tables.kept` with the model's head; valid from a forward pass to the next."""

    def __init__(
        self, head: Callable[[Tensor], Tensor], norm: nn.Module | None, tables: Tables, adapters: StepAdapters
    ) -> None:
        """
        Args:
            head: (P, H) hidden states -> (P, V) logits, as the model itself computes them.
            norm: the model's final norm, if its structure shows it.
        """
        self._head, self._norm, self._tables, self._adapters = head, norm, tables, adapters

    @property
    def has_norm(self) -> bool:
        return self._norm is not None

    def logits(self, streams: Sequence[EarlyStream]) -> Tensor:
        """(P, V) a row for each, with one product for all of them."""
        order = sorted(range(len(streams)), key=lambda index: streams[index].layer)
        layers = [streams[index].layer for index in order]
        rows = self._tables.kept(layers[0])
        hidden = rows.new_empty(len(streams), rows.shape[1])
        table = torch.tensor([order, [streams[index].token for index in order]]).to(rows.device, non_blocking=True)
        for layer in sorted(set(layers)):
            first = layers.index(layer)
            into, tokens = table[:, first : first + layers.count(layer)]
            hidden[into] = self._tables.kept(layer)[tokens]
        if normed := [index for index, stream in enumerate(streams) if stream.is_normed]:
            assert self._norm is not None
            hidden[normed] = self._norm(hidden[normed])
        with self._adapters.of([stream.token for stream in streams]):
            return self._head(hidden)
