"""Edits inside attention in plain transformers: the whole sequence again for every token, nothing cached."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM
from transformers.masking_utils import eager_mask

NAME = "whipstaff_edited"


@dataclass(frozen=True)
class Bias:
    layer: int
    heads: list[int]
    spans: list[tuple[int, int, float]]


@dataclass(frozen=True)
class Override:
    layer: int
    head: int
    keys: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Side:
    """Per layer (N, hidden_size) rows and (heads,) gates."""

    rows: Mapping[int, Tensor]
    gates: Mapping[int, Tensor]


@dataclass(frozen=True)
class Prefix:
    """(P, 2 * layers, kv heads, D), keys and values by turns."""

    rows: Tensor


Asked = list[tuple[Bias | Override | Side | Prefix, int, int | None]]  # an edit and its positions [first, end)
_asked: Asked = []


def load(path: str, **changes: Any) -> nn.Module:
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, eager_mask)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation=NAME, **changes
    ).eval()
    return model


def greedy(model: nn.Module, prompt: list[int], num_tokens: int, asked: Asked) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the (num_tokens, V) log-probabilities that each was chosen from."""
    ids, rows = list(prompt), []
    _asked[:] = asked
    try:
        with torch.no_grad():
            for _ in range(num_tokens):
                rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1))
                ids.append(int(rows[-1].argmax()))
    finally:
        _asked.clear()
    return ids[len(prompt) :], torch.stack(rows)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    layer, length, group = module.layer_idx, query.shape[2], query.shape[1] // key.shape[1]
    for edit, _first, end in _asked:
        if isinstance(edit, Prefix):
            key, value = key.clone(), value.clone()
            key[0, :, :end] = edit.rows[:, 2 * layer].transpose(0, 1)
            value[0, :, :end] = edit.rows[:, 2 * layer + 1].transpose(0, 1)
    key, value = key.repeat_interleave(group, 1)[0], value.repeat_interleave(group, 1)[0]
    scores = query[0] @ key.transpose(-1, -2) * scaling
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    for edit, first, end in _asked:
        if isinstance(edit, Bias) and edit.layer == layer:
            for head in edit.heads:
                for start, stop, amount in edit.spans:
                    scores[head, first:end, start:stop] += amount
    z = (scores + mask[0, :, :, :length]).softmax(-1) @ value
    for edit, first, end in _asked:
        if isinstance(edit, Override) and edit.layer == layer:
            z[edit.head, first:end] = torch.tensor(edit.weights) @ value[edit.head, edit.keys]
    for edit, first, end in _asked:
        if isinstance(edit, Side) and layer in edit.rows:
            keys, values = (
                projection(edit.rows[layer]).unflatten(-1, (-1, query.shape[-1])).transpose(0, 1)
                for projection in (module.k_proj, module.v_proj)
            )
            beside = query[0] @ keys.repeat_interleave(group, 0).transpose(-1, -2) * scaling
            added = edit.gates[layer][:, None, None] * (beside.softmax(-1) @ values.repeat_interleave(group, 0))
            z[:, first:end] += added[:, first:end]
    return z.transpose(0, 1)[None].contiguous(), None
