"""Looking ahead: what the served model makes of a token that is not chosen yet.

Between a step's logits and its draw, the base model runs once more over one token for each row that asks, at the
position where the token that is drawn will stand. Its keys and values go where that token's will go: the scheduler sets
the place apart (`num_lookahead_tokens`), every token that is tried writes over the one before, and the token that was
drawn comes last, in its own step, before anything reads that place or names its block. Auxiliary models do not run, and
graphs are not replayed.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from whipstaff.decoding.search.search import Tried
from whipstaff.server.engine.worker.attention_rows import BlockTables
from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.edits.step_edits import StepEdits
from whipstaff.server.engine.worker.logits.last_attention import LastAttention
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
        attention: LastAttention | None = None,
    ) -> None:
        """
        Args:
            runner: vLLM's model runner.
            base: the served model's forward pass, without auxiliary models.
            edits: which steer a token that is tried as if it had been drawn.
            block_tables: of the runner in a step; see `runner_v1.block_tables`.
            attention: the last layer's, where it can be read.
        """
        self._runner, self._base, self._edits, self._block_tables = runner, base, edits, block_tables
        self._adapters, self._attention = adapters, attention
        self._model = runner.get_model()
        self._takes_embeddings = bool(runner.supports_mm_inputs)  # as vLLM feeds all tokens to who can see images
        self.num_passes = 0  # since the start
        self._max_len = int(runner.vllm_config.model_config.max_model_len)

    def after(
        self, view: BatchView, rows: Sequence[int], positions: Ints, reads_attention: bool = False
    ) -> Callable[[Tensor], Tried]:
        """What tries a token for each of R rows of a step: (R,) ids -> what the model makes of each. To be called
        before the step's draw.

        Args:
            rows: of the step.
            positions: (R,) absolute, of each row's last token.
            reads_attention: whether what the tokens look at is wanted, too.
        """
        attention = self._attention if reads_attention else None
        assert attention is not None or not reads_attention, "this server keeps no queries"
        last = [int(view.starts[row + 1]) - 1 for row in rows]
        prepared = cache(lambda: self._prepared(view, rows, positions + 1))  # not for who never tries

        def try_(tokens: Tensor) -> Tried:
            (tried, at, metadata, slots), ids = prepared(), tokens.to(torch.int32)
            self.num_passes += 1
            with (
                self._adapters.of(last),
                self._edits.trying(tried, ids),
                self._attention.trying() if self._attention else nullcontext(),
                set_forward_context(
                    metadata,
                    self._runner.vllm_config,
                    num_tokens=len(rows),
                    cudagraph_runtime_mode=CUDAGraphMode.NONE,
                    slot_mapping=slots,
                ),
            ):
                hidden = self._pass(ids, at)
            return Tried(hidden, attention.of_tried(rows, positions + 1) if attention else None)

        return try_

    def _pass(self, ids: Tensor, positions: Tensor) -> Tensor:
        """(R, H) of (R,) tokens."""
        if not self._takes_embeddings:
            return self._base(ids, positions, None, None)
        embedded = self._model.embed_input_ids(ids)
        return self._base(ids if self._model.requires_raw_input_tokens else None, positions, None, embedded)

    def _prepared(
        self, view: BatchView, rows: Sequence[int], positions: Ints
    ) -> tuple[BatchView, Tensor, dict[str, Any], dict[str, Tensor]]:
        """The rows with a token each, the tokens' positions, and by layer what attention reads and where it writes."""
        assert positions.max() < self._max_len, "the token that is drawn would not fit the model's context"
        tried = BatchView(
            plans=[view.plans[row] for row in rows],
            starts=np.arange(len(rows) + 1),
            positions=positions,
            requests=[view.requests[row] for row in rows],
        )
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
        return tried, at, attention, slots
