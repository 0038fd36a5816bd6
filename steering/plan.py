"""A request's steering: from JSON to the rows of edits its tokens need.

The front end compiles a request's entries into a `SteeringPlan` without knowing the prompt; the plan travels with the
request as plain JSON, and the engine asks it for `segments` once the prompt length is known. An `EditSet` names the
edits active together at some position; equal rows share one program of the engine's tables, whoever asked for them.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, NamedTuple

from whipstaff.steering.conditions import Schedule
from whipstaff.steering.method import HookPoint
from whipstaff.steering.programs import OPEN, Gate
from whipstaff.steering.where import Interval, Where


class Edit(NamedTuple):
    """One vector with one setting of its method's parameters, on some layers (None: all of the vector's)."""

    digest: str
    setting: str  # the parameters as JSON, defaults filled in
    layers: tuple[int, ...] | None
    normalize: bool = False
    renorm: bool = False
    gate: Gate = OPEN
    num_lines: int = 0  # the most lines of one pool, and instructions at one hook point, that it takes
    num_instructions: int = 0


class ProbeRead(NamedTuple):
    """One probe to read; `condition_index` is the condition of the request that it decides."""

    digest: str
    layer: int
    condition_index: int
    is_latched: bool


class Stop(NamedTuple):
    """Where a generation ends: at the first of its tokens at which a condition holds."""

    condition_index: int  # which column of readings
    sign: int
    on: float  # it holds where the reading times `sign` is more

    def holds_at(self, readings: Sequence[float | None], position: int) -> bool:
        """Whether it holds at one of some positions; not where nothing was read."""
        reading = readings[position] if position < len(readings) else None
        return reading is not None and reading * self.sign > self.on


class ModuleEdit(NamedTuple):
    """An edit that is no program: of the expert router or of attention."""

    digest: str
    setting: str  # the method's parameters as JSON, defaults filled in


class StreamCopy(NamedTuple):
    """Keep the streams entering some blocks, as the row's edits have left them, beside the model; nothing changes.

    Layers count as in papers on early exit: 0 is what the embedding gives, l what leaves the l-th block.
    """

    layers: tuple[int, ...]


class Capture(NamedTuple):
    """Keep the activations at some hook points beside the model; nothing changes."""

    points: tuple[HookPoint, ...]
    is_edited: bool  # as the row's edits have left them, or else as they came

    @staticmethod
    def from_wire(points: Sequence[Sequence[Any]], is_edited: bool) -> "Capture":
        return Capture(tuple(HookPoint(site, layer) for site, layer in points), is_edited)


class Meter(NamedTuple):
    """Measure how long activations are, everywhere."""

    is_on: bool = True


class Insert(NamedTuple):
    """Learned rows in place of the placeholder tokens at [start, start + num): soft prompts and KV prefixes."""

    digest: str
    start: int  # in the prompt that the engine gets, placeholders included
    num: int


Item = Edit | ProbeRead | ModuleEdit | StreamCopy | Capture | Meter
EditSet = tuple[Item, ...]  # made in this order: probes before edits, and keeping last
_SMALL = 2  # lines and instructions of probes, keeps and meters, rounded up


class Segment(NamedTuple):
    """A stretch [start, end) of absolute positions and what its tokens get."""

    start: int
    end: int | None
    row: EditSet
    row_at_tokens: (
        EditSet  # instead, where the token is one of the plan's `token_ids`; the same object where it is equal
    )


@dataclass(frozen=True)
class PlannedEdit:
    edit: Edit
    where: Where


@dataclass(frozen=True)
class PlannedProbe:
    probe: ProbeRead
    where: Where


@dataclass(frozen=True)
class PlannedModuleEdit:
    edit: ModuleEdit
    where: Where


@dataclass(frozen=True)
class PlannedCapture:
    capture: Capture
    where: Where


class PlannedAttention(NamedTuple):
    """How much some heads of a layer look at what is before each token, for the client to be told."""

    layer: int
    heads: tuple[int, ...]  # in the client's order
    where: Where


@dataclass(frozen=True)
class SteeringPlan:
    """A request's edits, in the order given, and the conditions and schedules that their gates name by number."""

    edits: tuple[PlannedEdit, ...]
    probes: tuple[PlannedProbe, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    entropy_column: int = -1  # the condition that holds entropies; -1: nobody asks for them
    is_metered: bool = False  # the server's own calibration
    inserts: tuple[Insert, ...] = ()  # in order of their positions, apart from each other
    module_edits: tuple[PlannedModuleEdit, ...] = ()
    keeps: tuple[int, ...] = ()  # early layers whose streams are kept, everywhere; see `StreamCopy`
    captures: tuple[PlannedCapture, ...] = ()  # activations that the client is told
    stop: Stop | None = None
    told: tuple[int, ...] = ()  # conditions whose readings the client is told, as they come
    attention: tuple[PlannedAttention, ...] = ()  # what heads look at, which the client is told

    @property
    def num_columns(self) -> int:
        """How many of the engine's histories the request needs."""
        return max([self.entropy_column, *(planned.probe.condition_index for planned in self.probes)]) + 1

    @property
    def token_ids(self) -> frozenset[int]:
        """The tokens that some clause treats apart."""
        return frozenset().union(*(planned.where.token_ids for planned in self.edits))

    @property
    def counts_from_prompt_end(self) -> bool:
        """Whether what happens to a generated token depends on how many were generated, and not only on its row."""
        return bool(self.schedules) or self.entropy_column >= 0

    @property
    def forgets_cached_steps(self) -> bool:
        """Whether a condition at a prompt token depends on readings before it, which a cached prefix does not have."""
        return any(
            planned.edit.gate.on != planned.edit.gate.off and not planned.where.is_late for planned in self.edits
        )

    def told_intervals(self, prompt_len: int) -> Iterator[Interval]:
        """Positions whose readings the client is told."""
        for one in self.probes:
            if one.probe.condition_index in self.told:
                yield from one.where.intervals(prompt_len)

    def segments(self, prompt_len: int) -> list[Segment]:
        """Disjoint stretches of positions, in order, each with what is active on it."""
        spans = [
            (item, where.intervals(prompt_len), where.intervals_at_tokens(prompt_len)) for item, where in self._items()
        ]
        intervals = [interval for _, *both in spans for some in both for interval in some]
        cuts = sorted({start for start, _ in intervals} | {end for _, end in intervals if end is not None})
        active = [(item, _inside(cuts, chosen), _inside(cuts, at_tokens)) for item, chosen, at_tokens in spans]
        found: list[Segment] = []
        for index, (start, end) in enumerate(zip_longest(cuts, cuts[1:])):
            row = tuple(item for item, chosen, _ in active if chosen[index])
            at_tokens = tuple(item for item, _, chosen in active if chosen[index])
            if row or at_tokens:
                found.append(Segment(start, end, row, row if at_tokens == row else at_tokens))
        return found

    def _items(self) -> Iterator[tuple[Item, Where]]:
        yield from ((planned.probe, planned.where) for planned in self.probes)
        yield from ((planned.edit, planned.where) for planned in self.edits)
        yield from ((planned.edit, planned.where) for planned in self.module_edits)
        if self.keeps:
            yield StreamCopy(self.keeps), Where.of("all")
        yield from ((planned.capture, planned.where) for planned in self.captures)
        if self.is_metered:
            yield Meter(), Where.of("all")

    def to_wire(self) -> dict[str, Any]:
        return {
            "edits": [[*_flat(p.edit._replace(gate=OPEN)), _gate(p.edit.gate), _where(p.where)] for p in self.edits],
            "probes": [[*p.probe, _where(p.where)] for p in self.probes],
            "schedules": [schedule.model_dump(by_alias=True) for schedule in self.schedules],
            "entropy_column": self.entropy_column,
            "is_metered": self.is_metered,
            "inserts": [list(insert) for insert in self.inserts],
            "module_edits": [[*planned.edit, _where(planned.where)] for planned in self.module_edits],
            "keeps": list(self.keeps),
            "captures": [
                [[list(point) for point in p.capture.points], p.capture.is_edited, _where(p.where)]
                for p in self.captures
            ],
            "stop": None if self.stop is None else list(self.stop),
            "told": list(self.told),
            "attention": [[one.layer, list(one.heads), _where(one.where)] for one in self.attention],
        }

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> "SteeringPlan":
        return SteeringPlan(
            tuple(_edit_from_wire(*entry) for entry in wire["edits"]),
            tuple(PlannedProbe(ProbeRead(*entry[:-1]), Where.model_validate(entry[-1])) for entry in wire["probes"]),
            tuple(Schedule.model_validate(schedule) for schedule in wire["schedules"]),
            int(wire["entropy_column"]),
            bool(wire["is_metered"]),
            tuple(Insert(*insert) for insert in wire["inserts"]),
            tuple(_module_edit_from_wire(*entry) for entry in wire["module_edits"]),
            tuple(wire["keeps"]),
            tuple(
                PlannedCapture(Capture.from_wire(points, is_edited), Where.model_validate(where))
                for points, is_edited, where in wire["captures"]
            ),
            None if wire["stop"] is None else Stop(*wire["stop"]),
            tuple(wire["told"]),
            tuple(
                PlannedAttention(layer, tuple(heads), Where.model_validate(where))
                for layer, heads, where in wire["attention"]
            ),
        )


def _flat(edit: Edit) -> list[Any]:
    layers = None if edit.layers is None else list(edit.layers)
    return [edit.digest, edit.setting, layers, edit.normalize, edit.renorm, edit.num_lines, edit.num_instructions]


def _gate(gate: Gate) -> list[Any] | None:
    if gate.is_open:
        return None
    ramp = None if gate.ramp is None else list(gate.ramp)
    return [gate.schedule_index, gate.condition_index, gate.is_latched, gate.on, gate.off, gate.sign, ramp]


def _where(where: Where) -> dict[str, Any]:
    return where.model_dump(exclude_none=True)


def _edit_from_wire(
    digest: str,
    setting: str,
    layers: list[int] | None,
    normalize: bool,
    renorm: bool,
    num_lines: int,
    num_instructions: int,
    gate: list[Any] | None,
    where: dict[str, Any],
) -> PlannedEdit:
    opened = OPEN
    if gate is not None:
        schedule, condition, is_latched, on, off, sign, ramp = gate
        ramp = None if ramp is None else _ramp(*ramp)
        opened = Gate(schedule, condition, is_latched, float(on), float(off), sign, ramp)
    row_layers = None if layers is None else tuple(layers)
    edit = Edit(digest, setting, row_layers, normalize, renorm, opened, num_lines, num_instructions)
    return PlannedEdit(edit, Where.model_validate(where))


def _module_edit_from_wire(digest: str, setting: str, where: dict[str, Any]) -> PlannedModuleEdit:
    return PlannedModuleEdit(ModuleEdit(digest, setting), Where.model_validate(where))


def _ramp(condition_index: int, *numbers: float) -> tuple[int, float, float, float, float]:
    low, high, at_low, at_high = map(float, numbers)
    return condition_index, low, high, at_low, at_high


def num_slots(row: EditSet, num_layers: int) -> int:
    """How many slots of the engine's tables a row takes; a slot has two lines per layer in each pool and two frames."""
    lines, instructions = 0, 1
    for item in row:
        lines += item.num_lines if isinstance(item, Edit) else _SMALL
        instructions += item.num_instructions if isinstance(item, Edit) else _SMALL
    return max(-(-lines // (2 * num_layers)), -(-instructions // (2 * FRAME_ROOM)))


FRAME = 16  # instructions in one frame of the tables
FRAME_ROOM = FRAME - 1  # the last one leads to the next frame


def _inside(positions: Sequence[int], intervals: Sequence[Interval]) -> list[bool]:
    """Which of some positions, in order, lie inside."""
    inside = [False] * len(positions)
    for start, end in intervals:
        first, last = bisect_left(positions, start), len(positions) if end is None else bisect_left(positions, end)
        inside[first:last] = [True] * (last - first)
    return inside
