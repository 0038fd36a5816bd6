"""A request's steering: from JSON to the rows of edits its tokens need.

The front end compiles a request's entries into a `SteeringPlan` without knowing the prompt; the plan travels with the
request as plain JSON, and the engine asks it for `segments` once the prompt length is known. A `Row` names the edits
active together at some position; equal rows share one slot of the engine's tables, whoever asked for them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from whipstaff.steering.artifacts import Vector
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.where import Clause, Interval, Where

MAX_SCALE = 1e4
MAX_EDITS = 32


class SteeringParams(BaseModel):
    """One entry of a request's `steering`: add a vector to what the model thinks."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vector: str = Field(min_length=1, max_length=256, description="name of a loaded vector")
    scale: float | None = Field(
        None,
        ge=-MAX_SCALE,
        le=MAX_SCALE,
        allow_inf_nan=False,
        validation_alias=AliasChoices("scale", "strength", "coefficient"),
        description="strength; 0 is exactly off; the vector's own default when absent",
    )
    layers: list[int] | None = Field(
        None, min_length=1, max_length=1024, description="0-based block indices, a subset of the vector's own"
    )
    where: Clause | None = Field(None, description="which tokens; the vector's own default when absent")


class RowEdit(NamedTuple):
    """One vector at one strength on some layers (None: all of the vector's)."""

    digest: str
    scale: float
    layers: tuple[int, ...] | None


Row = tuple[RowEdit, ...]  # applied in this order
Segment = tuple[int, int | None, Row]  # absolute [start, end) and the row its tokens get


@dataclass(frozen=True)
class PlannedEdit:
    edit: RowEdit
    where: Where


@dataclass(frozen=True)
class SteeringPlan:
    """A request's edits, in the order given."""

    edits: tuple[PlannedEdit, ...]

    def segments(self, prompt_len: int) -> list[Segment]:
        """Disjoint stretches of positions, in order, each with the edits active on it."""
        spans = [(planned.edit, planned.where.intervals(prompt_len)) for planned in self.edits]
        starts = {start for _, intervals in spans for start, _ in intervals}
        ends = {end for _, intervals in spans for _, end in intervals if end is not None}
        cuts: list[int] = sorted(starts | ends)
        found: list[Segment] = []
        for start, end in zip_longest(cuts, cuts[1:]):
            row = tuple(edit for edit, intervals in spans if _inside(start, intervals))
            if row:
                found.append((start, end, row))
        return found

    def to_wire(self) -> list[dict[str, Any]]:
        return [
            {
                "digest": planned.edit.digest,
                "scale": planned.edit.scale,
                "layers": None if planned.edit.layers is None else list(planned.edit.layers),
                "where": planned.where.model_dump(),
            }
            for planned in self.edits
        ]

    @staticmethod
    def from_wire(entries: Sequence[dict[str, Any]]) -> "SteeringPlan":
        return SteeringPlan(
            tuple(
                PlannedEdit(
                    RowEdit(
                        entry["digest"],
                        float(entry["scale"]),
                        None if entry["layers"] is None else tuple(entry["layers"]),
                    ),
                    Where.model_validate(entry["where"]),
                )
                for entry in entries
            )
        )


def plan_edit(params: SteeringParams, vector: Vector) -> PlannedEdit:
    """One entry with the vector's defaults filled in. Raises: SteeringError naming the field."""
    layers = None
    if params.layers is not None:
        layers = tuple(sorted(set(params.layers)))
        if missing := [layer for layer in layers if layer not in vector.layers]:
            raise SteeringError(
                f"the vector has no edit at layer {missing[0]}; it has {json.dumps(vector.layers)}", "layers"
            )
        if layers == tuple(vector.layers):
            layers = None
    scale = vector.header.scale if params.scale is None else params.scale
    where = vector.header.where if params.where is None else params.where
    return PlannedEdit(RowEdit(vector.digest, scale, layers), Where.of(where))


def _inside(position: int, intervals: list[Interval]) -> bool:
    return any(start <= position and (end is None or position < end) for start, end in intervals)
