"""Folders of pyvene (stanfordnlp/pyvene) and what is built on it.

context_knob  a LowRankOrthogonalProjection on the hub (kdu4108/context-vs-prior-finetuning): config.json {embed_dim,
              rank} and model.safetensors with the parametrised projection. Its value and layer are the user's to say.
pyvene        config.json {representations, intervention_types, sorted_keys} and intkey_{key}.bin per intervention:
              pyreft's ReFTs, rotated-space (knob) and addition interventions. The key names layer and component.
              A trainer's checkpoint has no config.json: then the names of the tensors say the class, or the user does.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.householder import BASE, ORIGINAL, orthogonal
from whipstaff.steering.importers.importer import Draft, Hints, Importer, layer_of
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.method import HookPoint
from whipstaff.steering.methods import METHODS
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
_FILE = re.compile(r"intkey_(.*)\.bin")
_LINKS = slice(7, 13)  # of a representation: subspace partition, group, link, mixture and sources
_ROTATE = "rotate_layer."
_Parts = dict[str, Tensor]


class Projection(Importer):
    name, files = "context_knob", "a hub folder with an orthogonal projection (config.json with embed_dim and rank)"
    takes = frozenset({"layer"})

    def claims(self, source: Source) -> bool:
        return "config.json" in source.names and "embed_dim" in source.json("config.json")

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        layer = layer_of(hints, model)
        files = source.checkpoints()
        if len(files) != 1:
            raise SteeringError(f"{source.name} has {len(files)} files of weights; wanted 1")
        found, config = source.named(files[0]), source.json("config.json")
        if ORIGINAL in found:
            basis = orthogonal(found[ORIGINAL], found.get(BASE))
        elif "weight" in found:
            basis = numbers("weight", found["weight"], model.hidden_size, None).T.contiguous()
        else:
            raise SteeringError(f"{source.name} has neither {ORIGINAL} nor weight")
        _check_projection(config, basis, ORIGINAL in found)
        return Draft("context_knob", {f"resid_post.{layer}.basis": basis}, notes=_value_note(hints))


def _check_projection(config: Ledger, basis: Tensor, is_orthogonal: bool) -> None:
    """What the config says of the tensors must be so. Raises: SteeringError."""
    rank, width = basis.shape
    for name, right in (("embed_dim", width), ("rank", rank), ("orthogonalize", is_orthogonal)):
        if (said := config.get(name)) not in (None, right):
            raise SteeringError(f"{name} of config.json is {said!r}, its tensors say {right!r}")


class Pyvene(Importer):
    name, files = "pyvene", "a folder with intkey_*.bin and config.json: pyreft, pyvene"
    takes = frozenset({"layer", "method", "part", "positions"})

    def claims(self, source: Source) -> bool:
        if "config.json" in source.names:
            return "sorted_keys" in source.json("config.json")
        return any(_FILE.fullmatch(name) for name in source.names)

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        has_config = "config.json" in source.names
        if has_config:
            _check_config(source.json("config.json"))
        elif hints.positions is None:
            raise SteeringError(
                f"{source.name} is a trainer's checkpoint, without the config.json that `save` writes; neither says "
                "which tokens it was trained on: say positions, such as f7+l7",
                "positions",
            )
        name = hints.method or (_kind(source.json("config.json")) if has_config else None)
        if name is not None:
            _check_known(name)
        states = {point: _State(source.torch(file), file) for point, file in _files(source, model, hints).items()}
        kind = _KINDS[name := name or _shown(states)]
        if "pytorch_model.bin" in source.names:
            source.torch("pytorch_model.bin")  # weights of the model that were trained too: they are left over
        tensors: dict[str, Tensor] = {}
        for point, state in states.items():
            parts = kind.parts(state)
            if kind.method == "vector":
                parts = {"add": _as_row(parts["add"], point, model)}
            state.check_buffers(model.width(point.site))
            tensors |= {f"{point.site}.{point.layer}.{part}": tensor for part, tensor in parts.items()}
        where = where_of(hints.positions) if hints.positions else None
        notes = _value_note(hints) if kind.method == "context_knob" else []
        if where is None and kind.method.endswith("reft"):
            notes.append("the folder does not say which tokens it was trained on; say positions, such as f7+l7")
        if not has_config and hints.method is None:
            notes.append(f"without a config.json the names of the tensors say {name}; if it is another, say method")
        if "activation" in METHODS[kind.method].params.model_fields and "activation" not in hints.defaults:
            notes.append(
                "the folder does not say its activation (pyreft's act_fn), so it is taken to be linear; if it was "
                "trained with another, say it as a default, such as activation=relu"
            )
        return Draft(kind.method, tensors, where=where, notes=notes)


class _State:
    """A state dict whose entries are asked for by name."""

    def __init__(self, content: Any, file: str) -> None:
        if not isinstance(content, Ledger):
            raise SteeringError(f"{file} holds no named tensors")
        self.content, self.file = content, file

    def get(self, name: str, *shape: int | None) -> Tensor:
        if name not in self.content:
            have = ", ".join(str(key)[:64] for key in list(self.content)[:16])
            raise SteeringError(f"{self.file} has no {name!r}; it has {have}")
        return numbers(f"{name} of {self.file}", self.content[name], *shape)

    def check_buffers(self, width: int) -> None:
        """pyvene's own buffers: how wide a row is, and how much of it is exchanged, which must be all of it."""
        for name in ("embed_dim", "interchange_dim"):
            said = self.content.get(name)
            if said is not None and (not isinstance(said, Tensor) or said.numel() != 1 or said.item() != width):
                raise SteeringError(f"{name} of {self.file} is {said!r:.64}, wanted all {width} numbers of a row")

    def rotation(self) -> Tensor:
        """(rank, width), from what is stored of it."""
        if "rotate_layer" in self.content:
            return self.get("rotate_layer", None, None).T.contiguous()
        if _ROTATE + ORIGINAL in self.content:
            return orthogonal(self.content[_ROTATE + ORIGINAL], self.content.get(_ROTATE + BASE))
        return self.get("rotate_layer.weight", None, None).T.contiguous()

    def names(self) -> frozenset[str]:
        """Of its modules, without pyvene's buffers."""
        return frozenset(str(key).split(".")[0] for key in self.content) - {"embed_dim", "interchange_dim"}

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
    state.content.harmless("proj_layer.bias")  # pyreft does not read it here
    return state.prefixed(_SOURCE, _LEARNED) | state.prefixed(_PROJECT, {"weight": "project"})


def _added(state: _State) -> _Parts:
    name = next((each for each in _ADDED if each in state.content), "weight")
    tensor = state.content.get(name)
    return {"add": numbers(name, tensor.flatten() if isinstance(tensor, Tensor) else tensor, None)}


_ADDED = ("source_representation", "bias")
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


_LOREFT = {"weight", "bias", "rotate_layer"}  # pyreft 0.1.0: the only state whose names have no prefixes


def _kind(config: Mapping[str, Any]) -> str:
    """The one class of the folder's interventions, in short: "<class 'pyreft...LoreftIntervention'>" is loreft."""
    types = config.get("intervention_types")
    named = types if isinstance(types, list) else []
    found = {re.sub(r"^.*[.']", "", str(each).removesuffix("'>")) for each in named if each}
    if len(found) != 1:
        raise SteeringError(f"the folder's interventions are of types {sorted(found)[:8]}; wanted one type", "method")
    return found.pop().lower().removesuffix("intervention")


def _shown(states: Mapping[HookPoint, "_State"]) -> str:
    """The class of a checkpoint's interventions, as the names of their tensors show it.

    Raises:
        SteeringError: several classes have these names, or none.
    """
    if all(state.names() == _LOREFT for state in states.values()):
        return "loreft"
    names = sorted({name for state in states.values() for name in state.names()})
    raise SteeringError(
        f"the checkpoint does not say what its interventions are, and tensors {', '.join(names)} may be of several "
        f"classes; say the method: {', '.join(_KINDS)}",
        "method",
    )


def _check_known(name: str) -> None:
    if name not in _KINDS:
        raise SteeringError(f"interventions of type {name!r} are not known; known are {', '.join(_KINDS)}", "method")


def _check_config(config: Ledger) -> None:
    """What pyvene's config says beside the keys must be what is done here. Raises: SteeringError."""
    config.harmless("intervention_constant_sources", "intervention_dimensions", "transformers_version", "model_type")
    if (mode := config.get("mode")) not in (None, "parallel", "serial"):  # of sources, of which there are none
        raise SteeringError(f"mode of config.json is {mode!r}, wanted 'parallel'")
    rows = config.get("representations")
    for row in rows if isinstance(rows, list) else []:
        if not isinstance(row, list) or len(row) < _LINKS.start or row[2] != "pos" or row[3] != 1:
            raise SteeringError(
                f"a representation of config.json is {row!r:.200}; wanted those of unit pos, one at a time"
            )
        if any(each is not None for each in row[_LINKS]):
            raise SteeringError(
                f"a representation of config.json has subspaces, links, groups or a source of its own: {row!r:.200}"
            )


def _files(source: Source, model: ModelShape, hints: Hints) -> dict[HookPoint, str]:
    """The file of every place's intervention."""
    keys = _keys(source)
    if hints.layer is not None and len(keys) > 1:
        raise SteeringError(f"the folder has interventions at {len(keys)} places, which name their layers", "layer")
    found: defaultdict[HookPoint, list[str]] = defaultdict(list)
    for key in keys:
        match = next((match for form in _KEYS if (match := form.fullmatch(key))), None)
        site = _COMPONENTS.get(match["component"]) if match else None
        if match is None or site is None:
            raise SteeringError(f"{key[:128]!r} names no layer and no component that is known here")
        layer = layer_of(hints, model, int(match["layer"]))
        found[HookPoint(site, layer)].append(f"intkey_{key}.bin")
    chosen = {}
    for point, files in found.items():
        if len(files) > 1 and (hints.part is None or hints.part >= len(files)):
            raise SteeringError(
                f"{point.site} {point.layer} has {len(files)} interventions, for different tokens (pyreft without "
                f"sharing); import each by its part, 0 to {len(files) - 1}, with its positions",
                "part",
            )
        chosen[point] = files[hints.part or 0]
    return chosen


def _keys(source: Source) -> list[str]:
    """Of the interventions: those that the config lists, or those that have files. Raises: SteeringError."""
    stored = {match[1] for name in source.names if (match := _FILE.fullmatch(name))}
    if "config.json" not in source.names:
        return sorted(stored)
    keys = source.json("config.json").get("sorted_keys")
    if not isinstance(keys, list) or not keys or len(keys) > 4096:
        raise SteeringError("config.json lists no sorted_keys")
    if unlisted := stored - set(map(str, keys)):
        raise SteeringError(
            f"the folder also has an intervention {min(unlisted)[:128]!r}, which config.json does not list"
        )
    return list(map(str, keys))


def _as_row(tensor: Tensor, point: HookPoint, model: ModelShape) -> Tensor:
    if point.site != "attn_head":
        return tensor
    return numbers("the vector", tensor, model.num_heads * model.head_dim).view(model.num_heads, model.head_dim)


def _value_note(hints: Hints) -> list[str]:
    return [] if "value" in hints.defaults else ["the file does not say its value; requests must, or a default"]
