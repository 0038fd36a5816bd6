"""repeng's control vectors (vgel/repeng, `ControlVector.export_gguf`), as llama.cpp and EasySteer use them too.

GGUF: "GGUF", version u32, numbers of tensors and of fields u64; fields (key, type u32, value); tensors (name, number of
dimensions u32, sizes u64, type u32, offset u64); then the numbers, aligned. Here general.architecture is
"controlvector" and tensor direction.N is what is added to resid_post of block N. GLP (msuiche/weightless) writes the
same with fields glp.*: where `glp.mode` is project, h <- h - alpha (h . d) d with d the direction at length 1.
"""

import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.autoencoder import check_sandwich
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.shape import ModelShape, Site
from whipstaff.steering.vector_file import MAX_BYTES

MAX_ENTRIES = 4096
MAX_STRING = 1 << 16
MAX_ARRAY = 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_LABELS = (  # about the file and its maker
    "GGUF.*",
    "controlvector.layer_count",
    "general.alignment",
    "general.author",
    "general.base_model.*",
    "general.basename",
    "general.description",
    "general.doi",
    "general.file_type",
    "general.finetune",
    "general.languages",
    "general.license*",
    "general.name",
    "general.organization",
    "general.quantization_version",
    "general.quantized_by",
    "general.repo_url",
    "general.size_label",
    "general.source.*",
    "general.tags",
    "general.type",
    "general.url",
    "general.uuid",
    "general.version",
)
_GLP_LABELS = (
    "glp.base_model*",
    "glp.base_revision",
    "glp.content_sha256",
    "glp.contrast",
    "glp.derived_at",
    "glp.generator",
    "glp.method",
    "glp.orthonormal",
    "glp.structure",
)
_GLP_MODES = {"project": ("directional_ablation", "direction"), "add": ("vector", "add")}
_GLP_HOOKS: dict[str, Site] = {
    "residual_stream_post_layer": "resid_post",
    "ffn_out_pre_residual": "mlp_out",
    "attn_out_pre_residual": "attn_out",
}
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


class GGUF(NamedTuple):
    """Fields, of arrays no more than their length, and tensors."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


class Repeng(Importer):
    name, files = "repeng", "control_vector.gguf (repeng, llama.cpp, EasySteer)"

    def claims(self, source: Source) -> bool:
        return source.name.endswith(".gguf") or (not source.is_folder and _magic(source.path) == b"GGUF")

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        found = read_gguf(source.file(source.name))
        said = source.account(Ledger(f"the metadata of {source.name}", found.fields))
        said.harmless(*_LABELS)
        if (kind := said.get("general.architecture")) != "controlvector":
            raise SteeringError(f"{source.name} is a GGUF file of architecture {kind!r}, wanted 'controlvector'")
        rows = _directions(source.account(Ledger(source.name, found.tensors)), model)
        if not rows:
            raise SteeringError(f"{source.name} has no tensors direction.N")
        notes = _hinted(str(said.get("controlvector.model_hint", "")), model)
        if any(name.startswith("glp.") for name in said):
            return _projected(said, rows, model, notes)
        if 0 in rows:
            notes.append("direction.0: llama.cpp does not apply it, Whipstaff does")
        return Draft("control_vector", {f"resid_post.{layer}.add": row for layer, row in rows.items()}, notes=notes)


def _directions(tensors: Ledger, model: ModelShape) -> dict[int, Tensor]:
    """By layer."""
    found = {}
    for name in tensors:
        if match := re.fullmatch(r"direction\.(0|[1-9]\d{0,3})", name):
            if (layer := int(match[1])) >= model.num_layers:
                raise SteeringError(f"{name}: the model has layers 0 to {model.num_layers - 1}")
            found[layer] = numbers(name, tensors[name], model.hidden_size)
    return found


def _hinted(hint: str, model: ModelShape) -> list[str]:
    if not hint or hint.lower().replace("_", "") in model.architecture.lower():
        return []
    return [f"the file was made for {hint[:64]!r}, the model is {model.architecture}"]


def _projected(said: Ledger, rows: dict[int, Tensor], model: ModelShape, notes: list[str]) -> Draft:
    """GLP's: `glp.mode` is what is done with a direction, `glp.hook_point` where, `glp.alpha_default` how much."""
    said.harmless(*_GLP_LABELS)
    mode, hook = said.get("glp.mode"), said.get("glp.hook_point", "residual_stream_post_layer")
    if mode not in _GLP_MODES or hook not in _GLP_HOOKS or said.get("glp.rank", 1) != 1:
        raise SteeringError(
            f"glp.mode {mode!r} at glp.hook_point {hook!r}, glp.rank {said.get('glp.rank', 1)}; known are the modes "
            f"{', '.join(_GLP_MODES)} of rank 1 at {', '.join(_GLP_HOOKS)}"
        )
    if said.get("glp.spec_version", 1) not in (1, 2):
        raise SteeringError(f"glp.spec_version {said['glp.spec_version']!r}; 1 and 2 are known")
    if said.get("glp.layer_ids_zero_based", True) is not True:
        raise SteeringError(f"glp.layer_ids_zero_based is {said['glp.layer_ids_zero_based']!r}; blocks count from 0")
    method, part = _GLP_MODES[mode]
    check_sandwich(_GLP_HOOKS[hook], model)
    alpha = said.get("glp.alpha_default", 1.0)
    if not isinstance(alpha, int | float):
        raise SteeringError(f"glp.alpha_default {alpha!r} is no number")
    tensors = {f"{_GLP_HOOKS[hook]}.{layer}.{part}": row for layer, row in rows.items()}
    return Draft(method, tensors, where="all", scale=float(alpha), notes=notes)


def read_gguf(path: Path) -> GGUF:
    """Raises: SteeringError."""
    if path.stat().st_size > MAX_BYTES:
        raise SteeringError(f"{path.name} has more than {MAX_BYTES} bytes; a control vector is small")
    return parse_gguf(path.read_bytes())


def parse_gguf(data: bytes) -> GGUF:
    """Raises: SteeringError."""
    try:
        return _Reader(data).parsed()
    except struct.error as error:
        raise SteeringError("the GGUF file ends too early") from error


class _Reader:
    """A position in bytes; reading past the end is struct.error."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def parsed(self) -> GGUF:
        if self.data[:4] != b"GGUF":
            raise SteeringError("not a GGUF file")
        self.at = 4
        if (version := self.one("I")) not in (2, 3):
            raise SteeringError(f"version {version} of GGUF; versions 2 and 3, little-endian, are read")
        num_tensors, num_fields = self.count("tensors"), self.count("fields")
        fields: dict[str, Any] = {}
        for _ in range(num_fields):
            key = self.string()
            fields[key] = self.value(self.one("I"))
        infos = [self.info() for _ in range(num_tensors)]
        alignment = fields.get("general.alignment", 32)
        if alignment not in [1 << power for power in range(3, 17)]:
            raise SteeringError(f"alignment {alignment!r} of a GGUF file")
        start = -(-self.at // alignment) * alignment
        tensors = {name: self.tensor(name, sizes, kind, start + at) for name, sizes, kind, at in infos}
        if len(tensors) != len(infos):
            raise SteeringError("two tensors of the GGUF file have one name")
        return GGUF(fields, tensors)

    def one(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += struct.calcsize("<" + code)
        return value

    def count(self, what: str, most: int = MAX_ENTRIES) -> int:
        number: int = self.one("Q")
        if number > most:
            raise SteeringError(f"the GGUF file says it has {number} {what}; at most {most} are read")
        return number

    def string(self) -> str:
        length = self.count("bytes in a string", MAX_STRING)
        raw = self.one(f"{length}s")
        return str(raw, "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:  # of no use here, but that there is one
            inner, length = self.one("I"), self.count("array entries", MAX_ARRAY)
            if inner == _STRING:
                for _ in range(length):
                    self.string()
            elif inner in _SCALARS:
                self.one(f"{length * struct.calcsize('<' + _SCALARS[inner])}s")
            else:
                raise SteeringError(f"type {inner} of a GGUF array")
            return f"an array of {length}" if length else None
        if kind not in _SCALARS:
            raise SteeringError(f"type {kind} of a GGUF field")
        return self.one(_SCALARS[kind])

    def info(self) -> tuple[str, list[int], int, int]:
        name, num_sizes = self.string(), self.one("I")
        if num_sizes > 4:
            raise SteeringError(f"tensor {name[:64]!r} has {num_sizes} dimensions")
        return name, [self.one("Q") for _ in range(num_sizes)], self.one("I"), self.one("Q")

    def tensor(self, name: str, sizes: list[int], kind: int, at: int) -> Tensor:
        if kind not in _DTYPES:
            raise SteeringError(f"tensor {name[:64]!r} has GGUF type {kind}; F32, F16 and BF16 are read")
        num = 1
        for size in sizes:
            num *= size
        end = at + num * _DTYPES[kind].itemsize
        if not num or end > len(self.data):
            raise SteeringError(f"tensor {name[:64]!r} of {sizes} does not fit into the GGUF file")
        found = torch.frombuffer(bytearray(self.data[at:end]), dtype=_DTYPES[kind])
        return found.view(sizes[::-1])  # GGUF counts the fastest size first


def _magic(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(4)
