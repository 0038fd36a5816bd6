"""Finding the places to edit in any decoder model, by structure and never by the model's name.

A decoder is a list of blocks, each holding an attention module. The residual stream after a block is the block's
output; the head outputs are what the attention's output projection receives.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class DecoderLayer:
    """One block (0-based `index` in the whole model) and the output projection of its attention."""

    index: int
    block: nn.Module
    output_projection: nn.Module


class SitesNotFound(RuntimeError):
    """The model is not a decoder of a shape known here."""


def find_layers(
    model: nn.Module,
    is_attention: Callable[[nn.Module], bool],
    is_projection: Callable[[nn.Module], bool],
    is_missing: Callable[[nn.Module], bool] = lambda module: False,
) -> list[DecoderLayer]:
    """The decoder blocks of `model`, in order.

    Args:
        is_attention: recognises the innermost attention operator (it has no projections of its own).
        is_projection: recognises layers that may be the output projection: those that take the concatenated heads.
        is_missing: recognises placeholders of blocks that live in another pipeline stage.

    Raises:
        SitesNotFound: saying what was looked for and what the model has.
    """
    blocks = _block_list(model, is_attention)
    return [
        DecoderLayer(index, block, _output_projection(block, is_attention, is_projection, index))
        for index, block in enumerate(blocks)
        if not is_missing(block)
    ]


def _block_list(model: nn.Module, is_attention: Callable[[nn.Module], bool]) -> nn.ModuleList:
    """The outermost module list whose blocks hold attention; the longest, should there be several."""
    found = list(_lists_with_attention(model, is_attention))
    if not found:
        raise SitesNotFound(f"{type(model).__name__} has no list of blocks with attention; it cannot be steered")
    return max(found, key=len)


def _lists_with_attention(module: nn.Module, is_attention: Callable[[nn.Module], bool]) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and any(is_attention(part) for part in child.modules()):
            yield child
        else:
            yield from _lists_with_attention(child, is_attention)


def _output_projection(
    block: nn.Module,
    is_attention: Callable[[nn.Module], bool],
    is_projection: Callable[[nn.Module], bool],
    index: int,
) -> nn.Module:
    """The one projection beside the attention operator, in the smallest module that holds both."""
    for owner in _holders(block, is_attention):
        candidates = [child for child in owner.children() if is_projection(child)]
        if len(candidates) == 1:
            return candidates[0]
        if candidates:
            raise SitesNotFound(
                f"layer {index}: {type(owner).__name__} has {len(candidates)} projections beside its attention"
            )
    raise SitesNotFound(f"layer {index}: {type(block).__name__} has no output projection beside its attention")


def _holders(block: nn.Module, is_attention: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Modules that hold an attention operator, innermost first."""
    holding = [module for module in block.modules() if any(map(is_attention, module.children()))]
    around = [
        module for module in block.modules() if any(map(is_attention, module.modules())) and module not in holding
    ]
    return holding + around[::-1]
