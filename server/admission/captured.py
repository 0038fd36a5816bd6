"""What came of a request's captures: what the workers' ranks tell of a finished sequence, as tensors and as a file."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor

from whipstaff.server.admission.captures import AnyEntry, AttentionEntry, ProbeEntry, probes_among
from whipstaff.server.plan import AttendedAt, CapturedAt, PositionedPlan
from whipstaff.steering.conditions import Readings
from whipstaff.steering.shape import ModelShape, Site

Ints = NDArray[np.int64]
Told = Mapping[str, Sequence[Mapping[str, Any]]]  # what a rank says: see `worker.whipstaff_captures`


class NamedSequence(NamedTuple):
    """A finished sequence."""

    choice: int
    name: str  # as the engine calls it
    num_fed: int  # tokens that the model was given


def captured(choice: int, tensors: Mapping[str, Tensor] | None) -> dict[str, Any]:
    """What was read of one choice, as the receipt tells of it; see `tensors_of`."""
    if tensors is None:
        return {"choice": choice, "problem": "others needed the room before they could be told"}
    return {"choice": choice, "tensors": {name: list(tensor.shape) for name, tensor in tensors.items()}}


def in_base64(tensors: Mapping[str, Tensor]) -> str:
    """A safetensors file."""
    return base64.b64encode(save(dict(tensors), {"format": "pt"})).decode()


def tensors_of(
    sequence: NamedSequence,
    placed: PositionedPlan,
    entries: Sequence[AnyEntry],
    shape: ModelShape,
    ranks: Sequence[Told],
    columns: Sequence[Readings] = (),
) -> dict[str, Tensor] | None:
    """What was read of one choice: the positions that each entry read and, for each of its layers, (positions, width)
    of them, or (width,) of what they were reduced to; of a probe (positions,) or one number. None where others needed
    the room.

    Args:
        ranks: what each rank says.
        columns: what the sequence's conditions read.
    """
    if any(sequence.name not in told for told in ranks) or (probes_among(entries) and not columns):
        return None
    tensors: dict[str, Tensor] = {}
    rows, looked = rows_read(sequence, placed, ranks), attention_read(sequence, placed, ranks)
    for number, entry in enumerate(entries):
        if isinstance(entry, ProbeEntry):
            positions, values = _readings(columns[entry.column][: sequence.num_fed])
            tensors[f"{number}.positions"] = positions
            made = _reduced(values, entry.params.reduce).to(getattr(torch, entry.params.dtype))
            tensors[f"{number}.{entry.name}"] = made.contiguous()
            continue
        if isinstance(entry, AttentionEntry):
            for layer in entry.heads:
                read = next(looked)
                tensors[f"{number}.positions"] = torch.from_numpy(read.positions)
                made = _over_heads(read.rows, entry.params.reduce).to(getattr(torch, entry.params.dtype))
                tensors[f"{number}.attention.{layer}"] = made.contiguous()
            continue
        read = next(rows)
        tensors[f"{number}.positions"] = torch.from_numpy(read.positions)
        for layer, values in zip(entry.layers, read.rows, strict=True):
            made = _reduced(values.float(), entry.params.reduce).to(getattr(torch, entry.params.dtype))
            if entry.params.site == "attn_head":
                made = made.view(*made.shape[:-1], shape.num_heads, shape.head_dim)
            tensors[f"{number}.{entry.params.site}.{layer}"] = made.contiguous()
    return tensors


def _readings(column: Readings) -> tuple[Tensor, Tensor]:
    """(positions,) where something was read, and (positions,) float32 of it."""
    found = [(position, value) for position, value in enumerate(column) if value is not None]
    positions = torch.tensor([position for position, _ in found], dtype=torch.int64)
    return positions, torch.tensor([value for _, value in found], dtype=torch.float32)


class Rows(NamedTuple):
    """What was read by one capture."""

    positions: Ints
    rows: Tensor  # (points, positions, width) in the model's type


def rows_read(sequence: NamedSequence, placed: PositionedPlan, ranks: Sequence[Told]) -> Iterator[Rows]:
    """For each of a plan's captures; every rank tells of the sequence."""
    for number, at in enumerate(placed.captures):
        parts = [told[sequence.name][number] for told in ranks]
        rows, seen = _rows(parts, at.points[0].site), np.frombuffer(parts[0]["seen"], np.bool_)
        positions = _positions(at)[: len(seen)]
        chosen = np.flatnonzero(seen & (positions < sequence.num_fed))
        yield Rows(positions[chosen], rows[:, torch.from_numpy(chosen)])


def attention_read(sequence: NamedSequence, placed: PositionedPlan, ranks: Sequence[Told]) -> Iterator[Rows]:
    """For each layer that a plan tells of, with (positions, heads, tokens of the sequence) float32; heads are in the
    plan's order."""
    for number, at in enumerate(placed.attended, len(placed.captures)):
        parts = [told[sequence.name][number] for told in ranks]
        seen = np.frombuffer(parts[0]["seen"], np.bool_)
        rows = torch.cat([_tensor(part).view(len(seen), part["shape"][2] // at.size, at.size) for part in parts], 1)
        positions = _positions(at)[: len(seen)]
        chosen = np.flatnonzero(seen & (positions < sequence.num_fed))
        order = torch.tensor([sorted(at.heads).index(head) for head in at.heads])
        yield Rows(positions[chosen], rows[torch.from_numpy(chosen)][:, order, : sequence.num_fed])


def _over_heads(rows: Tensor, how: Literal["none", "mean", "max"]) -> Tensor:
    """(positions, heads, tokens), or (positions, tokens) of them."""
    if how == "none":
        return rows
    return rows.mean(1) if how == "mean" else rows.amax(1)


def _rows(parts: Sequence[Mapping[str, Any]], site: Site) -> Tensor:
    """(layers, positions, width) of all ranks; at attn_head each has its own heads, elsewhere all have all."""
    mine = parts if site == "attn_head" else parts[:1]
    return torch.cat([_tensor(part) for part in mine], -1)


def _tensor(part: Mapping[str, Any]) -> Tensor:
    data, dtype = bytearray(part["data"]), getattr(torch, part["dtype"])
    shape = part["shape"]
    return torch.frombuffer(data, dtype=dtype).view(shape) if data else torch.empty(shape, dtype=dtype)


def _positions(at: CapturedAt | AttendedAt) -> Ints:
    return np.concatenate([np.arange(0), *(np.arange(start, end) for start, end in at.intervals)])


def _reduced(values: Tensor, how: Literal["none", "mean", "last"]) -> Tensor:
    """(positions, width), or (width,) of them; NaN where there is no position."""
    if how == "none":
        return values
    if not len(values):
        return values.new_full(values.shape[1:], torch.nan)
    return values.mean(0) if how == "mean" else values[-1]
