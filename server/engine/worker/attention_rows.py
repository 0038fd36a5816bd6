"""What a layer attends to: how much a token looks at every position up to its own.

The queries of a step's tokens are kept on their way into the layer's kernel, in a buffer of fixed address, which a
captured graph writes, too. What is asked for is computed from them after the forward pass, over the layer's own paged
keys, for the rows concerned and no others; so chunked prefill, cached prefixes and recomputation after a preemption
need no thought. Tokens that are only tried (`lookahead`) keep their queries apart from the step's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from whipstaff.cuda_ext import attention_rows
from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.worker.batch import Ints
from whipstaff.server.engine.worker.kv_cache import CacheLayout, soft_cap, why_closed, why_not_scored
from whipstaff.server.engine.worker.logits.metadata import sent

BlockTables = Callable[[Any], list[tuple[Tensor, int]]]


class KeptQueries:
    """The queries of the tokens that passed the layer last."""

    def __init__(self, of_step: Tensor) -> None:
        self.of_step = of_step  # (max_tokens, heads, D)
        self.of_tried: Tensor | None = None  # (R, heads, D), while tokens are tried
        self.is_trying = False
        self.is_asked = True  # whether anybody will read those of the pass that comes; captured graphs always keep them

    def keep(self, query: Tensor) -> None:
        """(T, heads, D), after rotary embedding."""
        if self.is_trying:
            self.of_tried = query.clone()
        elif self.is_asked:
            self.of_step[: len(query)].copy_(query)


def _watched(cls: Any, queries: KeptQueries) -> type:
    """The class that is laid over that of an attention backend's implementation, from which it derives: its bases are
    such that another one would change the layout of instances."""

    class WatchedAttention(cls):
        def forward(self, owner: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
            queries.keep(query)
            return cls.forward(self, owner, query, *args, **kwargs)

    return WatchedAttention


class AttentionRows:
    """Of one layer of one worker's model."""

    def __init__(self, attention: Any, name: str, runner: Any, max_tokens: int, block_tables: BlockTables) -> None:
        """
        Args:
            attention: vLLM's.
            name: as messages call the layer.
            runner: vLLM's model runner.
            max_tokens: that one forward pass can have.
            block_tables: of the runner in a step; see `runner_v1.block_tables`.
        """
        dtype = runner.vllm_config.model_config.dtype
        self._attention, self._name = attention, name
        self._runner, self._block_tables = runner, block_tables
        shape = max_tokens, attention.num_heads, attention.head_size
        self._queries = KeptQueries(torch.zeros(shape, dtype=dtype, device=runner.device))
        self._layout: CacheLayout | None = None
        self._keys: Tensor | None = None  # all of them, where they lie
        swap(attention.impl, _watched(type(attention.impl), self._queries))

    @property
    def num_heads(self) -> int:
        """Of this rank."""
        return int(self._attention.num_heads)

    def own(self, heads: Sequence[int]) -> list[int]:
        """Those of the layer's heads that are this rank's, as it counts them, in ascending order."""
        first = self.num_heads * get_tensor_model_parallel_rank()
        return sorted(head - first for head in heads if first <= head < first + self.num_heads)

    def learn_layout(self) -> None:
        """Find out where the cache keeps keys, once it is there. Raises: UnsupportedEngine."""
        self._layout = CacheLayout.learn(self._attention, self._name)
        self._keys = self._layout.key_view(self._attention.kv_cache)

    def expect(self, is_asked: bool) -> None:
        """Say before a step's forward pass whether anything will be asked about it: otherwise nothing is kept."""
        self._queries.is_asked = is_asked

    def of_tokens(self, tokens: Ints, rows: Ints, positions: Ints) -> Tensor:
        """(R, heads, C) float32: how much some of a step's tokens looked at every position up to their own; 0 beyond.
        C is the longest row's length. After the step's forward pass.

        Args:
            tokens: (R,) their indices in the step.
            rows: (R,) whose they are, among the step's.
            positions: (R,) where they stand.
        """
        return self._attended(self._queries.of_step[sent(tokens, self._runner.device)], rows, positions + 1, False)

    def _attended(self, queries: Tensor, rows: Sequence[int] | Ints, lengths: Ints, head_max: bool) -> Tensor:
        """(R, heads, C), or the (R, C) maximum over this rank's heads, of (R, heads, D) queries that see `lengths` (R,)
        keys each."""
        assert self._layout is not None, "learn_layout comes first"
        device, size = self._runner.device, int(lengths.max())
        table, block_size = self._block_tables(self._runner)[self._group]
        assert block_size == self._layout.block_size
        blocks = table[sent(rows, device), : -(-size // block_size)]
        keys = self._keys
        if keys is None:
            keys = self._layout.keys_of(self._attention.kv_cache, blocks.flatten())
            blocks = torch.arange(len(keys), dtype=torch.int32, device=device).view(blocks.shape)
        context, scale = sent(lengths.astype(np.int32), device), float(self._attention.impl.scale)
        return attention_rows(queries, keys, blocks, context, scale, size, head_max=head_max)

    @property
    def _group(self) -> int:
        """Which of the groups of KV caches is the layer's."""
        groups = self._runner.kv_cache_config.kv_cache_groups
        return next(n for n, group in enumerate(groups) if self._attention.layer_name in group.layer_names)


def attention_of(model: nn.Module, layer: int | None, max_len: int, dtype: torch.dtype, flag: str) -> Any:
    """The attention of one of a model's blocks; None: of the last. Raises: UnsupportedEngine where it cannot be read
    exactly."""
    layers = {extract_layer_index(n): m for n, m in model.named_modules() if isinstance(m, AttentionLayerBase)}
    if not layers:
        raise UnsupportedEngine(f"{flag}: {type(model).__name__} shows no attention")
    name = "the last layer" if layer is None else f"layer {layer}"
    if (found := layers.get(max(layers) if layer is None else layer)) is None:
        raise UnsupportedEngine(f"{flag}: {name} has no attention")
    if reason := why_closed(found) or why_inexact(found, max_len, dtype):
        raise UnsupportedEngine(f"{flag}: {name}'s attention cannot be read: {reason}")
    return found


def why_inexact(attention: Any, max_len: int, dtype: torch.dtype) -> str:
    if attention.sliding_window is not None and attention.sliding_window < max_len:
        return f"it sees {attention.sliding_window} tokens only; serve with --max-model-len up to that"
    if attention.kv_cache_torch_dtype != dtype:
        return f"its keys are {attention.kv_cache_torch_dtype} and its queries {dtype}"
    return "its scores are capped" if soft_cap(attention) else why_not_scored(attention)
