"""Vector files: one safetensors file holds the numbers of one vector, and a JSON header says what they are and fit.

Tensors are named `{site}.{layer}.{part}`, or `{part}` alone where the numbers are the same at all its hook points;
the header's method says which parts there are and what they do (see `methods`).
"""

import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from whipstaff.steering.errors import SteeringError, VectorMismatch
from whipstaff.steering.method import HookPoint, Method, Tensors
from whipstaff.steering.shape import SITES, ModelShape
from whipstaff.steering.where import Clause

MAX_BYTES = 1 << 30
_MAX_MADE = 512  # weights and doses of one vector's settings
T = TypeVar("T")
_NO_FILE = "method:"  # in place of a digest
GENERIC = "vector"  # the method of files whose header names none of ours
_PLACED_NAME = re.compile(rf"({'|'.join(SITES)})\.(0|[1-9]\d{{0,3}})\.([A-Za-z]\w*)")


class Header(BaseModel):
    """The JSON under the safetensors metadata key "whipstaff"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    method: str = Field(max_length=64, description="what the numbers are: caa, iti, lofit ...")
    model: ModelShape
    scale: float | None = Field(None, allow_inf_nan=False, description="strength when a request names none")
    defaults: dict[str, Any] = Field({}, description="the method's other parameters when a request names none")
    where: Clause | None = Field(None, description="which tokens when a request says nothing; None: the method's own")
    description: str = Field("", max_length=4096)
    provenance: dict[str, Any] = {}
    licence: str = Field("", max_length=128)
    example: dict[str, Any] | None = Field(
        None,
        exclude_if=lambda value: value is None,
        description="fields of a request that shows what it does; the vector's own name is left out",
    )

    @property
    def known_defaults(self) -> dict[str, Any]:
        """What a request's parameters are filled up with."""
        return self.defaults if self.scale is None else {**self.defaults, "scale": self.scale}


@dataclass(frozen=True, eq=False)
class Vector:
    """A loaded vector. `tensors[point][part]` is float32 in the file's shape."""

    digest: str  # sha256 of the file
    header: Header
    tensors: Mapping[HookPoint, Tensors]
    shared_parts: Tensors = field(default_factory=dict)  # of methods that edit no hook point, such as soft prompts
    _made: OrderedDict[Hashable, Any] = field(default_factory=OrderedDict, init=False, repr=False)

    @property
    def method(self) -> Method[Any]:
        return method_of(self.header.method)

    @property
    def layers(self) -> list[int]:
        return sorted({point.layer for point in self.tensors})

    @property
    def sites(self) -> list[str]:
        return sorted({point.site for point in self.tensors})

    def once(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for a key; the latest so many are kept, for as long as the vector."""
        if key not in self._made:
            self._made[key] = make()
            if len(self._made) > _MAX_MADE:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        made: T = self._made[key]
        return made

    def norms(self) -> dict[str, float]:
        """L2 norm of every tensor, by tensor name."""
        norms = {name: float(tensor.norm()) for name, tensor in self.shared_parts.items()}
        for (site, layer), parts in self.tensors.items():
            norms |= {f"{site}.{layer}.{part}": float(t.norm()) for part, t in parts.items() if part not in norms}
        return norms

    def fits(self, model: ModelShape) -> bool:
        """Whether it can be used on a model; only what edits heads asks for their size."""
        return self.header.model.fits(model, has_heads="attn_head" in self.sites)

    @cached_property
    def warnings(self) -> list[str]:
        """What its maker was told, and which of its numbers are all zero and so change nothing."""
        said = self.header.provenance.get("warnings")
        told = [str(each) for each in said] if isinstance(said, list) else []
        return told + [each for each in zeros(self) if each not in told]

    def check_fits(self, model: ModelShape) -> None:
        """Raises: VectorMismatch, with both shapes."""
        if not self.fits(model):
            raise VectorMismatch(
                f"the vector was made for {_shape_text(self.header.model)}, the served model is {_shape_text(model)}",
                "vector",
            )


def zeros(vector: Vector) -> list[str]:
    """Warnings of parts that a method needs, or of all parts of a hook point, that are all zero."""
    needed = {name for name in vector.method.parts if not name.endswith("?")}
    hook_points = {f"{site}.{layer}": parts for (site, layer), parts in vector.tensors.items()}
    found = []
    for name, parts in (hook_points or {"the file": vector.shared_parts}).items():
        empty = [part for part, tensor in parts.items() if not tensor.any()]
        if empty and (len(empty) == len(parts) or needed & set(empty)):
            found.append(f"{', '.join(sorted(empty))} of {name} is all zeros")
    return found


def method_of(name: str) -> Method[Any]:
    """The method that a header names; vectors of methods without code of their own add their numbers."""
    return methods().get(name) or methods()[GENERIC]


def methods() -> Mapping[str, Method[Any]]:
    """The table of all, which is read late: methods know of vectors."""
    from whipstaff.steering.methods import METHODS

    return METHODS


def without_file(model: ModelShape) -> dict[str, Vector]:
    """By name, the methods that need no numbers of their own, as vectors that requests may name by `method`."""
    return {
        name: Vector(
            _NO_FILE + name, Header(method=name, model=model), {point: {} for point in method.hook_points(model)}
        )
        for name, method in methods().items()
        if not method.needs_file
    }


def write(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write a vector file. Raises: SteeringError when `read` would not take it back."""
    data = packed(header, tensors)
    parse(data)
    path.write_bytes(data)


def packed(header: Header, tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a vector file, unchecked."""
    numbers = {name: tensor.detach().to(torch.float32, copy=True).contiguous() for name, tensor in tensors.items()}
    return save(numbers, metadata={"whipstaff": header.model_dump_json()})


def read(path: Path) -> Vector:
    """Load and check a vector file. Raises: SteeringError naming what is wrong; nothing is executed."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SteeringError(f"{path.name} has {size} bytes; a vector file has at most {MAX_BYTES}")
    return parse(path.read_bytes())


def is_native(data: bytes) -> bool:
    """Whether a file's bytes claim to be a vector file."""
    try:
        return "whipstaff" in _metadata(data)
    except (ValueError, KeyError, RecursionError):
        return False


def parse(data: bytes) -> Vector:
    """The vector that a file's bytes hold."""
    header = _header(data)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise SteeringError(f"not a sound safetensors file: {error}") from error
    if not tensors:
        raise SteeringError("the file holds no tensors")
    method = method_of(header.method)
    placed: dict[HookPoint, dict[str, Tensor]] = {}
    shared_parts: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        point, part = _split(name, method, header.model)
        numbers = _checked(name, tensor)
        (shared_parts if point is None else placed.setdefault(point, {}))[part] = numbers
    if shared_parts:
        for point in placed or method.hook_points(header.model):
            placed.setdefault(point, {}).update(shared_parts)
    for point in sorted(placed):
        check_shapes(method, placed[point], point, header.model)
        method.check(placed[point], point, header.model)
    if not placed:
        if method.sites:
            raise SteeringError(f"name the layers: {method.name} has no hook points of its own")
        check_shapes(method, shared_parts, None, header.model)
    vector = Vector(hashlib.sha256(data).hexdigest(), header, dict(sorted(placed.items())), shared_parts)
    _check_defaults(vector)
    _check_encoders(vector)
    return vector


def check_shapes(method: Method[Any], parts: Tensors, point: HookPoint | None, model: ModelShape) -> None:
    """Check the tensors of one hook point against the method's parts. Raises: SteeringError."""
    known: dict[str, int] = {name: getattr(model, name) for name in ("num_layers", "head_dim")}
    known |= {"hidden": model.hidden_size, "heads": model.num_heads, "experts": model.num_experts}
    if model.num_kv_heads:
        known["kv_heads"] = model.num_kv_heads
    where = "" if point is None else f" of {point.site} {point.layer}"
    for said, symbols in method.parts.items():
        name = said.removesuffix("?")
        if name not in parts:
            if said == name:
                raise SteeringError(f"{method.name} needs a tensor {name!r}{where}; the file has {sorted(parts)}")
            continue
        shape = _expanded(symbols, point)
        actual = tuple(parts[name].shape)
        if point is not None and "width" not in known:
            known["width"] = model.width(point.site)
        wanted = [int(symbol) if symbol.isdecimal() else known.get(symbol, symbol) for symbol in shape]
        if len(actual) != len(shape) or any(isinstance(w, int) and w != a for w, a in zip(wanted, actual, strict=True)):
            raise SteeringError(f"tensor {name!r}{where} has shape {list(actual)}, wanted {_listed(wanted)}")
        known |= dict(zip(shape, actual, strict=True))


def _expanded(symbols: tuple[str, ...], point: HookPoint | None) -> tuple[str, ...]:
    """At attn_head the file keeps heads apart."""
    if point is None or point.site != "attn_head":
        return symbols
    return tuple(name for symbol in symbols for name in (("heads", "head_dim") if symbol == "width" else (symbol,)))


def _listed(wanted: list[Any]) -> str:
    return f"[{', '.join(map(str, wanted))}]"


def _header(data: bytes) -> Header:
    try:
        metadata = _metadata(data)
    except (ValueError, KeyError, RecursionError) as error:
        raise SteeringError(f"not a sound safetensors file: {error}") from error
    if "whipstaff" not in metadata:
        raise SteeringError('the file has no "whipstaff" metadata; it is not a Whipstaff vector')
    try:
        return Header.model_validate_json(metadata["whipstaff"])
    except ValidationError as error:
        first = error.errors()[0]
        raise SteeringError(f"header field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def _split(name: str, method: Method[Any], model: ModelShape) -> tuple[HookPoint | None, str]:
    """What a tensor's name says."""
    match = _PLACED_NAME.fullmatch(name)
    part = name if match is None else match[3]
    known = [said.removesuffix("?") for said in method.parts]
    if part not in known:
        raise SteeringError(
            f"tensor {name!r}: names are {{site}}.{{layer}}.{{part}} or {{part}}, and {method.name} has the parts "
            + ", ".join(known)
        )
    if match is None:
        return None, part
    site, layer = next(site for site in SITES if site == match[1]), int(match[2])
    if method.sites and site not in method.sites:
        raise SteeringError(f"tensor {name!r}: {method.name} is made at {', '.join(method.sites)}")
    if layer >= model.num_layers:
        raise SteeringError(f"tensor {name!r}: the header's model has layers 0 to {model.num_layers - 1}")
    if site == "router" and not model.num_experts:
        raise SteeringError(f"tensor {name!r}: the header's model has no experts")
    return HookPoint(site, layer), part


def _checked(name: str, tensor: Tensor) -> Tensor:
    if not tensor.dtype.is_floating_point:
        raise SteeringError(f"tensor {name!r} has dtype {tensor.dtype}, wanted a floating-point one")
    numbers = tensor.to(torch.float32)
    if not math.isfinite(numbers.abs().sum().item()):
        raise SteeringError(f"tensor {name!r} holds numbers that are not finite, or too large for float32")
    return numbers


def _check_defaults(vector: Vector) -> None:
    """The header's own parameters must be ones that a request could send."""
    try:
        vector.method.params.model_validate(vector.header.known_defaults)
    except ValidationError as error:
        missing = [one for one in error.errors() if one["type"] != "missing"]  # a request may have to say something
        if missing:
            where = ".".join(map(str, missing[0]["loc"]))
            raise SteeringError(f"header field defaults.{where}: {missing[0]['msg']}") from error
    vector.method.check_defaults(vector.shared_parts, vector.header.defaults)


def _check_encoders(vector: Vector) -> None:
    """Readings that compete with each other belong to one autoencoder at a hook point."""
    found: dict[HookPoint, HookPoint] = {}
    for point, tensors in vector.tensors.items():
        if not vector.method.encoder_size(tensors, vector.header.defaults):
            continue
        if (other := found.setdefault(point.canonical, point)) != point:
            raise SteeringError(
                f"{other.site}.{other.layer} and {point.site}.{point.layer} are the same stream; a file has one "
                "autoencoder there whose largest features count: make two files"
            )


def _shape_text(model: ModelShape) -> str:
    return (
        f"{model.architecture} (hidden {model.hidden_size}, {model.num_layers} layers, "
        f"{model.num_heads} heads of {model.head_dim})"
    )
