"""A vector per layer, as people save them: dicts and stacks in .pt, .safetensors, .npz and .npy files.

dict    {3: [hidden]}, also "3", "layer_3" (saklas), "model.layers.3", "blocks.3.hook_resid_post"; a list is a dict of
        its places. Around it perhaps what dataclasses.asdict makes of steering-vectors' or repeng's objects
stack   [layers, hidden], or [layers + 1, hidden] where row 0 is the embeddings' output, as hidden_states has it

Numbers count blocks from 0. Where they go up to the number of blocks they count hidden states: block k - 1 wrote the
k-th. What a module's name says of the site wins over the flag.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.added import ADDING
from whipstaff.steering.importers.contents import ALONE, entry, flat, is_vector, lone, names, rest_is_harmless, shape
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.keys import SITES_OF, Key, key_of
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.shape import ModelShape, Site

_NORM_BEHIND = ("Gemma2", "Gemma3")  # there post_attention_layernorm follows the attention's output
_WRAPPED = {"layer_activations": "layer_type", "directions": "model_type"}  # the vectors, and what may stand beside
_HARMLESS = (
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
_OTHER = (
    "prompt",
    "embed",
    "mean_head",
    "head_wise",
    "com_directions",
    "direction.pt",
    "function_vector",
    "vec_layer_",
)


class LayerFiles(Importer):
    name, files = (
        "layers",
        "a vector per layer: a dict {layer: [hidden]} or a stack [layers, hidden] in a .pt, .safetensors, .npz or .npy "
        "file; also steering-vectors' and saklas'",
    )
    takes = frozenset({"layer", "site", "method"})

    def claims(self, source: Source) -> bool:
        found = names(source)
        if set(found) & set(_WRAPPED):
            return True
        keys = [name for name in found if key_of(name)]
        if keys:
            sizes = shape(source, keys[0])
            return sizes is not None and ("hook_" not in keys[0] or is_vector(sizes))
        name = lone(source)
        if name is None or any(word in f"{source.name} {name}".lower() for word in _OTHER):
            return False
        sizes = shape(source, name)
        return sizes is not None and not is_vector(sizes) and len(_thin(sizes)) == 2

    def fits(self, source: Source, model: ModelShape) -> bool:
        """A lone table has a row per block, or one more."""
        name = lone(source)
        sizes = _thin(shape(source, name) or ()) if name is not None else ()
        return len(sizes) != 2 or (sizes[0] - model.num_layers in (0, 1) and sizes[1] == model.hidden_size)

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        if hints.method is not None and hints.method not in ADDING:
            raise SteeringError(f"methods that add a vector per layer are {', '.join(sorted(ADDING))}", "method")
        found, site = _vectors(source, model)
        notes, shift = [], _shift(found, model)
        if shift:
            notes.append(
                f"the file counts hidden states up to {model.num_layers}: number k was taken for what block k - 1 "
                "leaves, and number 0, the embeddings' output, was left out"
            )
        rows: dict[str, Tensor] = {}
        for name, (key, tensor) in found.items():
            layer = key.layer - shift if key.layer >= 0 else model.num_layers + key.layer
            if layer < 0 and shift:
                continue
            if not 0 <= layer < model.num_layers:
                raise SteeringError(f"{name} names layer {layer}; the model has layers 0 to {model.num_layers - 1}")
            if hints.layer not in (None, layer):
                continue
            _check_norm(name, model)
            place = f"{key.site or site or hints.site or 'resid_post'}.{layer}.add"
            if place in rows:
                raise SteeringError(f"two entries, one of them {name}, are for {place.removesuffix('.add')}")
            rows[place] = _placed(name, tensor, place, model)
        if not rows:
            raise SteeringError(f"{source.name} has layers {_layers(found, shift)} and not this one", "layer")
        method = hints.method or ("control_vector" if all("resid_post" in place for place in rows) else "vector")
        return Draft(method, rows, where=None if hints.method else "all", notes=notes)


def _vectors(source: Source, model: ModelShape) -> tuple[dict[str, tuple[Key, object]], Site | None]:
    """Entries that are vectors, by name, and the site of all of them if the file names one."""
    found = names(source)
    if found == [ALONE] or (len(found) == 1 and key_of(found[0]) is None and found[0] not in _WRAPPED):
        return _stacked(source.name, entry(source, found[0]), model), None
    rest_is_harmless(source, *_HARMLESS)
    for wrapper, beside in _WRAPPED.items():
        if wrapper in found:
            said = entry(source, beside) if beside in found else None
            return _keyed(source, _inner(wrapper, entry(source, wrapper))), _site_of(beside, said, model)
    return _keyed(source, {name: entry(source, name) for name in found if key_of(name)}), None


def _keyed(source: Source, entries: Mapping[str, object]) -> dict[str, tuple[Key, object]]:
    found = {}
    for name, value in entries.items():
        if (key := key_of(name)) is None:
            raise SteeringError(f"{source.name}: {name[:128]!r} is no layer")
        found[name] = key, value
    if not found:
        raise SteeringError(f"{source.name} holds no vectors by layer; such files have keys like 3, layer_3, layers.3")
    return found


def _stacked(name: str, tensor: object, model: ModelShape) -> dict[str, tuple[Key, object]]:
    """The rows of [layers, hidden] or [layers + 1, hidden]."""
    sizes = _thin(tuple(tensor.shape)) if isinstance(tensor, Tensor) else ()
    wanted = (model.num_layers, model.num_layers + 1)
    if not isinstance(tensor, Tensor) or len(sizes) != 2 or sizes[0] not in wanted or sizes[1] != model.hidden_size:
        said = list(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise SteeringError(
            f"{name} has shape {said}; a stack of vectors has [{wanted[0]}, {model.hidden_size}], a row per block, or "
            f"[{wanted[1]}, {model.hidden_size}], the embeddings' output first. A single vector is format easysteer "
            "with its layer, the rows of a soft prompt are format spring"
        )
    rows = tensor.reshape(sizes)
    return {f"row {index}": (Key(index, None, True), row) for index, row in enumerate(rows)}


def _shift(found: Mapping[str, tuple[Key, object]], model: ModelShape) -> int:
    """1 where the numbers can only count hidden states."""
    keys = [key for key, _ in found.values()]
    return int(all(key.is_counted and key.layer >= 0 for key in keys) and model.num_layers in {k.layer for k in keys})


def _placed(name: str, tensor: object, place: str, model: ModelShape) -> Tensor:
    """[hidden], or [heads, head_dim]."""
    site: Any = place.partition(".")[0]
    row = numbers(name, flat(name, tensor), model.width(site))
    return row.view(model.num_heads, model.head_dim) if site == "attn_head" else row


def _inner(wrapper: str, found: object) -> dict[str, object]:
    if not isinstance(found, Mapping):
        raise SteeringError(f"{wrapper} is no dict of vectors by layer")
    return {str(key): value for key, value in found.items()}


def _site_of(beside: str, said: object, model: ModelShape) -> Site | None:
    """What steering-vectors' `layer_type` says."""
    if beside != "layer_type" or said is None:
        return None
    if said not in SITES_OF:
        raise SteeringError(f"layer_type {said!r} is none of {', '.join(SITES_OF)}")
    _check_norm(str(said), model)
    return SITES_OF[str(said)]


def _check_norm(name: str, model: ModelShape) -> None:
    if name.endswith("post_attention_layernorm") and model.architecture.startswith(_NORM_BEHIND):
        raise SteeringError(f"{name}: in this model that norm follows the attention, and nothing is edited behind it")


def _thin(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Without sizes of 1 between the first and the last."""
    return (sizes[0], *(size for size in sizes[1:-1] if size != 1), sizes[-1]) if len(sizes) > 1 else sizes


def _layers(found: Mapping[str, tuple[Key, object]], shift: int) -> str:
    return ", ".join(str(key.layer - shift) for key, _ in found.values() if key.layer >= shift)
