"""Greedy decoding with activation edits and mixed logits, in plain transformers: no cache, no batch, hooks only."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Edit:
    """x[p] <- x[p] + scale * (gain * x[p] + add) at the positions that `touches` selects."""

    site: str  # "resid_post" or "attn_head"
    layer: int
    scale: float
    gain: Tensor | None
    add: Tensor | None
    touches: Callable[[int, int], bool]  # (position, prompt length) -> bool


def places(model: nn.Module) -> list[tuple[nn.Module, nn.Module]]:
    """(block, attention output projection) of every layer, by each family's own names."""
    inner: Any = model
    if hasattr(inner, "transformer"):  # GPT-2
        return [(block, block.attn.c_proj) for block in inner.transformer.h]
    if hasattr(inner, "gpt_neox"):
        return [(block, block.attention.dense) for block in inner.gpt_neox.layers]
    return [(block, block.self_attn.o_proj) for block in inner.model.layers]


@contextmanager
def edited(model: nn.Module, prompt_len: int, edits: list[Edit]) -> Iterator[None]:
    """While this holds every pass of the model is under the edits."""
    handles = []
    for layer, (block, projection) in enumerate(places(model)):
        mine = [edit for edit in edits if edit.layer == layer]
        heads = [edit for edit in mine if edit.site == "attn_head"]
        stream = [edit for edit in mine if edit.site == "resid_post"]
        if heads:
            handles.append(projection.register_forward_pre_hook(_input_hook(heads, prompt_len)))
        if stream:
            handles.append(block.register_forward_hook(_output_hook(stream, prompt_len)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(model: nn.Module, ids: list[int], prompt_len: int, edits: list[Edit]) -> Tensor:
    """(len(ids), V) float32 logits of one sequence under the edits."""
    with edited(model, prompt_len, edits), torch.no_grad():
        found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0].float()
        return found


def greedy(
    model: nn.Module,
    prompt: list[int],
    num_tokens: int,
    edits: list[Edit] = [],  # noqa: B006 - read only
    others: Mapping[nn.Module, float] | None = None,
) -> list[int]:
    """`num_tokens` greedy tokens; `others` are models whose logits are added with a weight."""
    generated: list[int] = []
    for _ in range(num_tokens):
        ids = prompt + generated
        row = logits(model, ids, len(prompt), edits)[-1]
        for other, weight in (others or {}).items():
            row = row + weight * logits(other, ids, len(prompt), [])[-1][: len(row)]
        generated.append(int(row.argmax()))
    return generated


def _apply(x: Tensor, edits: list[Edit], prompt_len: int) -> Tensor:
    for edit in edits:
        touched = torch.tensor([edit.touches(position, prompt_len) for position in range(x.shape[1])])
        change = torch.zeros_like(x)
        if edit.gain is not None:
            change = change + edit.gain.flatten() * x
        if edit.add is not None:
            change = change + edit.add.flatten()
        x = torch.where(touched[None, :, None], x + edit.scale * change, x)
    return x


def _input_hook(edits: list[Edit], prompt_len: int) -> Any:
    return lambda module, args: (_apply(args[0], edits, prompt_len), *args[1:])


def _output_hook(edits: list[Edit], prompt_len: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return _apply(output, edits, prompt_len)
        return (_apply(output[0], edits, prompt_len), *output[1:])

    return hook
