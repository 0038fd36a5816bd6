"""A source whose activations are noise and what was planted there, where a text holds a token: fits have to find it."""

from collections.abc import Iterator, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from whipstaff.steering.fit.source import Asked, Entry, Gives
from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import ModelShape

SHAPE = ModelShape(
    architecture="Planted", hidden_size=24, num_layers=6, num_heads=4, head_dim=6, num_kv_heads=4, num_experts=8
)


class Planted:
    """Where the token `mark` stands, the planted numbers are added to the noise.

    Args:
        numbers: what is added at a place.
    """

    shape = SHAPE
    experts_per_token = 2
    max_len = None
    gives: frozenset[Gives] = frozenset({"rows", "answers", "weights"})

    def __init__(
        self, tokenizer: Any, mark: int, numbers: dict[HookPoint, Tensor], fails_at: int | None = None
    ) -> None:
        self.tokenizer, self.mark, self.numbers, self.fails_at = tokenizer, mark, numbers, fails_at
        self.num_read = 0

    def identity(self) -> dict[str, Any]:
        return {"model": "planted", "model_digest": "0" * 64, "dtype": "float32"}

    def read(self, asked: Sequence[Asked], points: Sequence[HookPoint]) -> Iterator[dict[HookPoint, Tensor]]:
        for each in asked:
            if self.num_read == self.fails_at:
                raise KeyboardInterrupt
            self.num_read += 1
            yield {point: self._rows(each, point) for point in points}

    def _rows(self, asked: Asked, point: HookPoint) -> Tensor:
        noise = torch.Generator().manual_seed(crc32(repr((asked.ids, point)).encode()))
        rows = torch.randn(len(asked.ids), SHAPE.width(point.site), generator=noise)
        if self.mark in asked.ids and point in self.numbers:
            rows += self.numbers[point]
        chosen = rows[list(asked.positions)]
        return chosen.mean(0, keepdim=True) if asked.is_mean else chosen

    def predict(self, texts: Sequence[tuple[int, ...]], entries: Sequence[Entry] = ()) -> Iterator[Tensor]:
        raise NotImplementedError
