"""The last layer's attention: how much a token looked at every position up to its own.

The queries of a step's tokens are kept on their way into the layer's kernel, in a buffer of fixed address, which a
captured graph writes, too. What is asked for is computed from them after the forward pass, over the layer's own paged
keys, for the rows concerned and no others; so chunked prefill, cached prefixes and recomputation after a preemption
need no thought. Tokens that are only tried (`lookahead`) keep their queries apart from the step's.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed import ReduceOp, all_reduce
from vllm.distributed import get_tensor_model_parallel_world_size, get_tp_group
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from whipstaff.cuda_ext import attention_rows
from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.kv_cache import CacheLayout, soft_cap, why_closed, why_not_scored
from whipstaff.server.engine.worker.logits.metadata import sent

FLAG = "--attention-rows"
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


class LastAttention:
    """Of one worker's model."""

    def __init__(self, model: nn.Module, runner: Any, max_tokens: int, block_tables: BlockTables) -> None:
        """
        Args:
            runner: vLLM's model runner.
            max_tokens: that one forward pass can have.
            block_tables: of the runner in a step; see `runner_v1.block_tables`.

        Raises: UnsupportedEngine where what the last layer attends to cannot be said exactly.
        """
        config = runner.vllm_config.model_config
        self._runner, self._block_tables = runner, block_tables
        self._attention = last_attention(model, config.max_model_len, config.dtype)
        shape = max_tokens, self._attention.num_heads, self._attention.head_size
        self._queries = KeptQueries(torch.zeros(shape, dtype=config.dtype, device=runner.device))
        self._layout: CacheLayout | None = None
        self._keys: Tensor | None = None  # all of them, where they lie
        swap(self._attention.impl, _watched(type(self._attention.impl), self._queries))

    def learn_layout(self) -> None:
        """Find out where the cache keeps keys, once it is there. Raises: UnsupportedEngine."""
        self._layout = CacheLayout.learn(self._attention, "the last layer")
        self._keys = self._layout.key_view(self._attention.kv_cache)

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
        self._queries.is_asked = is_asked
        if is_asked:
            self._queries.of_step[:num_tokens].zero_()

    def rows(self, view: BatchView, rows: Sequence[int]) -> Tensor:
        """(R, C) float32: how much the last token of each of a step's rows looked at every position up to its own, the
        largest probability among the heads; 0 beyond. C is the longest row's length. After the step's forward pass."""
        index = np.asarray(rows, np.int64)
        ends = view.starts[index + 1].astype(np.int64)
        lengths = view.positions[index] + ends - view.starts[index]
        return self._attended(self._queries.of_step[sent(ends - 1, self._runner.device)], rows, lengths)

    def of_tried(self, rows: Sequence[int], positions: Ints) -> Tensor:
        """The same of the tokens that were tried last, one after each of the rows.

        Args:
            positions: (R,) absolute, where those tokens stand.
        """
        queries, self._queries.of_tried = self._queries.of_tried, None
        assert queries is not None, "no token was tried"
        return self._attended(queries[: len(rows)], rows, positions + 1)

    def _attended(self, queries: Tensor, rows: Sequence[int], lengths: Ints) -> Tensor:
        """(R, C) of (R, heads, D) queries that see `lengths` (R,) keys each."""
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
        found = attention_rows(queries, keys, blocks, context, scale, size, head_max=True)
        if get_tensor_model_parallel_world_size() > 1:  # each rank has its own heads
            all_reduce(found, ReduceOp.MAX, get_tp_group().device_group)
        return found

    @property
    def _group(self) -> int:
        """Which of the groups of KV caches is the layer's."""
        groups = self._runner.kv_cache_config.kv_cache_groups
        return next(n for n, group in enumerate(groups) if self._attention.layer_name in group.layer_names)


def last_attention(model: nn.Module, max_len: int, dtype: torch.dtype) -> Any:
    """The attention of a model's last block. Raises: UnsupportedEngine where it cannot be read exactly."""
    layers = [name for name, module in model.named_modules() if isinstance(module, AttentionLayerBase)]
    if not layers:
        raise UnsupportedEngine(f"{FLAG}: {type(model).__name__} shows no attention")
    last = model.get_submodule(max(layers, key=extract_layer_index))
    if reason := why_closed(last) or _why_inexact(last, max_len, dtype):
        raise UnsupportedEngine(f"{FLAG}: the last layer's attention cannot be read: {reason}")
    return last


def _why_inexact(attention: Any, max_len: int, dtype: torch.dtype) -> str:
    if attention.sliding_window is not None and attention.sliding_window < max_len:
        return f"it sees {attention.sliding_window} tokens only; serve with --max-model-len up to that"
    if attention.kv_cache_torch_dtype != dtype:
        return f"its keys are {attention.kv_cache_torch_dtype} and its queries {dtype}"
    return "its scores are capped" if soft_cap(attention) else why_not_scored(attention)
