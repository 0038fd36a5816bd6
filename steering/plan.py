"""A request's steering: from JSON to the rows of edits its tokens need.

The front end compiles a request's entries into a `SteeringPlan` without knowing the prompt; the plan travels with the
request as plain JSON, and the engine asks it for `segments` once the prompt length is known. A `Row` names the edits
active together at some position; equal rows share one program of the engine's tables, whoever asked for them.
"""

import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import zip_longest
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from whipstaff.steering.artifacts import Vector
from whipstaff.steering.conditions import MAX_CONDITIONS, MAX_SCHEDULES, Schedule, When
from whipstaff.steering.dose import Dose, dose, largest
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.growth import Bound, bound
from whipstaff.steering.method import EditParams, Place, Scaled
from whipstaff.steering.methods.virtual_tokens import PrefixKV
from whipstaff.steering.ops import Diagonal, Op
from whipstaff.steering.programs import OPEN, Gate, Program, Step, assemble
from whipstaff.steering.sites import canonical, pool_of
from whipstaff.steering.where import Clause, Interval, Region, Shorthand, Where

MAX_EDITS = 32


class SteeringParams(BaseModel):
    """What every entry of a request's `steering` may say; its other fields are its vector's method's parameters."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    vector: str | None = Field(None, min_length=1, max_length=256, description="name of a loaded vector")
    method: str | None = Field(None, min_length=1, max_length=64, description="a method that needs no file, instead")
    layers: list[int] | None = Field(
        None, min_length=1, max_length=1024, description="0-based block indices, a subset of the vector's own"
    )
    where: Clause | None = Field(None, description="which tokens; the vector's own default when absent")
    when: When | None = Field(None, description="steer only where a probe says so")
    schedule: Schedule | None = Field(None, description="how the edit's gain changes as tokens are generated")
    normalize: bool = Field(False, description="bring added vectors to length 1 first, so that scale is a length")
    renorm: bool = Field(False, description="rescale every edited row to the length it had before this edit")

    @model_validator(mode="after")
    def _names_one(self) -> "SteeringParams":
        if (self.vector is None) == (self.method is None):
            raise ValueError("name a vector, or a method that needs none")
        return self


OWN_FIELDS = frozenset(SteeringParams.model_fields)


class RowEdit(NamedTuple):
    """One vector with one setting of its method's parameters, on some layers (None: all of the vector's)."""

    digest: str
    setting: str  # the parameters as JSON, defaults filled in
    layers: tuple[int, ...] | None
    normalize: bool = False
    renorm: bool = False
    gate: Gate = OPEN
    num_lines: int = 0  # the most lines of one pool, and instructions at one place, that it takes
    num_instructions: int = 0


class RowProbe(NamedTuple):
    """One probe to read; `column` is the condition of the request that it decides."""

    digest: str
    layer: int
    column: int
    is_latched: bool


class RowSpecial(NamedTuple):
    """An edit that is no program: of the expert router or of attention."""

    digest: str
    setting: str  # the method's parameters as JSON, defaults filled in


class RowMeter(NamedTuple):
    """Measure how long activations are, everywhere."""

    is_on: bool = True


class Insert(NamedTuple):
    """Learned rows in place of the placeholder tokens at [start, start + num): soft prompts and KV prefixes."""

    digest: str
    start: int  # in the prompt that the engine gets, placeholders included
    num: int


Row = tuple[RowEdit | RowProbe | RowSpecial | RowMeter, ...]  # made in this order, probes before edits
_SMALL = 2  # lines and instructions of probes and meters, rounded up


class Segment(NamedTuple):
    """A stretch [start, end) of absolute positions and what its tokens get."""

    start: int
    end: int | None
    row: Row
    row_at_tokens: Row  # instead, where the token is one of the plan's `token_ids`; the same object where it is equal


@dataclass(frozen=True)
class PlannedEdit:
    edit: RowEdit
    where: Where


@dataclass(frozen=True)
class PlannedProbe:
    probe: RowProbe
    where: Where


@dataclass(frozen=True)
class PlannedSpecial:
    special: RowSpecial
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
    specials: tuple[PlannedSpecial, ...] = ()

    @property
    def num_columns(self) -> int:
        """How many of the engine's histories the request needs."""
        return max([self.entropy_column, *(planned.probe.column for planned in self.probes)]) + 1

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

    def _items(self) -> Iterator[tuple[RowEdit | RowProbe | RowSpecial | RowMeter, Where]]:
        yield from ((planned.probe, planned.where) for planned in self.probes)
        yield from ((planned.edit, planned.where) for planned in self.edits)
        yield from ((planned.special, planned.where) for planned in self.specials)
        if self.is_metered:
            yield RowMeter(), Where.of("all")

    def to_wire(self) -> dict[str, Any]:
        return {
            "edits": [[*_flat(p.edit._replace(gate=OPEN)), _gate(p.edit.gate), _where(p.where)] for p in self.edits],
            "probes": [[*p.probe, _where(p.where)] for p in self.probes],
            "schedules": [schedule.model_dump(by_alias=True) for schedule in self.schedules],
            "entropy_column": self.entropy_column,
            "is_metered": self.is_metered,
            "inserts": [list(insert) for insert in self.inserts],
            "specials": [[*planned.special, _where(planned.where)] for planned in self.specials],
        }

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> "SteeringPlan":
        return SteeringPlan(
            tuple(_edit_from_wire(*entry) for entry in wire["edits"]),
            tuple(PlannedProbe(RowProbe(*entry[:-1]), Where.model_validate(entry[-1])) for entry in wire["probes"]),
            tuple(Schedule.model_validate(schedule) for schedule in wire["schedules"]),
            int(wire["entropy_column"]),
            bool(wire["is_metered"]),
            tuple(Insert(*insert) for insert in wire["inserts"]),
            tuple(
                PlannedSpecial(RowSpecial(*entry[:-1]), Where.model_validate(entry[-1])) for entry in wire["specials"]
            ),
        )


def _flat(edit: RowEdit) -> list[Any]:
    layers = None if edit.layers is None else list(edit.layers)
    return [edit.digest, edit.setting, layers, edit.normalize, edit.renorm, edit.num_lines, edit.num_instructions]


def _gate(gate: Gate) -> list[Any] | None:
    if gate.is_open:
        return None
    ramp = None if gate.ramp is None else list(gate.ramp)
    return [gate.lane, gate.column, gate.is_latched, gate.on, gate.off, gate.sign, ramp]


def _where(where: Where) -> dict[str, Any]:
    return where.model_dump(exclude_none=True)


def _special_from_wire(digest: str, setting: str, where: dict[str, Any]) -> PlannedSpecial:
    return PlannedSpecial(RowSpecial(digest, setting), Where.model_validate(where))


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
        lane, column, is_latched, on, off, sign, ramp = gate
        opened = Gate(lane, column, is_latched, float(on), float(off), sign, None if ramp is None else _ramp(*ramp))
    row_layers = None if layers is None else tuple(layers)
    edit = RowEdit(digest, setting, row_layers, normalize, renorm, opened, num_lines, num_instructions)
    return PlannedEdit(edit, Where.model_validate(where))


def _ramp(column: int, *numbers: float) -> tuple[int, float, float, float, float]:
    low, high, at_low, at_high = map(float, numbers)
    return column, low, high, at_low, at_high


def num_slots(row: Row, num_layers: int) -> int:
    """How many slots of the engine's tables a row takes; a slot has two lines per layer in each pool and two frames."""
    lines, instructions = 0, 1
    for item in row:
        lines += item.num_lines if isinstance(item, RowEdit) else _SMALL
        instructions += item.num_instructions if isinstance(item, RowEdit) else _SMALL
    return max(-(-lines // (2 * num_layers)), -(-instructions // (2 * FRAME_ROOM)))


FRAME = 16  # instructions in one frame of the tables
FRAME_ROOM = FRAME - 1  # the last one leads to the next frame


@dataclass
class Planner:
    """Compiles a request's entries, one after the other, into one plan."""

    edits: list[PlannedEdit] = field(default_factory=list)
    probes: list[PlannedProbe] = field(default_factory=list)
    schedules: list[Schedule] = field(default_factory=list)
    columns: list[object] = field(default_factory=list)  # what each condition of the request reads
    bounds: list[tuple[Place, Bound]] = field(default_factory=list)
    specials: list[PlannedSpecial] = field(default_factory=list)

    @property
    def plan(self) -> SteeringPlan:
        """What was added so far."""
        column = self.columns.index("entropy") if "entropy" in self.columns else -1
        return SteeringPlan(
            tuple(self.edits), tuple(self.probes), tuple(self.schedules), column, specials=tuple(self.specials)
        )

    def add(self, params: SteeringParams, own: Mapping[str, Any], vector: Vector, probe: Vector | None) -> range:
        """Add one entry; the numbers of the planned edits that it became, with `own` as its method's parameters.

        Raises: SteeringError naming the field.
        """
        settings = self._checked(vector, own)
        layers = _layers(params.layers, vector)
        where = Where.of(params.where or vector.header.where or vector.method.where)
        first = len(self.edits)
        gate = self._gate(params, vector, layers, probe, where)
        for each, its_where in vector.method.spread(settings, vector.tensors, where):
            its_where = _since_decision(its_where) if gate.is_latched else its_where
            edit = RowEdit(vector.digest, each.model_dump_json(), layers, params.normalize, params.renorm, gate)
            weight = weigh(vector, edit)
            edit = edit._replace(num_lines=weight.num_lines, num_instructions=weight.num_instructions)
            self.edits.append(PlannedEdit(edit, its_where))
            most = max(1.0, params.schedule.largest if params.schedule else 1.0)
            self.bounds += [(place, _scaled(limits, most)) for place, limits in weight.bounds]
        return range(first, len(self.edits))

    def add_special(self, params: SteeringParams, own: Mapping[str, Any], vector: Vector) -> PlannedSpecial:
        """Add one entry whose method is served by the router or by attention.

        Raises: SteeringError naming the field, pydantic.ValidationError.
        """
        settings = self._checked(vector, own)
        for name in ("layers", "when", "schedule", "normalize", "renorm"):
            if getattr(params, name):
                raise SteeringError(f"{vector.method.name} is not an edit of activations and takes no {name}", name)
        where = Where.of(params.where or vector.header.where or vector.method.where)
        if isinstance(vector.method, PrefixKV):
            where = Where(prompt=[(0, len(next(iter(vector.tensors.values()))["key"]))])
        if where.tokens or (where.exclude and where.exclude.tokens):
            raise SteeringError(f"{vector.method.name} cannot tell single tokens apart", "where")
        self.specials.append(PlannedSpecial(RowSpecial(vector.digest, settings.model_dump_json()), where))
        return self.specials[-1]

    @staticmethod
    def _checked(vector: Vector, own: Mapping[str, Any]) -> EditParams:
        settings = _settings(vector, own)
        vector.method.check_params(settings, vector.tensors)
        vector.method.check_file(settings, vector.header.known_defaults)
        vector.method.check_model(settings, vector.header.model)
        return settings

    def _gate(
        self, params: SteeringParams, vector: Vector, layers: tuple[int, ...] | None, probe: Vector | None, where: Where
    ) -> Gate:
        lane, ramp = -1, None
        schedule, when = params.schedule, params.when
        if schedule is not None and schedule.shape == "entropy":
            assert schedule.low is not None and schedule.high is not None
            column = self._column("entropy", "schedule")
            ramp = (column, schedule.low, schedule.high, schedule.start, schedule.to)
        elif schedule is not None:
            lane = self._lane(schedule)
        if when is None:
            return Gate(lane=lane, ramp=ramp)
        assert probe is not None
        layer = _probe_layer(when, probe)
        chosen = [canonical(place).layer for place in vector.tensors if layers is None or place.layer in layers]
        if (early := min(chosen, default=layer + 1)) <= layer:
            raise SteeringError(
                f"the probe is read after layer {layer}, and this edit begins in layer {early}: an edit can only "
                "depend on what the model has computed before it; restrict `layers`",
                "when.probe",
            )
        is_latched = when.decide == "prompt"
        positions: Shorthand = "last_prompt" if is_latched else "each_last" if where.is_late else "all"
        column = self._column((probe.digest, layer, positions), "when")
        read = PlannedProbe(RowProbe(probe.digest, layer, column, is_latched), Where.of(positions))
        if read not in self.probes:
            self.probes.append(read)
        return Gate(lane, column, is_latched, when.on, when.off, when.sign, ramp)

    def _column(self, reads: object, param: str) -> int:
        if reads not in self.columns:
            if len(self.columns) == MAX_CONDITIONS:
                raise SteeringError(f"a request may depend on {MAX_CONDITIONS} different readings", param)
            self.columns.append(reads)
        return self.columns.index(reads)

    def _lane(self, schedule: Schedule) -> int:
        if schedule not in self.schedules:
            if len(self.schedules) == MAX_SCHEDULES:
                raise SteeringError(f"a request may have {MAX_SCHEDULES} different schedules", "schedule")
            self.schedules.append(schedule)
        return self.schedules.index(schedule)


def edits_of(vector: Vector, edit: RowEdit) -> dict[Place, tuple[Op, ...]]:
    """What an edit does at each place, by the place's canonical name."""
    params = vector.method.params.model_validate_json(edit.setting)
    found: dict[Place, tuple[Op, ...]] = {}
    for place, tensors in vector.tensors.items():
        if edit.layers is None or place.layer in edit.layers:
            ops = tuple(_made(vector, edit, params, place, tensors))
            if ops:
                found[canonical(place)] = (*found.get(canonical(place), ()), *ops)
    return found


def _made(vector: Vector, edit: RowEdit, params: EditParams, place: Place, tensors: Any) -> Sequence[Op]:
    method, model = vector.method, vector.header.model
    if not edit.normalize:
        return method.ops(tensors, params, place, model)
    assert isinstance(params, Scaled)
    ops = method.ops(tensors, params.model_copy(update={"scale": 1.0}), place, model)
    adds = [op.add for op in ops if isinstance(op, Diagonal) and op.add is not None and op.add.any()]
    return [Diagonal(None, params.scale * add / add.norm()) for add in adds]


def _only_adds(op: Op) -> bool:
    return isinstance(op, Diagonal) and op.mul is None


class Weight(NamedTuple):
    """What an edit takes of the engine's tables, and how far it reaches."""

    num_lines: int
    num_instructions: int
    bounds: tuple[tuple[Place, Bound], ...]
    only_adds: bool  # and so commutes with others that do


def weigh(vector: Vector, edit: RowEdit) -> Weight:
    """Raises: SteeringError when the edit cannot be made so."""
    return _weigh(vector, edit._replace(gate=OPEN))


@lru_cache(maxsize=1024)
def _weigh(vector: Vector, edit: RowEdit) -> Weight:
    if edit.normalize and not _can_normalize(vector, edit):
        raise SteeringError("normalize is for vectors that are added; this one does something else", "normalize")
    made = edits_of(vector, edit)
    lines: dict[str, set[int]] = {}
    longest = 0
    for place, ops in made.items():
        program: Program = assemble([], [Step(ops, renorm=edit.renorm)])
        lines.setdefault(pool_of(place.site), set()).update(line.data_ptr() for line in program.lines)
        longest = max(longest, len(program.codes))
    bounds = tuple((place, bound(ops)) for place, ops in sorted(made.items(), key=lambda item: item[0].layer))
    only_adds = not edit.renorm and all(_only_adds(op) for ops in made.values() for op in ops)
    return Weight(max(map(len, lines.values()), default=0), longest + _GATE_SIZE, bounds, only_adds)


@dataclass(frozen=True, eq=False)
class Lengths:
    """The usual length of activations at every place of the served model."""

    by_place: Mapping[Place, float]


@lru_cache(maxsize=1024)
def strongest(vector: Vector, edit: RowEdit, lengths: Lengths) -> Dose | None:
    """The largest relative dose of an edit, over the places whose lengths are known."""
    known = lengths.by_place
    return largest({place: dose(ops, known[place]) for place, ops in edits_of(vector, edit).items() if place in known})


_GATE_SIZE = 5  # instructions of a gate and of its end


def _can_normalize(vector: Vector, edit: RowEdit) -> bool:
    params = vector.method.params.model_validate_json(edit.setting)
    if not isinstance(params, Scaled):
        return False
    one, model = params.model_copy(update={"scale": 1.0}), vector.header.model
    return all(
        _only_adds(op)
        for place, tensors in vector.tensors.items()
        for op in vector.method.ops(tensors, one, place, model)
    )


def _settings(vector: Vector, own: Mapping[str, Any]) -> EditParams:
    """A method's parameters: the request's, else the file's, else the method's. Raises: pydantic.ValidationError."""
    defaults = vector.header.known_defaults
    if own.keys() & {"strength", "coefficient"}:
        defaults = {name: value for name, value in defaults.items() if name != "scale"}
    return vector.method.params.model_validate({**defaults, **own})


def _layers(chosen: list[int] | None, vector: Vector) -> tuple[int, ...] | None:
    if chosen is None:
        return None
    layers = tuple(sorted(set(chosen)))
    if missing := [layer for layer in layers if layer not in vector.layers]:
        raise SteeringError(
            f"the vector has no edit at layer {missing[0]}; it has {json.dumps(vector.layers)}", "layers"
        )
    return None if layers == tuple(vector.layers) else layers


def _probe_layer(when: When, probe: Vector) -> int:
    if probe.method.name != "probe":
        raise SteeringError(
            f"its method is {probe.method.name}; a condition needs a vector that is a probe", "when.probe"
        )
    layers = probe.layers
    if when.layer is not None and when.layer not in layers:
        raise SteeringError(f"the probe has no direction at layer {when.layer}; it has {layers}", "when.layer")
    if when.layer is None and len(layers) != 1:
        raise SteeringError(f"the probe has directions at layers {layers}; name one", "when.layer")
    return layers[0] if when.layer is None else when.layer


def _since_decision(where: Where) -> Where:
    """The clause less the prompt before its last token: a decision made there is for what follows."""
    hole = where.exclude or Region()
    if hole.prompt == "all":
        return where
    windows = [*(() if hole.prompt == "none" else hole.prompt), (0, -1)]
    if len(windows) > 64:
        raise SteeringError("too many excluded windows for an edit that is decided on the prompt", "where.exclude")
    return where.model_copy(update={"exclude": hole.model_copy(update={"prompt": windows})})


def _scaled(limits: Bound, gain: float) -> Bound:
    factor, constant = limits
    return (factor, constant) if gain == 1 else (1 + gain * (1 + factor), gain * constant)


def _inside(positions: Sequence[int], intervals: Sequence[Interval]) -> list[bool]:
    """Which of some positions, in order, lie inside."""
    inside = [False] * len(positions)
    for start, end in intervals:
        first, last = bisect_left(positions, start), len(positions) if end is None else bisect_left(positions, end)
        inside[first:last] = [True] * (last - first)
    return inside
