"""repeng's control vectors (vgel/repeng, `ControlVector.export_gguf`), as llama.cpp and EasySteer use them too.

GGUF: "GGUF", version u32, numbers of tensors and of fields u64; fields (key, type u32, value); tensors (name, number of
dimensions u32, sizes u64, type u32, offset u64); then the numbers, aligned. Here general.architecture is
"controlvector" and tensor direction.N is what is added to resid_post of block N.
"""

import re
import struct
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whipstaff.steering.artifacts import MAX_BYTES
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.importer import Draft, Hints, Importer
from whipstaff.steering.importers.source import Source, numbers
from whipstaff.steering.shape import ModelShape

MAX_ENTRIES = 4096
MAX_STRING = 1 << 16
MAX_ARRAY = 1 << 20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_DTYPES = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


class GGUF(NamedTuple):
    """Fields, without arrays, and tensors."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


class Repeng(Importer):
    name, files = "repeng", "control_vector.gguf (repeng, llama.cpp, EasySteer)"

    def claims(self, source: Source) -> bool:
        return source.name.endswith(".gguf") or (not source.is_folder and _magic(source.path) == b"GGUF")

    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        found = read_gguf(source.file(source.name))
        if (kind := found.fields.get("general.architecture")) != "controlvector":
            raise SteeringError(f"{source.name} is a GGUF file of architecture {kind!r}, wanted 'controlvector'")
        tensors, notes = {}, []
        for name, tensor in found.tensors.items():
            match = re.fullmatch(r"direction\.(0|[1-9]\d{0,3})", name)
            if match is None:
                notes.append(f"tensor {name[:64]!r} was ignored")
                continue
            if match[1] == "0":
                notes.append("direction.0: llama.cpp does not apply it, Whipstaff does")
            tensors[f"resid_post.{match[1]}.add"] = numbers(name, tensor, model.hidden_size)
        if not tensors:
            raise SteeringError(f"{source.name} has no tensors direction.N")
        hint = str(found.fields.get("controlvector.model_hint", ""))
        if hint and hint.lower().replace("_", "") not in model.architecture.lower():
            notes.append(f"the file was made for {hint[:64]!r}, the model is {model.architecture}")
        return Draft("control_vector", tensors, notes=notes)


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
        if kind == _ARRAY:  # of no use here
            inner, length = self.one("I"), self.count("array entries", MAX_ARRAY)
            if inner == _STRING:
                for _ in range(length):
                    self.string()
            elif inner in _SCALARS:
                self.one(f"{length * struct.calcsize('<' + _SCALARS[inner])}s")
            else:
                raise SteeringError(f"type {inner} of a GGUF array")
            return None
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
