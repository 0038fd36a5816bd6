"""vLLM's random numbers for a seed: the best token of logits / temperature + noise is the one that is drawn. And the
numbers that methods draw themselves.
"""

import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_U64, _U32 = np.uint64, np.uint32


def noise(runner: str, seed: int, num_prompt: int, num_tokens: int, vocabulary: int) -> Iterator[torch.Tensor]:
    """(vocabulary,) float64 for each of a request's tokens."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(num_tokens):
        if runner == "v1":  # the sampler of the CPU, vllm/v1/sample/ops/topk_topp_sampler.py
            uniform = _of_step(int(torch.randint(0, 2**31, (1,), generator=generator)), vocabulary)
        else:  # vllm/v1/worker/gpu/sample/gumbel.py
            uniform = 1 - _of_position(seed, num_prompt + step - 1, vocabulary)
        yield torch.from_numpy(-np.log(-np.log(uniform)))


def number(seed: int, position: int, method: str) -> float:
    """In [0, 1): SplitMix64 of the request's seed and the method's name, at the position of the last token."""
    start = (seed ^ zlib.crc32(method.encode())) * 0xD1342543DE82EF95 + position * 0x9E3779B97F4A7C15
    return int(_split_mix(np.array([start % 2**64], _U64))[0] >> _U64(40)) / 2**24


def _of_step(seed: int, vocabulary: int) -> Any:
    """In (0, 1): SplitMix64 of the token, in the stream that the step's seed begins."""
    with np.errstate(over="ignore"):
        counts = np.arange(1, vocabulary + 1, dtype=_U64) * _U64(0x9E3779B97F4A7C15)
        bits = _split_mix(_split_mix(np.array([seed], _U64)) + counts) >> _U64(11)
    return (bits.astype(np.float64) + 0.5) / 2**53


def _split_mix(z: Any) -> Any:
    z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
    return z ^ (z >> _U64(31))


def _of_position(seed: int, position: int, vocabulary: int) -> Any:
    """In (0, 1): Murmur3 of seed, position and token."""
    with np.errstate(over="ignore"):
        h = np.zeros(vocabulary, _U32)
        for word in (seed & 0xFFFFFFFF, seed >> 32, position, np.arange(vocabulary)):
            key = _rotated(np.asarray(word).astype(_U32) * _U32(0xCC9E2D51), 15) * _U32(0x1B873593)
            h = _rotated(h ^ key, 13) * _U32(5) + _U32(0xE6546B64)
        h ^= _U32(16)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
            h = (h ^ (h >> _U32(shift))) * _U32(factor)
        h ^= h >> _U32(16)
    return (h.astype(np.float64) + 0.5) / 2**32


def _rotated(value: Any, by: int) -> Any:
    return (value << _U32(by)) | (value >> _U32(32 - by))
