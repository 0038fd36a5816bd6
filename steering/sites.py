"""Finding the hook points to edit in a decoder model, by structure and never by the model's name.

A decoder is a list of blocks. What mixes tokens in a block is attention, a state-space model or a convolution; beside
it, or alone in some hybrid models, stands an MLP or a mixture of experts. The residual stream after a block is the
block's output; the head outputs are what the attention's output projection receives. A model has the sites that its
structure shows: nothing but a list of blocks is required of it.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import nn

from whipstaff.steering.shape import Site

CORE: tuple[Site, ...] = ("resid_post", "attn_head")  # hooked wherever a model has them; others where wanted


def pool_of(site: Site) -> str:
    """Which of the engine's pools of lines a site reads: hook points of one pool are equally wide."""
    return {"attn_head": "heads", "router": "experts"}.get(site, "hidden")


@dataclass(frozen=True)
class DecoderLayer:
    """One block (0-based `index` in the whole model) and its parts; None where the structure does not show them."""

    index: int
    block: nn.Module
    attention: nn.Module | None  # receives the attention's input
    output_projection: nn.Module | None  # of the attention
    mlp_input: nn.Module | None  # receives the MLP's input
    mlp_output: nn.Module | None  # returns the MLP's output; the same module unless the block has no MLP module


@dataclass(frozen=True)
class Kinds:
    """How to recognise modules: the engine's classes are not known here.

    is_attention: the innermost attention operator (it has no projections of its own), latent attention included.
    is_mixer: whatever lets a token see others, attention included.
    is_projection: layers that may be the output projection: those that take the concatenated heads.
    is_linear: any linear layer.
    is_missing: placeholders of blocks that live in another pipeline stage.
    """

    is_attention: Callable[[nn.Module], bool]
    is_mixer: Callable[[nn.Module], bool]
    is_projection: Callable[[nn.Module], bool]
    is_linear: Callable[[nn.Module], bool]
    is_missing: Callable[[nn.Module], bool] = lambda module: False


class SitesNotFound(RuntimeError):
    """The model is not a decoder of a shape known here."""


def find_layers(model: nn.Module, kinds: Kinds) -> list[DecoderLayer]:
    """The decoder blocks of `model`, in order. Raises: SitesNotFound, saying what was looked for and what there is."""
    blocks = _block_list(model, kinds.is_mixer)
    return [_layer(block, index, kinds) for index, block in enumerate(blocks) if not kinds.is_missing(block)]


def final_norm(model: nn.Module, kinds: Kinds) -> nn.Module | None:
    """The norm beside the blocks of `model`, behind them if there are several; None where none, or more, could be it.

    Raises: SitesNotFound, as `find_layers`.
    """
    blocks = _block_list(model, kinds.is_mixer)
    beside = list(next(module for module in model.modules() if blocks in module.children()).children())
    norms = [index for index, child in enumerate(beside) if _is_norm(child)]
    behind = [index for index in norms if index > beside.index(blocks)]
    chosen = behind or norms
    return beside[chosen[0]] if len(chosen) == 1 else None


def _is_norm(module: nn.Module) -> bool:
    """Whether it has numbers to scale rows by, and no matrices."""
    numbers = list(module.parameters())
    return bool(numbers) and all(each.dim() == 1 for each in numbers)


def _layer(block: nn.Module, index: int, kinds: Kinds) -> DecoderLayer:
    attentions = [child for child in block.children() if any(map(kinds.is_attention, child.modules()))]
    operators = [module for module in block.modules() if kinds.is_attention(module)]
    attention = attentions[0] if len(operators) == 1 and not _is_list(attentions[0]) else None
    projection = attention and _output_projection(block, kinds.is_attention, kinds.is_projection)
    if attention is None or not kinds.is_attention(attention):
        return DecoderLayer(index, block, attention, projection, *_mlp(block, kinds))
    # The block itself is the attention: its operator receives queries, and the linear layers beside it are its own.
    own = [child for child in block.children() if kinds.is_linear(child)]
    receivers = [layer for layer in own if layer is not projection]
    attention = receivers[0] if len(receivers) == 1 else None
    return DecoderLayer(index, block, attention, projection, *_mlp(block, kinds, own))


def _mlp(
    block: nn.Module, kinds: Kinds, others: Collection[nn.Module] = ()
) -> tuple[nn.Module | None, nn.Module | None]:
    """What holds linear layers beside what mixes tokens, and beside `others`: one module, or the two layers of a bare
    MLP."""
    beside = [
        child
        for child in block.children()
        if any(map(kinds.is_linear, child.modules())) and not any(map(kinds.is_mixer, child.modules()))
        if child not in others
    ]
    if any(map(_is_list, beside)):
        return None, None
    if len(beside) == 1 or (len(beside) == 2 and all(map(kinds.is_linear, beside))):
        return beside[0], beside[-1]
    return None, None


def _is_list(module: nn.Module) -> bool:
    """Whether it only holds modules, which are called without it."""
    return isinstance(module, nn.ModuleList | nn.ModuleDict)


def _block_list(model: nn.Module, is_mixer: Callable[[nn.Module], bool]) -> nn.ModuleList:
    """The outermost module list whose blocks mix tokens; the longest, should there be several."""
    found = list(_lists_with(model, is_mixer))
    if not found:
        raise SitesNotFound(f"{type(model).__name__} has no list of blocks that mix tokens; it cannot be steered")
    return max(found, key=len)


def _lists_with(module: nn.Module, is_mixer: Callable[[nn.Module], bool]) -> Iterator[nn.ModuleList]:
    for child in module.children():
        if isinstance(child, nn.ModuleList) and any(is_mixer(part) for part in child.modules()):
            yield child
        else:
            yield from _lists_with(child, is_mixer)


def _output_projection(
    block: nn.Module, is_attention: Callable[[nn.Module], bool], is_projection: Callable[[nn.Module], bool]
) -> nn.Module | None:
    """The one projection beside the attention operator, in the smallest module that holds both; None where several
    could be it."""
    for owner in _holders(block, is_attention):
        candidates = [child for child in owner.children() if is_projection(child)]
        if candidates:
            return candidates[0] if len(candidates) == 1 else None
    return None


def _holders(block: nn.Module, is_attention: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """Modules that hold an attention operator, innermost first."""
    holding = [module for module in block.modules() if any(map(is_attention, module.children()))]
    around = [
        module for module in block.modules() if any(map(is_attention, module.modules())) and module not in holding
    ]
    return holding + around[::-1]
