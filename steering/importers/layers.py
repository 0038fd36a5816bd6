"""A vector per layer, as people save them: dicts and stacks in .pt, .safetensors, .npz and .npy files.

dict    {3: [hidden]}, also "3", "layer_3" (saklas), "model.layers.3", "blocks.3.hook_resid_post"; a list is a dict of
        its places. Around it perhaps what dataclasses.asdict makes of steering-vectors' or repeng's objects
stack   [layers, hidden], or [layers + 1, hidden] where row 0 is the embeddings' output, as hidden_states has it

Numbers count blocks from 0. Where they go up to the number of blocks they count hidden states: block k - 1 wrote the
k-th. What a module's name says of the site wins over the flag.
"""

from collections.abc import Mapping

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.added import ADDING, LABELS
from whipstaff.steering.importers.autoencoder import check_sandwich
from whipstaff.steering.importers.contents import (
    TORCH,
    entry,
    flat,
    is_vector,
    keys_in,
    lone,
    names,
    rest_is_harmless,
    shape,
)
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.keys import SITES_OF, Key, key_of
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.shape import ModelShape, Site

_NORM_BEHIND = ("Gemma2", "Gemma3")  # there post_attention_layernorm follows the attention's output
_WRAPPED = {"layer_activations": "layer_type", "directions": "model_type"}  # the vectors, and what may stand beside
_STATES: dict[Site, str] = {
    "resid_post": "the file counts hidden states up to {most}: number k was taken for what block k - 1 leaves, and "
    "number 0, the embeddings' output, was left out",
    "resid_pre": "the file counts hidden states up to {most}: number k was taken for what enters block k, and number "
    "{most}, which enters none, was left out",
}
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
    takes = frozenset({"key", "layer", "site", "method"})

    def claims(self, source: Source) -> bool:
        found = names(source)
        if _wrappers(source):
            return True
        keys = [name for name in found if key_of(name)]
        if keys:
            sizes = shape(source, keys[0])
            is_row = is_vector(sizes) or (keys[0].endswith("hook_z") and len(sizes or ()) == 2)
            return sizes is not None and ("hook_" not in keys[0] or is_row)
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
        found, said = _vectors(source, model, hints)
        said = said or hints.site or "resid_post"
        counts_states = _counts_states(found, model)
        rows: dict[str, Tensor] = {}
        layers: list[int] = []
        for name, (key, tensor) in found.items():
            site = key.site or said
            layer = _state_of(key, site, model) if counts_states else _block_of(name, key, model)
            if layer is None:
                continue
            layers.append(layer)
            if hints.layer not in (None, layer):
                continue
            _check_norm(name, site, model)
            place = f"{site}.{layer}.add"
            if place in rows:
                raise SteeringError(f"two entries, one of them {name}, are for {place.removesuffix('.add')}")
            rows[place] = _placed(name, tensor, site, model)
        if not rows:
            has = ", ".join(map(str, sorted(layers)))
            raise SteeringError(f"{source.name} has layers {has or 'that no block has'} and not this one", "layer")
        notes = [_STATES[said].format(most=model.num_layers)] if counts_states else []
        method = hints.method or ("control_vector" if all("resid_post" in place for place in rows) else "vector")
        return Draft(method, rows, where=None if hints.method else "all", notes=notes)


def _vectors(source: Source, model: ModelShape, hints: Hints) -> tuple[dict[str, tuple[Key, object]], Site | None]:
    """Entries that are vectors, by name, and the site of all of them if the file names one."""
    found, wrappers = names(source), _wrappers(source)
    if hints.key is not None and hints.key not in wrappers:
        have = ", ".join(wrappers) or "none"
        raise SteeringError(f"{source.name} has no dict of vectors by layer of that name; it has {have}", "key")
    if not wrappers and len(found) == 1 and key_of(found[0]) is None:
        return _stacked(source.name, entry(source, found[0]), model), None
    rest_is_harmless(source, *LABELS)
    if wrappers:
        wrapper = _chosen(source, wrappers, hints.key)
        beside = _WRAPPED.get(wrapper, "")
        said = entry(source, beside) if beside in found else None
        keyed = _keyed(source, _inner(wrapper, entry(source, wrapper)))
        if wrapper in _WRAPPED:  # these libraries count blocks
            keyed = {name: (key._replace(is_counted=False), value) for name, (key, value) in keyed.items()}
        return keyed, _site_of(beside, said, model)
    return _keyed(source, {name: entry(source, name) for name in found if key_of(name)}), None


def _wrappers(source: Source) -> list[str]:
    """Of entries beside each other, those that are dicts of vectors by layer, or are known to be."""
    found = names(source)
    if not source.is_held and not source.name.endswith(TORCH):
        return []
    return [name for name in found if name in _WRAPPED or (key_of(name) is None and _is_by_layer(source, name))]


def _is_by_layer(source: Source, name: str) -> bool:
    keys = keys_in(source, name)
    return bool(keys) and all(map(key_of, keys))


def _chosen(source: Source, wrappers: list[str], key: str | None) -> str:
    """The one that is meant; the others are left out by a user's word alone. Raises: SteeringError."""
    if key is None and len(wrappers) > 1:
        raise SteeringError(f"{source.name} has several dicts of vectors by layer: {', '.join(wrappers)}", "key")
    for name in wrappers:
        if name != (key or wrappers[0]) and isinstance(other := entry(source, name), Ledger):
            other.harmless("*")
    return key or wrappers[0]


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


def _counts_states(found: Mapping[str, tuple[Key, object]], model: ModelShape) -> bool:
    """Whether the numbers can only count hidden states."""
    keys = [key for key, _ in found.values()]
    return all(key.is_counted and key.layer >= 0 for key in keys) and model.num_layers in {k.layer for k in keys}


def _state_of(key: Key, site: Site, model: ModelShape) -> int | None:
    """The block that leaves, or at resid_pre receives, that hidden state; None where there is none."""
    if site not in _STATES:
        raise SteeringError(
            f"the file's numbers go up to {model.num_layers}, as those of hidden states do; blocks, which {site} is "
            f"of, count from 0 to {model.num_layers - 1}",
            "site",
        )
    layer = key.layer if site == "resid_pre" else key.layer - 1
    if key.layer > model.num_layers:
        raise SteeringError(f"the file names hidden state {key.layer}; the model has 0 to {model.num_layers}")
    return layer if 0 <= layer < model.num_layers else None


def _block_of(name: str, key: Key, model: ModelShape) -> int:
    layer = key.layer if key.layer >= 0 else model.num_layers + key.layer
    if not 0 <= layer < model.num_layers:
        raise SteeringError(f"{name} names layer {key.layer}; the model has layers 0 to {model.num_layers - 1}")
    return layer


def _placed(name: str, tensor: object, site: Site, model: ModelShape) -> Tensor:
    """[hidden], or [heads, head_dim]."""
    if isinstance(tensor, Tensor) and site == "attn_head" and tensor.shape == (model.num_heads, model.head_dim):
        tensor = tensor.flatten()
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
    site = SITES_OF[str(said)]
    _check_norm(str(said), site, model)
    return site


def _check_norm(name: str, site: Site, model: ModelShape) -> None:
    if name.endswith(("hook_attn_out", "hook_mlp_out")):
        check_sandwich(site, model)
    if name.endswith("post_attention_layernorm") and model.architecture.startswith(_NORM_BEHIND):
        raise SteeringError(f"{name}: in this model that norm follows the attention, and nothing is edited behind it")


def _thin(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Without sizes of 1 before the last."""
    before = [size for size in sizes[:-1] if size != 1] or [1]
    return (*before, sizes[-1]) if len(sizes) > 1 else sizes
