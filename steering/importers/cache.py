"""A TransformerLens cache as ActAdd's steering prompt: torch.save(dict(cache)), or its tensors in a safetensors file.

`blocks.{l}.hook_resid_pre` [1, tokens, hidden] are the rows of layer l, and `hook_resid_post` those of layer l + 1,
which are the same numbers. Of a batch of prompts `part` names the one that is meant; the contrast of two is one file
less the other: `whipstaff vectors combine subtract`. The rows count the prompt's tokens, its BOS among them.
"""

import re

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.contents import entry, is_vector, names, rest_is_harmless, shape
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.shape import ModelShape

_STREAM = re.compile(r"blocks\.(\d{1,4})\.hook_resid_(pre|post)")
_OTHER = re.compile(r"(?:\w+\.)*hook_\w+")  # what else a cache holds of the run that made it


class Cache(Importer):
    name, files = (
        "transformer_lens",
        "a TransformerLens cache with blocks.{l}.hook_resid_pre [1, tokens, hidden] in a .pt or .safetensors file, "
        "for ActAdd",
    )
    takes = frozenset({"layer", "part"})

    def claims(self, source: Source) -> bool:
        found = next((name for name in names(source) if _STREAM.fullmatch(name)), None)
        return found is not None and not is_vector(shape(source, found))

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        hook_points = {name: _layer(name) for name in names(source) if _STREAM.fullmatch(name)}
        rest_is_harmless(source, *(name for name in names(source) if _OTHER.fullmatch(name)))
        layers = sorted({layer for layer in hook_points.values() if layer < model.num_layers})
        layer = layers[0] if len(layers) == 1 and hints.layer is None else hints.layer
        if layer is None or layer not in layers:
            said = ", ".join(map(str, layers)) or "none that the model has"
            raise SteeringError(f"{source.name} holds what enters the layers {said}; say which is meant", "layer")
        name = next(name for name, its in hook_points.items() if its == layer)  # pre and post of two blocks are equal
        rows = _rows(name, entry(source, name), hints.part, model)
        notes = [] if len(hook_points) == len(names(source)) else ["of the cache only the residual stream is used"]
        return Draft("actadd", {f"resid_pre.{layer}.rows": rows}, notes=notes)


def _layer(name: str) -> int:
    match = _STREAM.fullmatch(name)
    assert match is not None
    return int(match[1]) + (match[2] == "post")


def _rows(name: str, tensor: object, part: int | None, model: ModelShape) -> Tensor:
    """[tokens, hidden] of one prompt."""
    if isinstance(tensor, Tensor) and tensor.ndim == 2:
        return numbers(name, tensor, None, model.hidden_size)
    batch = numbers(name, tensor, None, None, model.hidden_size)
    if part is None and len(batch) != 1:
        raise SteeringError(f"{name} holds {len(batch)} prompts; say which, from 0", "part")
    if part is not None and part >= len(batch):
        raise SteeringError(f"{name} holds the prompts 0 to {len(batch) - 1}", "part")
    return batch[part or 0]
