"""Edits of activations: methods that compile to programs, which the model's sites run on chosen tokens."""

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from pydantic import ValidationError

from whipstaff.steering.dose import Dose
from whipstaff.steering.edits import Lengths, edits_of, settings_of, strongest
from whipstaff.steering.errors import NotServed, SteeringError
from whipstaff.steering.fed import Fed, fired_tokens, num_edited
from whipstaff.steering.kinds.kind import Entry, EntryKind, UncheckedEntry, unhooked
from whipstaff.steering.method import HookPoint, Method, P, S, Scaled, Tensors
from whipstaff.steering.ops import Directions, EditOp
from whipstaff.steering.overflow import MAX_AMPLIFICATION, max_amplification
from whipstaff.steering.plan import PlannedEdit, SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.programs import OPEN
from whipstaff.steering.served import Limit, Served
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Vector

_MAX_TRIALS = 32  # of scales, until an edit keeps to the operator's limit


class EditsKind(EntryKind):
    name = "edits"

    def lacking(self, vector: Vector, layers: Sequence[int] | None, served: Served) -> str | None:
        return unhooked(vector, layers, served)

    def admit(self, unchecked: UncheckedEntry, planner: Planner, others: Sequence[Entry], served: Served) -> Entry:
        if served.tensor_parallel > 1 and "attn_head" in unchecked.vector.sites:
            _check_slices(unchecked, served.tensor_parallel)
        kept = unchecked if served.limit is None else _kept_to(served.limit, unchecked, served.lengths)
        edits = planner.add(unchecked.params, kept.own, unchecked.vector, unchecked.probe)
        _check_overflow(planner, served.dtype, "scale" if "scale" in unchecked.vector.method.off else "")
        entry = Entry(unchecked.params, unchecked.vector, unchecked.probe, edits)
        if kept is unchecked:
            return entry
        said = f"weakened to scale {kept.own['scale']:.4g}, the most this server allows"
        return replace(entry, warnings=(said,))

    def describe(self, entry: Entry, plan: SteeringPlan, fed: Sequence[Fed], served: Served) -> dict[str, Any]:
        planned, params = [plan.edits[index] for index in entry.edits], entry.params
        largest = _largest_dose(entry.vector, planned, served.lengths, _gain(params))
        return {
            **(json.loads(planned[0].edit.setting) if planned else {}),
            "layers": sorted(set(params.layers or entry.vector.layers)),
            "sites": entry.vector.sites,
            "where": [one.where.model_dump(exclude_none=True) for one in planned],
            **params.model_dump(
                by_alias=True, exclude_defaults=True, include={"when", "schedule", "normalize", "renorm"}
            ),
            "dose": None if largest is None else _describe(largest),
            "edited_tokens": num_edited(planned, fed),
            **fired_tokens(planned, fed),
        }

    def doses(self, vector: Vector, served: Served) -> list[dict[str, Any]]:
        found: dict[str, dict[str, Any]] = {}
        for own in ({}, {"scale": 1.0}):
            try:
                planned = _tried(UncheckedEntry(SteeringParams(vector="it"), own, vector, None))
            except (SteeringError, ValidationError):  # its parameters cannot be guessed, or it has no scale
                continue
            setting = planned[0].edit.setting
            if dose := _largest_dose(vector, planned, served.lengths):
                found[setting] = {"scale": json.loads(setting).get("scale"), **_describe(dose)}
        return list(found.values())


EDITS = EditsKind()


class EditMethod(Method[P]):
    """A method that edits activations."""

    kind = EDITS

    @abstractmethod
    def ops(self, tensors: Tensors, params: P, point: HookPoint, model: ModelShape) -> Sequence[EditOp]: ...


class ScaledMethod(EditMethod[S]):
    """A method with a strength: at 0 it makes no edit at all."""

    off: ClassVar[Mapping[str, Any]] = {"scale": 0.0}

    def is_off(self, params: S) -> bool:
        return params.scale == 0

    def ops(self, tensors: Tensors, params: S, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return self.edits(tensors, params, point, model) if params.scale else ()

    @abstractmethod
    def edits(self, tensors: Tensors, params: S, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        """The edits at one hook point at a strength that is not 0."""


def _tried(unchecked: UncheckedEntry) -> list[PlannedEdit]:
    """What an entry would become, in no plan yet."""
    planner = Planner()
    planner.add(unchecked.params, unchecked.own, unchecked.vector, unchecked.probe)
    return planner.edits


def _check_slices(unchecked: UncheckedEntry, num_ranks: int) -> None:
    """Heads are shared out over ranks: what reads all of them at once cannot be served so. Raises: NotServed."""
    for one in _tried(unchecked):
        for point, ops in edits_of(unchecked.vector, one.edit).items():
            reads_all = unchecked.params.renorm or any(isinstance(op, Directions) for op in ops)
            if point.site == "attn_head" and reads_all:
                raise NotServed(
                    f"this edit reads all heads together, and they are shared out over {num_ranks} ranks; "
                    "start the server with --tensor-parallel-size 1",
                    "vector",
                )


def _kept_to(limit: Limit, unchecked: UncheckedEntry, lengths: Lengths) -> UncheckedEntry:
    """The entry, weakened if the operator's limit asks for it and allows it. Raises: SteeringError."""
    kept = unchecked
    for _ in range(_MAX_TRIALS):
        planned = _tried(kept)
        found = _largest_dose(unchecked.vector, planned, lengths, _gain(unchecked.params))
        if (dose := found.relative if found else 0.0) <= limit.max_dose:
            return kept
        scale = _scale(unchecked.vector, planned[0])
        if limit.policy == "refuse" or scale is None:
            break
        # Exact at once where the dose is proportional to the scale; rotations take a few more.
        weaker = {"scale": scale * min(limit.max_dose / dose, 0.999)}
        kept = replace(unchecked, own={**_without_scale(unchecked.own), **weaker})
    raise SteeringError(
        f"the edit is {dose:.3g} times as long as what it edits; this server allows {limit.max_dose:.3g}",
        "scale" if scale is not None else "",
    )


def _scale(vector: Vector, planned: PlannedEdit) -> float | None:
    """An edit's strength; None of methods that have none."""
    settings = settings_of(vector, planned.edit)
    return settings.scale if isinstance(settings, Scaled) else None


def _without_scale(own: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name not in ("scale", "strength", "coefficient")}


def _check_overflow(planner: Planner, dtype: str, param: str) -> None:
    """Refuse edits that would overflow the model's activations, when the first entry takes them too far."""
    most = MAX_AMPLIFICATION[dtype]
    if not (size := max_amplification(sorted(planner.bounds, key=lambda bound: bound[0].layer))) <= most:
        raise SteeringError(
            f"the edits can make activations grow {size:.0e} times, and {dtype} would overflow; at most {most:.0e} "
            "is taken",
            param,
        )


def _gain(params: SteeringParams) -> float:
    """The most that a schedule multiplies an edit by."""
    return params.schedule.largest if params.schedule else 1.0


def _largest_dose(vector: Vector, planned: Iterable[PlannedEdit], lengths: Lengths, gain: float = 1.0) -> Dose | None:
    """The largest relative dose of an entry's edits, when a schedule multiplies them by `gain`; None if not known."""
    doses = (strongest(vector, one.edit._replace(gate=OPEN), lengths) for one in planned)
    found = max(filter(None, doses), default=None)
    return found and found._replace(relative=found.relative * gain)


def _describe(dose: Dose) -> dict[str, Any]:
    return {"relative": dose.relative, "at": f"{dose.point.site}.{dose.point.layer}"}
