"""The last layer's attention, for decoding methods: the largest probability among the heads of all ranks."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group

from whipstaff.server.engine.worker.attention_rows import AttentionRows, BlockTables, attention_of
from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.logits.metadata import sent

FLAG = "--attention-rows"


class LastAttention(AttentionRows):
    """Of one worker's model."""

    def __init__(self, model: nn.Module, runner: Any, max_tokens: int, block_tables: BlockTables) -> None:
        """As `AttentionRows`. Raises: UnsupportedEngine where what the last layer attends to cannot be said exactly."""
        config = runner.vllm_config.model_config
        attention = attention_of(model, None, config.max_model_len, config.dtype, FLAG)
        super().__init__(attention, "the last layer", runner, max_tokens, block_tables)

    @contextmanager
    def trying(self) -> Iterator[None]:
        """A forward pass over tokens that are tried, after which `of_tried` can say what they looked at."""
        self._queries.is_trying = True
        try:
            yield
        finally:
            self._queries.is_trying = False

    def begin_step(self, num_tokens: int, is_asked: bool) -> None:
        """Before a step's forward pass: what is read after it is the step's own, or nothing that could be taken for
        it."""
        self.expect(is_asked)
        if is_asked:
            self._queries.of_step[:num_tokens].zero_()

    def rows(self, view: BatchView, rows: Sequence[int]) -> Tensor:
        """(R, C) float32: how much the last token of each of a step's rows looked at every position up to its own, the
        largest probability among the heads; 0 beyond. C is the longest row's length. After the step's forward pass."""
        index = np.asarray(rows, np.int64)
        ends = view.starts[index + 1].astype(np.int64)
        lengths = view.positions[index] + ends - view.starts[index]
        return self._largest(self._queries.of_step[sent(ends - 1, self._runner.device)], rows, lengths)

    def of_tried(self, rows: Sequence[int], positions: Ints) -> Tensor:
        """The same of the tokens that were tried last, one after each of the rows.

        Args:
            positions: (R,) absolute, where those tokens stand.
        """
        queries, self._queries.of_tried = self._queries.of_tried, None
        assert queries is not None, "no token was tried"
        return self._largest(queries[: len(rows)], rows, positions + 1)

    def _largest(self, queries: Tensor, rows: Sequence[int], lengths: Ints) -> Tensor:
        """(R, C) of (R, heads, D) queries that see `lengths` (R,) keys each."""
        found = self._attended(queries, rows, lengths, head_max=True)
        if get_tensor_model_parallel_world_size() > 1:  # each rank has its own heads
            all_reduce(found, ReduceOp.MAX, get_tp_group().device_group)
        return found
