"""Vector files: one safetensors file holds the edit of one vector, and a JSON header says what it is and fits.

Tensors are named `{site}.{layer}.{part}`:
    site   `resid_post` (the residual stream after a block; shape (hidden,)) or
           `attn_head` (head outputs before the output projection; shape (heads, head_dim))
    layer  0-based block index
    part   `add` or `gain`: at strength s the edit is  x <- x + s * (gain * x + add),  so s = 0 is exactly off and
           LoFiT's (1 + A) x + v is gain = A, add = v at s = 1; replacing x by v is gain = -1, add = v.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from whipstaff.steering.errors import SteeringError, VectorMismatch
from whipstaff.steering.where import Clause

Site = Literal["resid_post", "attn_head"]
SITES: tuple[Site, ...] = ("resid_post", "attn_head")
Part = Literal["add", "gain"]
MAX_BYTES = 1 << 30
_TENSOR_NAME = re.compile(r"(resid_post|attn_head)\.(0|[1-9]\d{0,3})\.(add|gain)")


class ModelShape(BaseModel):
    """What a vector must agree on with the model it is used on."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str = Field(description="informative; structure, not the name, decides whether a vector fits")
    hidden_size: int = Field(gt=0)
    num_layers: int = Field(gt=0)
    num_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)

    def fits(self, other: "ModelShape") -> bool:
        return self.model_dump(exclude={"architecture"}) == other.model_dump(exclude={"architecture"})

    def width(self, site: Site) -> int:
        """Numbers per token at a site."""
        return self.hidden_size if site == "resid_post" else self.num_heads * self.head_dim


class Header(BaseModel):
    """The JSON under the safetensors metadata key "whipstaff"."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    method: str = Field(max_length=64, description="what the numbers are: caa, iti, lofit ...")
    model: ModelShape
    scale: float = Field(1.0, allow_inf_nan=False, description="strength when a request names none")
    where: Clause = "each_last"
    description: str = Field("", max_length=4096)
    provenance: dict[str, Any] = {}
    licence: str = Field("", max_length=128)


@dataclass(frozen=True)
class Stack:
    """A vector's tensors at one site, layer upon layer, so that a few wide operations handle them all."""

    layers: tuple[int, ...]
    gain: Tensor | None  # (len(layers), width); None when no layer has a gain
    add: Tensor | None


@dataclass(frozen=True)
class Vector:
    """A loaded vector. `tensors[site, layer][part]` is float32 of shape (width,)."""

    digest: str  # sha256 of the file
    header: Header
    tensors: Mapping[tuple[Site, int], Mapping[Part, Tensor]]

    @property
    def layers(self) -> list[int]:
        return sorted({layer for _, layer in self.tensors})

    @property
    def sites(self) -> list[Site]:
        return sorted({site for site, _ in self.tensors})

    def norms(self) -> dict[str, float]:
        """L2 norm of every tensor at scale 1, by tensor name."""
        return {
            f"{site}.{layer}.{part}": float(tensor.norm())
            for (site, layer), parts in self.tensors.items()
            for part, tensor in parts.items()
        }

    @cached_property
    def stacks(self) -> Mapping[Site, Stack]:
        """By site, what `tensors` holds."""
        return {site: self._stack(site) for site in self.sites}

    def _stack(self, site: Site) -> Stack:
        places = sorted(place for place in self.tensors if place[0] == site)
        empty = torch.zeros(self.header.model.width(site))

        def pile(part: Part) -> Tensor | None:
            if not any(part in self.tensors[place] for place in places):
                return None
            return torch.stack([self.tensors[place].get(part, empty) for place in places])

        return Stack(tuple(layer for _, layer in places), pile("gain"), pile("add"))

    @cached_property
    def peaks(self) -> Mapping[tuple[Site, int], tuple[float, float]]:
        """The largest |gain| and |add| at every site and layer, at scale 1."""
        return {
            place: (_peak(parts.get("gain")), _peak(parts.get("add"))) for place, parts in sorted(self.tensors.items())
        }

    def check_fits(self, model: ModelShape) -> None:
        """Raises: VectorMismatch, with both shapes."""
        if not self.header.model.fits(model):
            raise VectorMismatch(
                f"the vector was made for {_said(self.header.model)}, the served model is {_said(model)}", "vector"
            )


def write(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> None:
    """Write a vector file. Raises: SteeringError when `read` would not take it back."""
    packed = {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in tensors.items()}
    data = save(packed, metadata={"whipstaff": header.model_dump_json()})
    parse(data)
    path.write_bytes(data)


def read(path: Path) -> Vector:
    """Load and check a vector file. Raises: SteeringError naming what is wrong; nothing is executed."""
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise SteeringError(f"{path.name} has {size} bytes; a vector file has at most {MAX_BYTES}")
    return parse(path.read_bytes())


def parse(data: bytes) -> Vector:
    """The vector that a file's bytes hold."""
    try:
        metadata = _metadata(data)
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise SteeringError(f"not a sound safetensors file: {error}") from error
    if "whipstaff" not in metadata:
        raise SteeringError('the file has no "whipstaff" metadata; it is not a Whipstaff vector')
    try:
        header = Header.model_validate_json(metadata["whipstaff"])
    except ValidationError as error:
        first = error.errors()[0]
        raise SteeringError(f"header field {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not tensors:
        raise SteeringError("the file holds no tensors")
    grouped: dict[tuple[Site, int], dict[Part, Tensor]] = {}
    for name, tensor in tensors.items():
        site, layer, part = _checked(name, tensor, header.model)
        grouped.setdefault((site, layer), {})[part] = tensor.to(torch.float32).flatten()
    return Vector(hashlib.sha256(data).hexdigest(), header, grouped)


def _metadata(data: bytes) -> dict[str, str]:
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict):
        raise ValueError("the header is not a JSON object")
    metadata = header.get("__metadata__", {})
    return metadata if isinstance(metadata, dict) else {}


def _checked(name: str, tensor: Tensor, model: ModelShape) -> tuple[Site, int, Part]:
    """What a tensor's name says, after checking its shape and values."""
    match = _TENSOR_NAME.fullmatch(name)
    if match is None:
        raise SteeringError(f"tensor {name!r}: names are {{resid_post|attn_head}}.{{layer}}.{{add|gain}}")
    site: Site = "resid_post" if match[1] == "resid_post" else "attn_head"
    layer, part = int(match[2]), match[3]
    shape = (model.hidden_size,) if site == "resid_post" else (model.num_heads, model.head_dim)
    if layer >= model.num_layers:
        raise SteeringError(f"tensor {name!r}: the header's model has layers 0 to {model.num_layers - 1}")
    if tuple(tensor.shape) != shape:
        raise SteeringError(f"tensor {name!r} has shape {list(tensor.shape)}, the header's model wants {list(shape)}")
    if not tensor.dtype.is_floating_point:
        raise SteeringError(f"tensor {name!r} has dtype {tensor.dtype}, wanted a floating-point one")
    if not math.isfinite(tensor.to(torch.float32).abs().sum().item()):
        raise SteeringError(f"tensor {name!r} holds numbers that are not finite, or too large for float32")
    return site, layer, "add" if part == "add" else "gain"


def _peak(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else float(tensor.abs().max())


def _said(model: ModelShape) -> str:
    return (
        f"{model.architecture} (hidden {model.hidden_size}, {model.num_layers} layers, "
        f"{model.num_heads} heads of {model.head_dim})"
    )
