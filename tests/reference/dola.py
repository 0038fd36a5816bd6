"""DoLa for one row, and in plain transformers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reference.plain import BANNED, best_of, log_softmax
from reference.steered import Edit, logits, places


def divergence(mature: Sequence[float], early: Sequence[float]) -> float:
    """Half of KL(m || q) + KL(m || p), over the tokens that the mature row allows."""
    total = 0.0
    for q, p in zip(log_softmax(mature), log_softmax(early), strict=True):
        m = (math.exp(q) + math.exp(p)) / 2
        if q > BANNED and m > 0:
            total += m * (math.log(m) - q) + m * (math.log(m) - p)
    return total / 2


def choice(mature: Sequence[float], layers: Sequence[Sequence[float]]) -> int:
    return best_of([divergence(mature, early) for early in layers])


def rewrite(mature: Sequence[float], early: Sequence[float], relative_top: float) -> list[float]:
    last, first = log_softmax(mature), log_softmax(early)
    least = max(last) + math.log(relative_top) if relative_top else BANNED
    return [q - p if q >= least and q > BANNED else BANNED for q, p in zip(last, first, strict=True)]


def scored(
    mature: Sequence[float], early: Sequence[float], relative_top: float, post_softmax: bool, fill: float
) -> list[float]:
    """What the authors sum over answers."""
    plausible, every = rewrite(mature, early, relative_top), rewrite(mature, early, 0.0)
    every = log_softmax(every) if post_softmax else every
    return [s if p > BANNED or s == BANNED else fill for p, s in zip(plausible, every, strict=True)]


def mixed(
    model: Any, ids: list[int], prompt_len: int, edits: list[Edit], others: Mapping[Any, float]
) -> tuple[Tensor, list[Tensor]]:
    """(T, V) logits of one sequence under the edits with those of others added, and the (T, H) stream that enters each
    of the model's blocks."""
    seen: list[Tensor] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: seen.append(args[0][0])) for block, _ in places(model)
    ]
    try:
        rows = logits(model, ids, prompt_len, edits)
    finally:
        for handle in handles:
            handle.remove()
    for other, weight in others.items():
        rows = rows + weight * logits(other, ids, prompt_len, [])[:, : rows.shape[1]]
    return rows, seen


def scores(
    model: Any,
    ids: list[int],
    prompt_len: int,
    layers: Sequence[int],
    relative_top: float,
    edits: list[Edit],
    others: Mapping[Any, float],
    has_norm: bool,
    first: int,
) -> Tensor:
    """(T - first, V) what DoLa makes of the last positions' logits."""
    mature, early = mixed(model, ids, prompt_len, edits, others)
    norm = model.model.norm if has_norm else lambda stream: stream
    with torch.no_grad():
        heads = [model.lm_head(norm(early[layer])) for layer in layers]
    found = []
    for position in range(first, len(ids)):
        rows, last = [head[position].tolist() for head in heads], mature[position].tolist()
        found.append(rewrite(last, rows[choice(last, rows)], relative_top))
    return torch.tensor(found)
