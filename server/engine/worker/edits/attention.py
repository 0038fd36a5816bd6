"""Edits inside attention: a request's own, on chosen tokens, in chosen layers and heads.

RowOverride    z_h <- sum_j w_j v_j                    a head's attention row is given (circuit repair)
ScoreBias      score_h[., j] += b_j                    before the softmax (PASTA: ln(alpha) outside highlighted spans)
SideAttention  z_h += g_h softmax(s q_h K_h^T) V_h     gated attention to learned rows (LLaMA-Adapter, Aligner)
PrefixKV       k_p, v_p <- learned rows                the request's first positions hold no text (P-tuning v2)

z_h is head h's output before the output projection. On one token biases come first, then overrides, then side
attention.

vLLM calls an attention backend's implementation from within two opaque operators, which it runs in Python and outside
of compiled and captured code (`require_eager_attention` sees to that), so the implementation objects are what is
changed. Where no request of a step asks for anything, the price is one look at an empty dict. What is asked for is
computed again from the paged KV cache, for the rows, heads and tokens concerned and no others; so chunked prefill,
cached prefixes and recomputation after a preemption need no thought: keys and values are where vLLM's kernels find
them.

Positions are absolute. With a PrefixKV the prompt begins with that many placeholder tokens, whatever their ids: their
queries come to nothing, their keys and values are overwritten before they enter the cache.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear
from vllm.model_executor.models.utils import extract_layer_index

from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.worker.kv_cache import CacheLayout, soft_cap, why_closed, why_not_scored
from whipstaff.steering.kinds.attention import AttentionEdit, PrefixRows, RowOverride, ScoreBias, SideTokens
from whipstaff.steering.served import AttentionAbilities

_MAX_SCORES = 1 << 24  # scores computed at once: 64 MiB of float32


class AttentionError(ValueError):
    """An edit that this model cannot be given."""


@dataclass(frozen=True, eq=False)
class SideAttention:
    """Per layer (N, kv_heads, D) keys, (N, kv_heads, Dv) values and (heads,) gates, this rank's."""

    rows: Mapping[int, tuple[Tensor, Tensor, Tensor]]
    scale: float = 1.0

    @property
    def layers(self) -> Iterable[int]:
        return self.rows


@dataclass(frozen=True, eq=False)
class PrefixKV:
    """Per layer (P, kv_heads, D) keys as they are scored, never rotated, and (P, kv_heads, Dv) values, this rank's."""

    rows: Mapping[int, tuple[Tensor, Tensor]]
    length: int

    @property
    def layers(self) -> Iterable[int]:
        return self.rows


LayerEdit = RowOverride | ScoreBias | SideAttention | PrefixKV
L = TypeVar("L", bound=LayerEdit)


@dataclass(frozen=True)
class AttentionSpan:
    """Consecutive tokens of one request to which one edit applies in this step."""

    row: int  # of the batch
    start: int  # tokens [start, end) of the step
    end: int
    position: int  # absolute, of the token at `start`
    edit: LayerEdit


class AttentionEdits:
    """The edits of the current step, and the model's attention layers that obey them.

    worker.load_model             -> AttentionEdits(model)
    worker, once KV is allocated  -> learn_layouts
    runner adapter                -> begin_step, end_step
    """

    def __init__(self, model: nn.Module) -> None:
        """Raises: UnsupportedEngine when no layer can be edited, with each one's reason."""
        self.lacking: dict[int, str] = {}  # why layers that have attention cannot be edited
        self._sites: dict[int, _Site] = {}
        self._queries: dict[int, list[AttentionSpan]] = {}  # per layer, sorted by `_turn`
        self._prefixes: dict[int, list[AttentionSpan]] = {}
        holders = {child: module for module in model.modules() for child in module.children()}
        for attention in [module for module in model.modules() if isinstance(module, Attention)]:
            layer = extract_layer_index(attention.layer_name)
            if reason := why_closed(attention):
                self.lacking[layer] = reason
                continue
            self._sites[layer] = _Site(attention, _projection(holders.get(attention)))
            self._adopt(attention.impl, layer)
        if not self._sites:
            raise UnsupportedEngine(f"no attention layer of {type(model).__name__} can be edited: {self.lacking}")

    @property
    def layers(self) -> list[int]:
        """0-based indices of the blocks whose attention obeys."""
        return list(self._sites)

    @property
    def abilities(self) -> AttentionAbilities:
        return AttentionAbilities(
            self.layers,
            bias=[layer for layer, site in self._sites.items() if not site.why_no_bias],
            side=[layer for layer, site in self._sites.items() if site.can_project],
            windows={layer: site.window for layer, site in self._sites.items() if site.window},
            lacking=dict(self.lacking),
        )

    def made(self, edit: AttentionEdit) -> LayerEdit:
        """An edit with its learned numbers as this rank's layers take them. Raises: AttentionError."""
        match edit:
            case SideTokens():
                return replace(self.side_attention(edit.tokens, edit.gates), scale=edit.scale)
            case PrefixRows():
                return self.prefix_kv(edit.rows)
        return edit

    def check(self, edit: LayerEdit) -> None:
        """Raises: AttentionError when a layer cannot be given `edit`."""
        for layer in edit.layers:
            site = self._sites.get(layer)
            if site is None:
                reason = self.lacking.get(layer, f"it has no attention; layers that have: {self.layers}")
                raise AttentionError(f"layer {layer}: {reason}")
            if isinstance(edit, ScoreBias) and site.why_no_bias:
                raise AttentionError(f"layer {layer}: {site.why_no_bias}")

    def learn_layouts(self) -> None:
        """Find out where each layer's cache keeps keys and values. Raises: UnsupportedEngine."""
        for layer, site in self._sites.items():
            site.layout = CacheLayout.learn(site.attention, f"layer {layer}")

    def side_attention(self, rows: Mapping[int, Tensor], gates: Mapping[int, Tensor]) -> SideAttention:
        """Learned rows, (N, hidden_size) per layer, through each layer's own key and value projections.

        Args:
            gates: per layer a scalar, or (heads,) of the whole model.

        Raises:
            AttentionError: naming a layer without such a site or without a fused projection.
        """
        made: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        for layer, learned in rows.items():
            site = self._site(layer)
            made[layer] = *site.project(learned, layer), site.own_heads(gates[layer])
        return SideAttention(made)

    def prefix_kv(self, rows: Mapping[int, tuple[Tensor, Tensor]]) -> PrefixKV:
        """Learned keys and values, (P, kv_heads, D) per layer, of the whole model. Raises: AttentionError."""
        made = {}
        for layer, (keys, values) in rows.items():
            made[layer] = self._site(layer).own_rows(keys), self._site(layer).own_rows(values)
        (length,) = {len(part) for pair in made.values() for part in pair}
        return PrefixKV(made, length)

    def begin_step(self, found: Iterable[AttentionSpan]) -> None:
        """Say what the step's tokens ask for."""
        self.end_step()
        queries: dict[int, list[AttentionSpan]] = defaultdict(list)
        prefixes: dict[int, list[AttentionSpan]] = defaultdict(list)
        for span in found:
            if not isinstance(span.edit, PrefixKV):
                for layer in span.edit.layers:
                    queries[layer].append(span)
            elif (num := span.edit.length - span.position) > 0:  # tokens after the placeholders are text
                span = replace(span, end=min(span.end, span.start + num))
                for layer in span.edit.layers:
                    prefixes[layer].append(span)
        self._prefixes = dict(prefixes)
        self._queries = {layer: sorted(asked, key=_turn) for layer, asked in queries.items()}

    def end_step(self) -> None:
        """Until the next step nobody asks for anything."""
        if self._queries or self._prefixes:
            self._queries, self._prefixes = {}, {}

    def _site(self, layer: int) -> "_Site":
        if layer not in self._sites:
            raise AttentionError(f"layer {layer} has no attention that can be edited; layers that have: {self.layers}")
        return self._sites[layer]

    def _adopt(self, impl: Any, layer: int) -> None:
        cls: Any = type(impl)
        edits = self

        class EditedAttention(cls):
            def forward(
                self, owner: Any, query: Tensor, key: Any, value: Any, kv_cache: Tensor, metadata: Any, output: Tensor,
                *args: Any, **kwargs: Any,
            ) -> Tensor:  # fmt: skip
                result: Tensor = cls.forward(
                    self, owner, query, key, value, kv_cache, metadata, output, *args, **kwargs
                )
                if edits._queries and metadata is not None:
                    edits._edit(layer, query, kv_cache, metadata.block_table, output)
                return result

            def do_kv_cache_update(self, owner: Any, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> None:
                if edits._prefixes:
                    key, value = edits._with_prefixes(layer, key, value)
                cls.do_kv_cache_update(self, owner, key, value, *args, **kwargs)

        swap(impl, EditedAttention)

    def _edit(self, layer: int, query: Tensor, cache: Tensor, block_table: Tensor, output: Tensor) -> None:
        """Edit (T, heads, Dv) `output` in place, for the tokens that ask."""
        asked = self._queries.get(layer)
        if not asked:
            return
        for (_, row), group in groupby(asked, key=_turn):
            spans = list(group)
            apply = _APPLIED[type(spans[0].edit)]
            apply(self._sites[layer], layer, spans, query, cache, block_table[row], output)

    def _with_prefixes(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of (T, kv_heads, D) keys and values in which the tokens of prefixes have the learned ones."""
        asked = self._prefixes.get(layer)
        if asked:
            key, value = key.clone(), value.clone()
            for span in asked:
                assert isinstance(span.edit, PrefixKV)
                keys, values = span.edit.rows[layer]
                taken = slice(span.position, span.position + span.end - span.start)
                key[span.start : span.end], value[span.start : span.end] = keys[taken], values[taken]
        return key, value


class _Site:
    """One layer's attention on this rank. Edits number heads in the whole model; `_here` makes them this rank's."""

    def __init__(self, attention: Any, projection: Any) -> None:
        self.attention = attention
        self.window: int | None = attention.sliding_window
        self.layout: CacheLayout | None = None
        self._projection = projection  # of queries, keys and values together; None where a model has none
        self._num_heads, self._num_kv_heads = int(attention.num_heads), int(attention.num_kv_heads)
        self._all_heads = self._num_heads * get_tensor_model_parallel_world_size()
        self._first_head = get_tensor_model_parallel_rank() * self._num_heads
        self._group = self._num_heads // self._num_kv_heads  # query heads per kv head
        self._scale = float(attention.impl.scale)
        self._soft_cap = soft_cap(attention)

    @property
    def why_no_bias(self) -> str:
        """Why scores cannot be computed here as the kernel computes them; "" if they can."""
        return why_not_scored(self.attention)

    @property
    def can_project(self) -> bool:
        return self._projection is not None

    def own_heads(self, gates: Tensor) -> Tensor:
        """(this rank's heads,) float32 of a scalar or (heads,)."""
        mine = slice(self._first_head, self._first_head + self._num_heads)
        return gates.float().expand(self._all_heads)[mine].to(self._device)

    def own_rows(self, rows: Tensor) -> Tensor:
        """(P, this rank's kv heads, D), as the cache keeps them, of (P, kv heads, D)."""
        first = self._first_head // (self._all_heads // rows.shape[1])
        return rows[:, first : first + self._num_kv_heads].to(self._device, self.attention.kv_cache_torch_dtype)

    def project(self, rows: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """(N, kv heads, D) keys and (N, kv heads, Dv) values of (N, hidden_size) rows, float32, this rank's."""
        if self._projection is None:
            raise AttentionError(f"layer {layer} has no projection of queries, keys and values together")
        made = self._projection(rows.to(self._device, self.attention.kv_cache_torch_dtype))[0].float()
        sizes = [self.attention.head_size, self.attention.head_size_v]
        queries = self._num_heads * sizes[0]
        keys, values = made[:, queries:].split([self._num_kv_heads * size for size in sizes], dim=-1)
        return keys.unflatten(1, (-1, sizes[0])), values.unflatten(1, (-1, sizes[1]))

    def attend(
        self, layer: int, asked: Sequence[AttentionSpan], query: Tensor, cache: Tensor, blocks: Tensor, output: Tensor
    ) -> None:
        """Attend again with the biases that one request asks for; they add up. Writes heads and tokens concerned."""
        edits = list(_of(ScoreBias, asked))
        heads = sorted({head for _, edit in edits for head in self._here(edit.heads)})
        if not heads:
            return
        start, end = min(span.start for span in asked), max(span.end for span in asked)
        shift = asked[0].position - asked[0].start  # position of a token = token + shift
        layout = self._layout
        seen = 0 if self.window is None else max(0, start + shift - self.window + 1)
        base = seen // layout.block_size * layout.block_size  # blocks before it may be gone
        length = end + shift - base
        blocks = blocks[base // layout.block_size : -(-(end + shift) // layout.block_size)]
        kv_heads = [head // self._group for head in heads]
        keys = layout.read(cache, blocks, layout.keys, kv_heads)[:length]
        values = layout.read(cache, blocks, layout.values, kv_heads)[:length]
        at = torch.arange(base, base + length, device=cache.device)
        step = max(1, _MAX_SCORES // (len(heads) * length))
        for first in range(start, end, step):
            last = min(first + step, end)
            scores = torch.einsum("nhd,lhd->hnl", query[first:last, heads].float(), keys) * self._scale
            if self._soft_cap:
                scores = self._soft_cap * torch.tanh(scores / self._soft_cap)
            parts = [(edit, slice(max(s.start, first), min(s.end, last))) for s, edit in edits]
            for edit, tokens in parts:
                for head in self._here(edit.heads):
                    for key, stop, amount in edit.spans:
                        span = slice(max(key - base, 0), max(stop - base, 0))
                        scores[heads.index(head), tokens.start - first : max(tokens.stop - first, 0), span] += amount
            own = torch.arange(first + shift, last + shift, device=cache.device).unsqueeze(1)
            hidden = at > own if self.window is None else (at > own) | (at <= own - self.window)
            attended = torch.einsum("hnl,lhd->nhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), values)
            for edit, tokens in parts:
                mine = self._here(edit.heads)
                if tokens.start < tokens.stop and mine:
                    new = attended[tokens.start - first : tokens.stop - first, [heads.index(head) for head in mine]]
                    output[tokens, mine] = new.to(output.dtype)

    def override(
        self, layer: int, asked: Sequence[AttentionSpan], query: Tensor, cache: Tensor, blocks: Tensor, output: Tensor
    ) -> None:
        """Give single heads of (T, heads, Dv) `output` the rows of attention that one request asks for."""
        for span, edit in _of(RowOverride, asked):
            for head in self._here([edit.head]):
                layout = self._layout
                keys = torch.tensor(edit.keys, device=cache.device)
                weights = torch.tensor(edit.weights, device=cache.device)
                values = layout.read(cache, blocks[keys // layout.block_size], layout.values, [head // self._group])
                cells = torch.arange(len(edit.keys), device=cache.device) * layout.block_size + keys % layout.block_size
                output[span.start : span.end, head] = (weights @ values[cells, 0]).to(output.dtype)

    def attend_beside(
        self, layer: int, asked: Sequence[AttentionSpan], query: Tensor, cache: Tensor, blocks: Tensor, output: Tensor
    ) -> None:
        """Add gated attention to learned rows to (T, heads, Dv) `output`."""
        for span, edit in _of(SideAttention, asked):
            (keys, values, gates), tokens = edit.rows[layer], slice(span.start, span.end)
            wide = keys.repeat_interleave(self._group, 1)
            scores = torch.einsum("nhd,lhd->hnl", query[tokens].float(), wide) * self._scale
            attended = torch.einsum("hnl,lhd->nhd", scores.softmax(-1), values.repeat_interleave(self._group, 1))
            output[tokens] = output[tokens].float() + edit.scale * gates.unsqueeze(-1) * attended

    @property
    def _layout(self) -> CacheLayout:
        assert self.layout is not None, "learn_layouts comes first"
        return self.layout

    @property
    def _device(self) -> torch.device:
        device: torch.device = self.attention._k_scale.device
        return device

    def _here(self, heads: Iterable[int]) -> list[int]:
        return [head - self._first_head for head in heads if 0 <= head - self._first_head < self._num_heads]


# How each sort of edit is made on the tokens of one request, in this order.
_APPLIED: dict[type, Callable[[_Site, int, list[AttentionSpan], Tensor, Tensor, Tensor, Tensor], None]] = {
    ScoreBias: _Site.attend,
    RowOverride: _Site.override,
    SideAttention: _Site.attend_beside,
}
_ORDER = list(_APPLIED)


def _of(sort: type[L], asked: Iterable[AttentionSpan]) -> Iterator[tuple[AttentionSpan, L]]:
    """The stretches of one sort of edit."""
    return ((span, span.edit) for span in asked if isinstance(span.edit, sort))


def _turn(span: AttentionSpan) -> tuple[int, int]:
    return _ORDER.index(type(span.edit)), span.row


def _projection(holder: nn.Module | None) -> Any:
    """The one projection to queries, keys and values beside an attention layer, LoRA's wrapper left aside."""
    found = [getattr(child, "base_layer", child) for child in holder.children()] if holder else []
    found = [child for child in found if isinstance(child, QKVParallelLinear)]
    return found[0] if len(found) == 1 else None
