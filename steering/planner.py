"""The planner: a request's entries, checked and filled up with their files' and methods' defaults, become one plan."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from whipstaff.steering.conditions import MAX_CONDITIONS, MAX_SCHEDULES, Schedule, Threshold, When
from whipstaff.steering.edits import weigh
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.method import EditParams, HookPoint
from whipstaff.steering.overflow import Bound
from whipstaff.steering.plan import (
    Edit,
    ModuleEdit,
    PlannedEdit,
    PlannedModuleEdit,
    PlannedProbe,
    ProbeRead,
    SteeringPlan,
    Stop,
)
from whipstaff.steering.programs import Gate
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Clause, Region, Shorthand, Where

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


@dataclass
class Planner:
    """Compiles a request's entries, one after the other, into one plan."""

    edits: list[PlannedEdit] = field(default_factory=list)
    probes: list[PlannedProbe] = field(default_factory=list)
    schedules: list[Schedule] = field(default_factory=list)
    columns: list[object] = field(default_factory=list)  # what each condition of the request reads
    bounds: list[tuple[HookPoint, Bound]] = field(default_factory=list)
    module_edits: list[PlannedModuleEdit] = field(default_factory=list)
    stop: Stop | None = None

    @property
    def plan(self) -> SteeringPlan:
        """What was added so far."""
        condition_index = self.columns.index("entropy") if "entropy" in self.columns else -1
        return SteeringPlan(
            tuple(self.edits),
            tuple(self.probes),
            tuple(self.schedules),
            condition_index,
            module_edits=tuple(self.module_edits),
            stop=self.stop,
        )

    def add(self, params: SteeringParams, own: Mapping[str, Any], vector: Vector, probe: Vector | None) -> range:
        """Add one entry; the numbers of the planned edits that it became, with `own` as its method's parameters.

        Raises: SteeringError naming the field.
        """
        settings = self.checked(vector, own)
        layers = _layers(params.layers, vector)
        where = Where.of(params.where or vector.header.where or vector.method.where)
        first = len(self.edits)
        gate = self._gate(params, vector, layers, probe, where)
        for each, its_where in vector.method.spread(settings, vector.tensors, where):
            its_where = _since_decision(its_where) if gate.is_latched else its_where
            edit = Edit(vector.digest, each.model_dump_json(), layers, params.normalize, params.renorm, gate)
            weight = weigh(vector, edit)
            edit = edit._replace(num_lines=weight.num_lines, num_instructions=weight.num_instructions)
            self.edits.append(PlannedEdit(edit, its_where))
            most = max(1.0, params.schedule.largest if params.schedule else 1.0)
            self.bounds += [(point, _scaled(limits, most)) for point, limits in weight.bounds]
        return range(first, len(self.edits))

    def add_module_edit(self, params: SteeringParams, own: Mapping[str, Any], vector: Vector) -> PlannedModuleEdit:
        """Add one entry whose method is served by the router or by attention.

        Raises: SteeringError naming the field, pydantic.ValidationError.
        """
        settings = self.checked(vector, own)
        for name in vector.method.kind.meaningless:
            if getattr(params, name):
                raise SteeringError(f"{vector.method.name} is not an edit of activations and takes no {name}", name)
        chosen = Where.of(params.where or vector.header.where or vector.method.where)
        where = vector.method.own_where(vector.tensors) or chosen
        if where.tokens or (where.exclude and where.exclude.tokens):
            raise SteeringError(f"{vector.method.name} cannot tell single tokens apart", "where")
        self.module_edits.append(PlannedModuleEdit(ModuleEdit(vector.digest, settings.model_dump_json()), where))
        return self.module_edits[-1]

    def end_at(self, threshold: Threshold, probe: Vector) -> None:
        """Let the generation end at its first token where the probe reads that. Raises: SteeringError."""
        layer = _probe_layer(threshold.layer, probe)
        condition_index = self._condition_index((probe.digest, layer, "each_last"), "probe")
        self._read(PlannedProbe(ProbeRead(probe.digest, layer, condition_index, False), Where.of("each_last")))
        self.stop = Stop(condition_index, threshold.sign, threshold.on)

    @staticmethod
    def checked(vector: Vector, own: Mapping[str, Any]) -> EditParams:
        """A method's parameters. Raises: SteeringError naming the field, pydantic.ValidationError."""
        settings = _settings(vector, own)
        vector.method.check_params(settings, vector.tensors)
        vector.method.check_file(settings, vector.header.known_defaults)
        vector.method.check_model(settings, vector.header.model)
        return settings

    def _gate(
        self, params: SteeringParams, vector: Vector, layers: tuple[int, ...] | None, probe: Vector | None, where: Where
    ) -> Gate:
        schedule_index, ramp = -1, None
        schedule, when = params.schedule, params.when
        if schedule is not None and schedule.shape == "entropy":
            assert schedule.low is not None and schedule.high is not None
            condition_index = self._condition_index("entropy", "schedule")
            ramp = (condition_index, schedule.low, schedule.high, schedule.start, schedule.to)
        elif schedule is not None:
            schedule_index = self._schedule_index(schedule)
        if when is None:
            return Gate(schedule_index=schedule_index, ramp=ramp)
        assert probe is not None
        layer = _probe_layer(when.layer, probe, "when.")
        chosen = [point.canonical.layer for point in vector.tensors if layers is None or point.layer in layers]
        if (early := min(chosen, default=layer + 1)) <= layer:
            raise SteeringError(
                f"the probe is read after layer {layer}, and this edit begins in layer {early}: an edit can only "
                "depend on what the model has computed before it; restrict `layers`",
                "when.probe",
            )
        is_latched = when.decide == "prompt"
        positions: Shorthand = "last_prompt" if is_latched else "each_last" if where.is_late else "all"
        condition_index = self._condition_index((probe.digest, layer, positions), "when")
        self._read(PlannedProbe(ProbeRead(probe.digest, layer, condition_index, is_latched), Where.of(positions)))
        return Gate(schedule_index, condition_index, is_latched, when.on, when.off, when.sign, ramp)

    def _read(self, probe: PlannedProbe) -> None:
        if probe not in self.probes:
            self.probes.append(probe)

    def _condition_index(self, reads: object, param: str) -> int:
        if reads not in self.columns:
            if len(self.columns) == MAX_CONDITIONS:
                raise SteeringError(f"a request may depend on {MAX_CONDITIONS} different readings", param)
            self.columns.append(reads)
        return self.columns.index(reads)

    def _schedule_index(self, schedule: Schedule) -> int:
        if schedule not in self.schedules:
            if len(self.schedules) == MAX_SCHEDULES:
                raise SteeringError(f"a request may have {MAX_SCHEDULES} different schedules", "schedule")
            self.schedules.append(schedule)
        return self.schedules.index(schedule)


def reading_along(plan: SteeringPlan, probe: Vector, layer: int | None, where: Where) -> tuple[SteeringPlan, int]:
    """A plan that reads one probe more, for the client to be told; and the number of the condition that it is.

    Args:
        layer: which of the probe's layers; None: it has one.

    Raises: SteeringError naming the field.
    """
    layer = _probe_layer(layer, probe)
    for one in plan.probes:
        if (one.probe.digest, one.probe.layer, one.where) == (probe.digest, layer, where) and not one.probe.is_latched:
            number = one.probe.condition_index
            return replace(plan, told=tuple(dict.fromkeys((*plan.told, number)))), number
    if (number := plan.num_columns) == MAX_CONDITIONS:
        raise SteeringError(f"a request may depend on {MAX_CONDITIONS} different readings", "probe")
    read = PlannedProbe(ProbeRead(probe.digest, layer, number, False), where)
    return replace(plan, probes=(*plan.probes, read), told=(*plan.told, number)), number


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


def _probe_layer(layer: int | None, probe: Vector, path: str = "") -> int:
    if probe.method.kind.named_in != "when":
        raise SteeringError(
            f"its method is {probe.method.name}; a condition needs a vector that is a probe", f"{path}probe"
        )
    layers = probe.layers
    if layer is not None and layer not in layers:
        raise SteeringError(f"the probe has no direction at layer {layer}; it has {layers}", f"{path}layer")
    if layer is None and len(layers) != 1:
        raise SteeringError(f"the probe has directions at layers {layers}; name one", f"{path}layer")
    return layers[0] if layer is None else layer


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
