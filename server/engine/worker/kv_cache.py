"""The paged KV cache as we read it: where a layer's cache keeps keys and values, and which layers can be read so."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.attention.attention import Attention
from vllm.v1.attention.backend import AttentionType
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from whipstaff.server.engine import UnsupportedEngine

_BACKENDS = ("CPU_ATTN", "FLASH_ATTN", "TRITON_ATTN")  # one block table per row; blocks are the cache's first dimension


@dataclass(frozen=True)
class CacheLayout:
    """Where one layer's KV cache keeps what: flat indices into a block, as found by writing to a scratch cache.

    CPU kernels keep keys transposed or in tiles, depending on the instruction set and the type, so the layout is seen
    rather than known.
    """

    block_size: int
    keys: Tensor  # (block_size, kv_heads, D) int64
    values: Tensor  # (block_size, kv_heads, Dv) int64

    @staticmethod
    def learn(attention: Any, name: str) -> "CacheLayout":
        """Raises: UnsupportedEngine unless a block holds each of its tokens' keys and values exactly once."""
        cache, heads = attention.kv_cache, attention.num_kv_heads
        width = heads * (attention.head_size + attention.head_size_v)
        size = cache[0].numel() if cache.dim() > 1 else 0
        block_size = size // width
        if not size or block_size * width != size:
            raise UnsupportedEngine(f"{name}: a KV cache of shape {tuple(cache.shape)} cannot be read")
        scratch = torch.zeros((3, *cache.shape[1:]), dtype=cache.dtype, device=cache.device)
        slots = torch.arange(block_size, 2 * block_size, device=cache.device)  # the whole of block 1
        found = torch.zeros(size, dtype=torch.int64, device=cache.device)
        names, num_keys = torch.arange(size, device=cache.device), block_size * heads * attention.head_size
        for place in (1, 256, 256**2, 256**3):  # one digit at a time: bfloat16 is exact up to 256
            digit = (names // place % 256).to(cache.dtype)
            key = digit[:num_keys].view(block_size, heads, -1)
            value = digit[num_keys:].view(block_size, heads, -1)
            attention.impl.do_kv_cache_update(attention, key, value, scratch, slots)
            found += scratch[1].flatten().long() * place
        if scratch[0].any() or scratch[2].any() or not torch.equal(found.sort().values, names):
            raise UnsupportedEngine(
                f"{name}: {attention.attn_backend.get_name()} keeps keys or values in a form unknown"
            )
        at = found.argsort()
        return CacheLayout(
            block_size, at[:num_keys].view(block_size, heads, -1), at[num_keys:].view(block_size, heads, -1)
        )

    def read(self, cache: Tensor, blocks: Tensor, where: Tensor, heads: Sequence[int]) -> Tensor:
        """(blocks * block_size, len(heads), D) float32: what `where` (keys or values) names in (n,) `blocks`."""
        flat = cache[blocks.long()].flatten(1)
        return flat[:, where[:, heads].flatten()].view(-1, len(heads), where.shape[-1]).float()

    def key_view(self, cache: Tensor) -> Tensor | None:
        """(num_blocks, block_size, kv_heads, D) the keys of all blocks where they lie; None where no strides can say
        that, as for tiles."""
        place, rest = torch.zeros_like(self.keys), self.keys
        for size, stride in zip(reversed(cache.shape[1:]), reversed(cache.stride()[1:]), strict=True):
            place, rest = place + rest % size * stride, rest // size
        first, strides, expected = place[:1, :1, :1], list[int](), place[:1, :1, :1]
        for axis, size in enumerate(place.shape):
            strides.append(int(place.select(axis, 1).flatten()[0] - first) if size > 1 else 1)
            steps = torch.arange(size, device=place.device) * strides[-1]
            expected = expected + steps.view([-1 if other == axis else 1 for other in range(place.dim())])
        if not torch.equal(place, expected):
            return None
        start = cache.storage_offset() + int(first)
        return cache.as_strided((len(cache), *place.shape), (cache.stride(0), *strides), start)

    def keys_of(self, cache: Tensor, blocks: Tensor) -> Tensor:
        """(n, block_size, kv_heads, D) a copy of the keys of (n,) blocks, in whatever form they lie."""
        return cache[blocks.long()].flatten(1).index_select(1, self.keys.flatten()).view(-1, *self.keys.shape)


def copy_blocks(caches: Iterable[Tensor], num_blocks: int, pairs: Sequence[tuple[int, int]]) -> None:
    """Copy blocks of KV caches, (source, target) each, as vLLM does before a step: a source is held until it is copied,
    so none is a target. vLLM's own way indexes single bytes, where layers' blocks lie together."""
    seen = set[int]()
    for cache in caches:
        if cache.data_ptr() in seen:  # layers may share theirs
            continue
        seen.add(cache.data_ptr())
        blocks = cache.view(num_blocks, -1, *cache.shape[1:])
        for source, target in pairs:
            blocks[target].copy_(blocks[source])


def why_closed(attention: Any) -> str:
    """Why an attention layer's keys and values can be neither read nor edited; "" if they can."""
    backend = attention.attn_backend.get_name()
    if type(attention) is not Attention or attention.attn_type != AttentionType.DECODER:
        return f"attention of the kind {type(attention).__name__} ({attention.attn_type}) is closed to us"
    if backend not in _BACKENDS:
        return f"the attention backend {backend} is closed to us; choose one of {', '.join(_BACKENDS)}"
    if attention.kv_sharing_target_layer_name is not None:
        return "it shares the keys and values of another layer"
    if is_quantized_kv_cache(attention.kv_cache_dtype) or attention.query_quant is not None:
        return f"its keys and values are quantised ({attention.kv_cache_dtype})"
    return ""


def why_not_scored(attention: Any) -> str:
    """Why a layer's scores are more than products of queries and keys, capped or not; "" if they are not."""
    if getattr(attention.impl, "alibi_slopes", None) is not None:
        return "its scores have a slope (ALiBi)"
    if attention.has_sink:
        return "it has attention sinks"
    return "some of its tokens see later ones" if attention.use_mm_prefix else ""


def soft_cap(attention: Any) -> float:
    """The bound to which a layer's scores are bent; 0: none."""
    return float(getattr(attention.impl, "logits_soft_cap", 0) or 0)
