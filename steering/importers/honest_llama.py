"""ITI as its release leaves it (likenneth/honest_llama).

honest_llama  features {model}_{data}_head_wise.npy [N, layers, heads * head_dim] in float16, with {..}_labels.npy [N]
              and a list of heads: the directions are mean(true) - mean(false), the deviations those of the features, or
              of `tuning`'s, along them. Or directions themselves, [layers, heads, head_dim] or [layers * heads,
              head_dim] as `get_com_directions` gives them, with their `sigma`.
honest_llama_baked  a checkpoint with offsets in o_proj.bias. Those of 2023 (`oproj_bias` in the config) went through
              W_o and act on all tokens. Those of 2024 (`attention_bias`) did not, and are refused.
"""

import re

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.contents import is_vector
from whipstaff.steering.importers.head_lists import by_layer, existing, float_rows, read_float_npy, read_heads
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.source import WEIGHTS, Source, as_tensor, is_object_array, numbers, read_npy
from whipstaff.steering.shape import ModelShape

_BIAS = re.compile(r"(?:.*\.)?layers\.(\d{1,4})\.self_attn\.o_proj\.bias")
_UNPROJECTED = (
    "the biases are in the wrong space: since August 2024 the release writes its head offsets into o_proj.bias without "
    "multiplying them by W_o (the config says attention_bias), so the checkpoint is not ITI and its offsets are no "
    "edit of attn_out. Import the features instead, or say --projected if yours were multiplied"
)


class HonestLlama(Importer):
    name, files = "honest_llama", "*_head_wise.npy features with labels and heads, or directions with sigma"
    takes = frozenset({"heads", "num_heads", "labels", "tuning", "sigma"})

    def claims(self, source: Source) -> bool:
        if source.is_folder or not source.name.endswith(".npy") or is_object_array(source.path):
            return False
        return not is_vector(tuple(read_npy(source.file(source.name)).shape))

    def fits(self, source: Source, model: ModelShape) -> bool:
        shape = read_npy(source.file(source.name)).shape
        return _is_of_features(shape, model) or _is_of_directions(shape, model)

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        array = read_float_npy(source.file(source.name), "")
        width = model.num_heads * model.head_dim
        if _is_of_features(array.shape, model):
            return _fitted(source, model, hints)
        if not _is_of_directions(array.shape, model):
            raise SteeringError(
                f"{source.name} has shape {list(array.shape)}; wanted features [N, {model.num_layers}, {width}] or "
                f"directions [{model.num_layers}, {model.num_heads}, {model.head_dim}]"
            )
        if hints.sigma is None:
            raise SteeringError("directions need their standard deviations: a .npy file [layers, heads]", "sigma")
        directions = as_tensor(array).view(model.num_layers, model.num_heads, model.head_dim)
        sigma = as_tensor(read_float_npy(hints.sigma, "sigma"))
        sigma = numbers(hints.sigma.name, sigma, model.num_layers, model.num_heads)
        heads = read_heads(hints, model) if hints.heads else [(int(i), int(j)) for i, j in sigma.nonzero()]
        if not heads:
            raise SteeringError(f"{hints.sigma.name} is 0 for every head", "sigma")
        rows = {place: numbers(source.name, directions[place], model.head_dim) for place in heads}
        return _drafted(rows, {place: sigma[place] for place in heads}, model)


class Baked(Importer):
    name, files = "honest_llama_baked", "a checkpoint's folder with o_proj.bias"
    takes = frozenset({"projected"})

    def claims(self, source: Source) -> bool:
        if not source.is_folder or "config.json" not in source.names:
            return False
        config = source.json("config.json")
        return bool(config.get("oproj_bias") or config.get("attention_bias"))

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        config = source.json("config.json")
        config.harmless("*")  # of the model
        if not config.get("oproj_bias") and not hints.projected:
            raise SteeringError(_UNPROJECTED, "projected")
        tensors: dict[str, Tensor] = {}
        for name in source.checkpoints():
            source.named(name).harmless(*WEIGHTS)
            for key, tensor in source.tensors(name, _BIAS):
                match = _BIAS.fullmatch(key)
                bias = numbers(key, tensor, model.hidden_size)
                if match and bias.any():
                    tensors[f"attn_out.{match[1]}.add"] = bias
        if not tensors:
            raise SteeringError(f"{source.name} has no o_proj.bias that is not 0")
        note = "baked: the offsets act on all tokens, which is not what ITI does; their strength is in them"
        return Draft("vector", tensors, where="all", notes=[note])


def _is_of_features(shape: tuple[int, ...], model: ModelShape) -> bool:
    return len(shape) == 3 and shape[1:] == (model.num_layers, model.num_heads * model.head_dim)


def _is_of_directions(shape: tuple[int, ...], model: ModelShape) -> bool:
    layers, heads, head_dim = model.num_layers, model.num_heads, model.head_dim
    return shape in ((layers, heads, head_dim), (layers * heads, head_dim), (layers, heads * head_dim))


def _fitted(source: Source, model: ModelShape, hints: Hints) -> Draft:
    """Mass-mean directions and the deviations along them, of the listed heads."""
    if hints.labels is None:
        raise SteeringError("features need their labels: a .npy file of 0 and 1", "labels")
    features = read_float_npy(source.file(source.name), "")
    labels = torch.from_numpy(read_npy(existing(hints.labels, "labels")) != 0)
    if labels.shape != (len(features),) or labels.all() or not labels.any():
        raise SteeringError(
            f"{hints.labels.name} has shape {list(labels.shape)}, wanted [{len(features)}] with both labels", "labels"
        )
    tuning = features if hints.tuning is None else read_float_npy(hints.tuning, "tuning")
    if tuning.ndim != 3 or tuning.shape[1:] != features.shape[1:] or len(tuning) < 2:
        raise SteeringError(f"the tuning features have shape {list(tuning.shape)}", "tuning")
    directions, sigmas = {}, {}
    for layer, head in read_heads(hints, model):
        lanes = slice(head * model.head_dim, (head + 1) * model.head_dim)
        rows = float_rows(features, layer, lanes)
        difference = rows[labels].mean(0) - rows[~labels].mean(0)
        theta = difference / difference.norm()
        directions[layer, head] = theta.float()
        sigmas[layer, head] = (float_rows(tuning, layer, lanes) @ theta).std().float()
    return _drafted(directions, sigmas, model)


def _drafted(
    directions: dict[tuple[int, int], Tensor], sigmas: dict[tuple[int, int], Tensor], model: ModelShape
) -> Draft:
    return Draft("iti", by_layer("direction", directions, model) | by_layer("sigma", sigmas, model))
