"""Function vectors (ericwtodd/function_vectors).

A vector itself, [hidden] or [1, hidden], or what it is made of: *_mean_head_activations.pt [layers, heads, tokens,
head_dim] with *_indirect_effect.pt [prompts, layers, heads]. Then the ten best heads' means at the last token go
through W_o, of the base model that `weights` names, and their sum is added at `layer`; without weights they are added
to their heads' own outputs, which is another edit. The release adds an output bias once per head; it is left out.
"""

import re
from pathlib import Path

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.added import bare_tensor
from whipstaff.steering.importers.head_lists import best, by_layer, existing
from whipstaff.steering.importers.importer import Draft, Hints, Importer, layer_of
from whipstaff.steering.importers.source import Source, numbers, read_torch
from whipstaff.steering.shape import ModelShape

NUM_HEADS = 10
_PROJECTION = re.compile(
    r"(?:.*\.)?(?:layers|h)\.(\d{1,4})\.(?:self_attn\.o_proj|attn\.c_proj|attention\.dense)\.weight"
)


class FunctionVectorFiles(Importer):
    name, files = (
        "function_vector",
        "*function_vector*.pt [hidden], or *_mean_head_activations.pt with indirect effects",
    )
    takes = frozenset({"layer", "effects", "num_heads", "weights"})

    def claims(self, source: Source) -> bool:
        tensor = bare_tensor(source)
        if tensor is None:
            return False
        is_named = "function_vector" in source.name and tensor.squeeze().ndim == 1
        return is_named or (tensor.ndim == 4 and tensor.shape[2] > 1)

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        found = source.torch(source.name)
        if not isinstance(found, Tensor):
            raise SteeringError(f"{source.name} holds no bare tensor")
        if found.ndim != 4:
            tensor = numbers(source.name, found.flatten(), model.hidden_size)
            return Draft("function_vector", {f"resid_post.{layer_of(hints, model)}.add": tensor})
        shape = (model.num_layers, model.num_heads)
        means = numbers(source.name, found, *shape, None, model.head_dim)[:, :, -1]
        if hints.effects is None:
            raise SteeringError("mean activations need the heads' indirect effects: *_indirect_effect.pt", "effects")
        effects = numbers("effects", read_torch(existing(hints.effects, "effects")), None, *shape).mean(0)
        heads = best(effects, hints.num_heads or NUM_HEADS)
        if hints.weights is None:
            note = "without weights the means were added to their heads' outputs, not to the stream at one layer"
            return Draft("function_vector", by_layer("add", {h: means[h] for h in heads}, model), notes=[note])
        layer = layer_of(hints, model)
        return Draft("function_vector", {f"resid_post.{layer}.add": _through(hints.weights, means, heads, model)})


def _through(weights: Path, means: Tensor, heads: list[tuple[int, int]], model: ModelShape) -> Tensor:
    """The sum of the heads' means, each through its columns of W_o."""
    base, wanted = Source(weights), {layer for layer, _ in heads}
    total, seen = torch.zeros(model.hidden_size), set()
    width = model.num_heads * model.head_dim
    for name in base.checkpoints():
        for key, tensor in base.tensors(name, _PROJECTION):
            match = _PROJECTION.fullmatch(key)
            if match is None or (layer := int(match[1])) not in wanted:
                continue
            is_conv = ".c_proj." in key  # GPT-2 keeps the transpose
            shape = (width, model.hidden_size) if is_conv else (model.hidden_size, width)
            projection = numbers(key, tensor, *shape)
            projection = projection.T if is_conv else projection
            chosen = torch.zeros(model.num_heads, model.head_dim)
            for head in (head for its, head in heads if its == layer):
                chosen[head] = means[layer, head]
            total += projection @ chosen.flatten()
            seen.add(layer)
    if missing := wanted - seen:
        raise SteeringError(f"{weights} has no output projection of layer {min(missing)}", "weights")
    return total
