"""Looking ahead: what the served model makes of a token that is not chosen yet.

Between a step's logits and its draw, the base model runs once more over tokens for each row that asks, at the position
where the token that is drawn will stand. Their keys and values go where that token's will go: the scheduler sets the
place apart (`num_lookahead_tokens`), every token that is tried writes over the one before (`fan`), and the token that
was drawn comes last, in its own step, before anything reads that place or names its block. Auxiliary models do not run,
and graphs are not replayed.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from whipstaff.decoding.search.search import Tried
from whipstaff.server.engine.config import max_tokens
from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.edits.step_edits import StepEdits
from whipstaff.server.engine.worker.logits.fan import Fan
from whipstaff.server.engine.worker.logits.last_attention import BlockTables, LastAttention
from whipstaff.server.engine.worker.logits.metadata import sent
from whipstaff.server.engine.worker.lora import StepAdapters


class NoLookahead:
    """Where the scheduler sets no place apart."""

    num_passes = 0

    def after(self, view: BatchView, rows: Sequence[int], positions: Ints, reads_attention: bool = False) -> None:
        """Methods do without."""


class Lookahead:
    """Of one worker."""

    def __init__(
        self,
        runner: Any,
        base: Callable[..., Tensor],
        edits: StepEdits,
        block_tables: BlockTables,
        adapters: StepAdapters,
        fan: Fan,
        attention: LastAttention | None = None,
    ) -> None:
        """
        Args:
            runner: vLLM's model runner.
            base: the served model's forward pass, without auxiliary models.
            edits: which steer a token that is tried as if it had been drawn.
            block_tables: of the runner in a step; see `runner_v1.block_tables`.
            fan: of the served model.
            attention: the last layer's, where it can be read.
        """
        self._runner, self._base, self._edits, self._block_tables = runner, base, edits, block_tables
        self._adapters, self._fan, self._attention = adapters, fan, attention
        self._max_tokens = max_tokens(runner.vllm_config)
        self.num_passes = 0  # since the start
        self._max_len = int(runner.vllm_config.model_config.max_model_len)

    def after(
        self, view: BatchView, rows: Sequence[int], positions: Ints, reads_attention: bool = False
    ) -> Callable[[Tensor], Tried]:
        """What tries tokens after each of R rows of a step: (R, N) ids -> what the model makes of each. To be called
        before the step's draw.

        Args:
            rows: of the step.
            positions: (R,) absolute, of each row's last token.
            reads_attention: whether what the tokens look at is wanted, too.
        """
        assert self._attention is not None or not reads_attention, "this server keeps no queries"
        once = cache(lambda: self._prepared(rows, positions + 1))  # not for who never tries
        num_at_once = cache(lambda: self._num_at_once(_tried(view, rows, positions + 1, 1)))

        def try_(tokens: Tensor) -> Tried:
            attention, slots = once()
            hidden: list[Tensor] = []
            looked: list[Tensor] = []
            for some in torch.split(tokens.to(torch.int32), num_at_once(), 1):
                num = some.shape[1]
                self.num_passes += 1
                with ExitStack() as stack:
                    stack.enter_context(self._adapters.of([int(view.starts[row + 1]) - 1 for row in rows] * num))
                    ids, tried = some.T.flatten(), _tried(view, rows, positions + 1, num)
                    stack.enter_context(self._edits.trying(tried, ids))
                    if self._attention is not None:
                        found = stack.enter_context(self._attention.trying(rows, positions + 1, reads_attention))
                    stack.enter_context(self._fan.turns(num))
                    context = set_forward_context(
                        attention,
                        self._runner.vllm_config,
                        num_tokens=len(ids),
                        cudagraph_runtime_mode=CUDAGraphMode.NONE,
                        slot_mapping=slots,
                    )
                    stack.enter_context(context)
                    at = sent(tried.positions.astype(np.int64), self._runner.device)
                    hidden += self._base(ids, at, None, None).chunk(num)
                looked += found if self._attention is not None else ()
            return Tried(torch.stack(hidden, 1), torch.stack(looked, 1) if reads_attention else None)

        return try_

    def _num_at_once(self, tried: BatchView) -> int:
        """How many tokens of each row one pass can try."""
        if not self._fan.can_turn or self._edits.tries_one_at_a_time(tried):
            return 1
        return max(1, self._max_tokens // len(tried.plans))

    def _prepared(self, rows: Sequence[int], positions: Ints) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """By layer what the attention of a token of each row reads, and where it writes."""
        assert positions.max() < self._max_len, "the token that is drawn would not fit the model's context"
        device = self._runner.device
        here, at = sent(rows, device), sent(positions.astype(np.int64), device)
        starts = torch.arange(len(rows) + 1, dtype=torch.int32)
        lengths = torch.from_numpy(positions.astype(np.int32) + 1)
        attention: dict[str, Any] = {}
        slots: dict[str, Tensor] = {}
        cached = self._runner.kv_cache_config.kv_cache_groups
        for (table, size), group, parts in zip(
            self._block_tables(self._runner), cached, self._runner.attn_groups, strict=True
        ):
            blocks = table[here]
            slot = blocks.gather(1, (at // size)[:, None])[:, 0].long() * size + at % size
            common = CommonAttentionMetadata(
                query_start_loc=starts.to(device),
                query_start_loc_cpu=starts,
                seq_lens=lengths.to(device),
                seq_lens_cpu_upper_bound=lengths,
                num_reqs=len(rows),
                num_actual_tokens=len(rows),
                max_query_len=1,
                max_seq_len=int(lengths.max()),
                block_table_tensor=blocks,
                slot_mapping=slot,
                causal=True,
                positions=at,
                is_prefilling=torch.zeros(len(rows), dtype=torch.bool),
            )
            slots |= dict.fromkeys(group.layer_names, slot)
            for part in parts:
                attention |= dict.fromkeys(part.layer_names, part.build_metadata(common))
        return attention, slots


def _tried(view: BatchView, rows: Sequence[int], positions: Ints, num: int) -> BatchView:
    """Some rows of a step with one token each, so many times."""
    return BatchView(
        plans=[view.plans[row] for row in rows] * num,
        starts=np.arange(len(rows) * num + 1),
        positions=np.tile(positions, num),
        requests=[view.requests[row] for row in rows] * num,
    )
