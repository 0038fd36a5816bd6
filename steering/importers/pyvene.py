"""Folders of pyvene (stanfordnlp/pyvene) and what is built on it.

context_knob  a LowRankOrthogonalProjection on the hub (kdu4108/context-vs-prior-finetuning): config.json {embed_dim,
              rank} and model.safetensors with the parametrised projection. Its value and layer are the user's to say.
pyvene        config.json {representations, intervention_types, sorted_keys} and intkey_{key}.bin per intervention:
              pyreft's ReFTs, rotated-space (knob) and addition interventions. The key names layer and component.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.householder import BASE, ORIGINAL, orthogonal
from whipstaff.steering.importers.importer import Draft, Hints, Importer, layer_of
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.methods.reft import where_of
from whipstaff.steering.shape import ModelShape, Site

_COMPONENTS: dict[str, Site] = {
    "block_output": "resid_post",
    "output": "resid_post",
    "block_input": "resid_pre",
    "input": "resid_pre",
    "attention_output": "attn_out",
    "attention_input": "attn_in",
    "attention_value_output": "attn_head",
    "mlp_output": "mlp_out",
    "mlp_input": "mlp_in",
}
_KEYS = (  # layer.15.comp.block_output.unit.pos.nunit.1#0, comp_model_layers[3]_output_unit_pos_nunit_1#0
    re.compile(r"layer[._](?P<layer>\d{1,4})[._](?:comp|repr)[._](?P<component>\w+?)[._]unit[._].*"),
    re.compile(r"comp[._].*?(?:layers|h)[._]?\[?(?P<layer>\d{1,4})\]?[._](?P<component>\w+?)[._]unit[._].*"),
)
_ROTATE = "rotate_layer."
_Parts = dict[str, Tensor]


class Projection(Importer):
    name, files = "context_knob", "a hub folder with an orthogonal projection (config.json with embed_dim and rank)"
    takes = frozenset({"layer"})

    def claims(self, source: Source) -> bool:
        return "config.json" in source.names and "embed_dim" in source.json("config.json")

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        layer = layer_of(hints, model)
        found = {key: tensor for name in source.checkpoints() for key, tensor in source.tensors(name)}
        if ORIGINAL in found:
            basis = orthogonal(found[ORIGINAL], found.get(BASE))
        elif "weight" in found:  # orthogonalize: false
            basis = numbers("weight", found["weight"], model.hidden_size, None).T.contiguous()
        else:
            raise SteeringError(f"{source.name} has neither {ORIGINAL} nor weight")
        return Draft("context_knob", {f"resid_post.{layer}.basis": basis}, notes=_value_note(hints))


class Pyvene(Importer):
    name, files = "pyvene", "a folder with intkey_*.bin and config.json: pyreft, pyvene"
    takes = frozenset({"layer", "method", "part", "positions"})

    def claims(self, source: Source) -> bool:
        return "config.json" in source.names and "sorted_keys" in source.json("config.json")

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        kind = _KINDS.get(name := hints.method or _kind(source.json("config.json")))
        if kind is None:
            raise SteeringError(
                f"interventions of type {name!r} are not known; known are {', '.join(_KINDS)}", "method"
            )
        tensors: dict[str, Tensor] = {}
        for place, file in _files(source, model, hints).items():
            parts = kind.parts(_State(source.torch(file), file))
            if kind.method == "vector":
                parts = {"add": _as_row(parts["add"], place, model)}
            tensors |= {f"{place}.{part}": tensor for part, tensor in parts.items()}
        where = where_of(hints.positions) if hints.positions else None
        notes = _value_note(hints) if kind.method == "context_knob" else []
        if where is None and kind.method.endswith("reft"):
            notes = ["the folder does not say which tokens it was trained on; say positions, such as f7+l7"]
        return Draft(kind.method, tensors, where=where, notes=notes)


class _State:
    """A state dict whose entries are asked for by name."""

    def __init__(self, content: Any, file: str) -> None:
        if not isinstance(content, Mapping):
            raise SteeringError(f"{file} holds no named tensors")
        self.content, self.file = content, file

    def get(self, name: str, *shape: int | None) -> Tensor:
        if name not in self.content:
            have = ", ".join(str(key)[:64] for key in list(self.content)[:16])
            raise SteeringError(f"{self.file} has no {name!r}; it has {have}")
        return numbers(f"{name} of {self.file}", self.content[name], *shape)

    def rotation(self) -> Tensor:
        """(rank, width), from what is stored of it."""
        if "rotate_layer" in self.content:
            return self.get("rotate_layer", None, None).T.contiguous()
        if _ROTATE + ORIGINAL in self.content:
            return orthogonal(self.content[_ROTATE + ORIGINAL], self.content.get(_ROTATE + BASE))
        return self.get("rotate_layer.weight", None, None).T.contiguous()

    def prefixed(self, prefix: str, names: dict[str, str]) -> _Parts:
        """weight [rank, width] and bias [rank], as their names in a file, with or without the prefix."""
        ours = {}
        for theirs, name in names.items():
            key = prefix + theirs if prefix + theirs in self.content else theirs
            ours[name] = self.get(key, *((None, None) if theirs == "weight" else (None,)))
        return ours


class _Kind(NamedTuple):
    """A class of interventions: our method, and its parts."""

    method: str
    parts: Callable[[_State], _Parts]


_SOURCE, _PROJECT = "learned_source.", "proj_layer."
_LEARNED = {"weight": "weight", "bias": "bias"}
_PROJECTED = {"weight": "project", "bias": "project_bias"}


def _rotated(state: _State) -> _Parts:
    return {"rotate": state.rotation()} | state.prefixed(_SOURCE, _LEARNED)


def _constant(state: _State) -> _Parts:
    return {"rotate": state.rotation(), "bias": state.get("learned_source", None)}


def _noreft(state: _State) -> _Parts:
    return state.prefixed(_SOURCE, _LEARNED) | state.prefixed(_PROJECT, _PROJECTED)


def _nodireft(state: _State) -> _Parts:
    return state.prefixed(_SOURCE, _LEARNED) | state.prefixed(_PROJECT, {"weight": "project"})


def _added(state: _State) -> _Parts:
    name = next((each for each in ("source_representation", "bias") if each in state.content), "weight")
    tensor = state.content.get(name)
    return {"add": numbers(name, tensor.flatten() if isinstance(tensor, Tensor) else tensor, None)}


_KNOB = _Kind("context_knob", lambda state: {"basis": state.rotation()})
_VECTOR = _Kind("vector", _added)
_KINDS = {
    "loreft": _Kind("loreft", _rotated),
    "direft": _Kind("direft", _rotated),
    "noreft": _Kind("noreft", _noreft),
    "nodireft": _Kind("nodireft", _nodireft),
    "consreft": _Kind("consreft", _constant),
    "lobireft": _Kind("lobireft", _constant),
    "rotatedspace": _KNOB,
    "lowrankrotatedspace": _KNOB,
    "context_knob": _KNOB,
    "addition": _VECTOR,
    "bias": _VECTOR,
    "vector": _VECTOR,
}


def _kind(config: dict[str, Any]) -> str:
    """The one class of the folder's interventions, in short: "<class 'pyreft...LoreftIntervention'>" is loreft."""
    types = config.get("intervention_types")
    named = types if isinstance(types, list) else []
    found = {re.sub(r"^.*[.']", "", str(each).removesuffix("'>")) for each in named if each}
    if len(found) != 1:
        raise SteeringError(f"the folder's interventions are of types {sorted(found)[:8]}; wanted one type", "method")
    return found.pop().lower().removesuffix("intervention")


def _files(source: Source, model: ModelShape, hints: Hints) -> dict[str, str]:
    """`{site}.{layer}` -> the file of its intervention."""
    keys = source.json("config.json").get("sorted_keys")
    if not isinstance(keys, list) or not keys or len(keys) > 4096:
        raise SteeringError("config.json lists no sorted_keys")
    found: defaultdict[str, list[str]] = defaultdict(list)
    for key in map(str, keys):
        match = next((match for form in _KEYS if (match := form.fullmatch(key))), None)
        site = _COMPONENTS.get(match["component"]) if match else None
        if match is None or site is None:
            raise SteeringError(f"{key[:128]!r} names no layer and no component that is known here")
        found[f"{site}.{layer_of(hints, model, int(match['layer']))}"].append(f"intkey_{key}.bin")
    chosen = {}
    for place, files in found.items():
        if len(files) > 1 and (hints.part is None or hints.part >= len(files)):
            raise SteeringError(
                f"{place} has {len(files)} interventions, for different tokens (pyreft without sharing); import each "
                f"by its part, 0 to {len(files) - 1}, with its positions",
                "part",
            )
        chosen[place] = files[hints.part or 0]
    return chosen


def _as_row(tensor: Tensor, place: str, model: ModelShape) -> Tensor:
    if not place.startswith("attn_head"):
        return tensor
    return numbers("the vector", tensor, model.num_heads * model.head_dim).view(model.num_heads, model.head_dim)


def _value_note(hints: Hints) -> list[str]:
    return [] if "value" in hints.defaults else ["the file does not say its value; requests must, or a default"]
