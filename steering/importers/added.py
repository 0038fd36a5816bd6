"""Torch files of single vectors that are added to the stream.

caa        vec_layer_{l}_{model}.pt or vec_layer_{l}.pt, one tensor each (nrimsky/CAA), or a folder of them
easysteer  a bare vector whose layer is a request's business there (ZJU-REAL/EasySteer, `direct`); any file with one
           vector, [hidden] or with sizes of 1 beside it
xl_vlms    a dict with steering_vector, or steering_vector_concept_{i}_to_{j} (mshukor/xl-vlms)
refusal    direction.pt beside direction_metadata.json with its layer (andyrdt/refusal_direction)
"""

import re
from collections.abc import Mapping

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.contents import (
    ALONE,
    described,
    entry,
    flat,
    is_vector,
    lone,
    names,
    rest_is_harmless,
    shape,
)
from whipstaff.steering.importers.importer import Draft, Hints, Importer, layer_of
from whipstaff.steering.importers.keys import key_of
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.methods import METHODS
from whipstaff.steering.shape import ModelShape

_CAA = re.compile(r"vec_layer_(\d{1,4})(?:_.*)?\.pt")
_XL_VLMS = re.compile("steering_vector(?:_.*)?")
LABELS = (  # beside vectors: what they are of
    "model",
    "model_name",
    "model_id",
    "model_type",
    "name",
    "concept",
    "behavior",
    "trait",
    "description",
    "dataset",
)
BESIDE = ("layer", *LABELS)
ADDING = {name for name, one in METHODS.items() if one.combines == "added" and "resid_post" in one.sites}
_TURNING = {"add_direction", "directional_ablation", "directional_patch"}


class CAAFiles(Importer):
    name, files = "caa", "vec_layer_{l}.pt or vec_layer_{l}_{model}.pt, or a folder of them"
    takes = frozenset({"layer"})

    def claims(self, source: Source) -> bool:
        return any(_CAA.fullmatch(name) for name in source.names)

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        tensors: dict[str, Tensor] = {}
        for name in source.names:
            match = _CAA.fullmatch(name)
            if match is None and source.is_folder:
                continue
            stated = int(match[1]) if match else None
            if source.is_folder and hints.layer not in (None, stated):
                continue
            place = f"resid_post.{layer_of(hints, model, stated)}.add"
            layer = place.split(".")[1]
            if place in tensors:
                raise SteeringError(f"two files hold the vector of layer {layer}; name one of them")
            tensors[place] = numbers(name, flat(name, source.torch(name)), model.hidden_size)
        if not tensors:
            which = "" if hints.layer is None else f" of layer {hints.layer}"
            raise SteeringError(f"{source.name} holds no file vec_layer_{{l}}.pt{which}", "layer" if which else "")
        return Draft("caa", tensors)


class EasySteer(Importer):
    name, files = (
        "easysteer",
        "one vector [hidden] in a .pt, .safetensors, .npz or .npy file, with --layer (EasySteer and others; "
        "EasySteer's .gguf is repeng)",
    )
    takes = frozenset({"layer", "site", "method"})

    def claims(self, source: Source) -> bool:
        named = ("direction.pt", "function_vector", "embed", "prompt")
        name = lone(source, *BESIDE)
        if (
            name is None
            or key_of(name)
            or _CAA.fullmatch(source.name)
            or any(word in f"{source.name} {name}" for word in named)
        ):
            return False
        is_xl_vlms = is_torch(source.name) and _XL_VLMS.fullmatch(name) is not None
        return is_vector(shape(source, name)) and not is_xl_vlms

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        method = hints.method or ("control_vector" if hints.site in (None, "resid_post") else "vector")
        if method not in ADDING:
            raise SteeringError(
                f"the file is one vector; methods that add it are {', '.join(sorted(ADDING))}", "method"
            )
        name = lone(source, *BESIDE)
        if name is None:
            raise SteeringError(f"{source.name} holds {described(source)}, wanted one vector [{model.hidden_size}]")
        vector = flat(source.name, entry(source, name))
        tensor = numbers(source.name, vector, model.width(hints.site or "resid_post"))
        if hints.site == "attn_head":
            tensor = tensor.view(model.num_heads, model.head_dim)
        stated = None
        if name != ALONE:
            rest_is_harmless(source, *LABELS)
            stated = entry(source, "layer") if "layer" in names(source) else None
        place = f"{hints.site or 'resid_post'}.{layer_of(hints, model, number_of(stated))}.add"
        return Draft(method, {place: tensor}, where=None if hints.method else "all")


class XLVLMs(Importer):
    name, files = "xl_vlms", "a .pth dict with steering_vector, or steering_vector_concept_{i}_to_{j}"
    takes = frozenset({"layer", "key"})

    def claims(self, source: Source) -> bool:
        found = None if source.is_folder or not is_torch(source.name) else source.torch(source.name)
        return isinstance(found, Mapping) and any(_XL_VLMS.fullmatch(str(key)) for key in found)

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        found = source.named(source.name)
        found.harmless("concepts*", "activations*", *LABELS)  # what the vectors were made of
        vectors = {key: flat(key, found[key]) for key in found if _XL_VLMS.fullmatch(key)}
        single = sorted(key for key, tensor in vectors.items() if tensor.ndim == 1)
        key = hints.key or ("steering_vector" if "steering_vector" in single else None)
        if not single:
            raise SteeringError(f"{source.name} holds {described(source)}, and none of them is one vector")
        if key is None or key not in single:
            raise SteeringError(f"say which of the file's vectors is meant: {', '.join(single)[:2000]}", "key")
        tensor = numbers(key, vectors[key], model.hidden_size)
        layer = layer_of(hints, model, number_of(found.get("layer")))
        return Draft("shift_vector", {f"resid_post.{layer}.add": tensor})


class RefusalDirection(Importer):
    name, files = "refusal", "direction.pt, with its layer in direction_metadata.json"
    takes = frozenset({"layer", "method"})

    def claims(self, source: Source) -> bool:
        return "direction.pt" in source.names

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        method = hints.method or "add_direction"
        if method not in _TURNING:
            raise SteeringError(f"methods of one direction are {', '.join(sorted(_TURNING))}", "method")
        name = "direction.pt" if source.is_folder else source.name
        tensor = numbers(name, flat(name, source.torch(name)), model.hidden_size)
        if method == "directional_ablation" and hints.layer is None:
            return Draft(method, {"direction": tensor})
        stated = None
        if "direction_metadata.json" in source.names:
            metadata = source.json("direction_metadata.json")
            metadata.harmless("pos", "*_score")  # where the direction was read, and how it was chosen
            stated = metadata.get("layer")
        layer = layer_of(hints, model, stated if isinstance(stated, int) else None)
        return Draft(method, {f"resid_pre.{layer}.direction": tensor})


def number_of(stated: object) -> int | None:
    """A layer that a file states as a number or a tensor of one. Raises: SteeringError."""
    value = stated.item() if isinstance(stated, Tensor) and stated.numel() == 1 else stated
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise SteeringError(f"the file's layer is {value!r:.64}, wanted a whole number")
    return value


def is_torch(name: str) -> bool:
    return name.endswith((".pt", ".pth", ".bin"))


def bare_tensor(source: Source) -> Tensor | None:
    """The tensor that is all that a torch file holds."""
    if source.is_folder or not is_torch(source.name):
        return None
    found = source.torch(source.name)
    return found if isinstance(found, Tensor) else None
