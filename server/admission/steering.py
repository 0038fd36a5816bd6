"""The entries of a request's `steering`, resolved, and what the receipt says of them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from whipstaff.server.admission.positions import SoftPrompt
from whipstaff.server.errors import BadRequest
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.conditions import Readings, fired
from whipstaff.steering.dose import Dose
from whipstaff.steering.edits import Lengths, strongest
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.methods.attention import AttentionOverride, OverrideParams
from whipstaff.steering.plan import PlannedEdit, PlannedSpecial, SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.programs import OPEN
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Interval


class Fed(NamedTuple):
    """A finished sequence: what was fed to the model, which is all but the last token generated."""

    prompt_len: int
    num_fed: int
    ids: list[int]  # of prompt and generation; empty unless the plan tells tokens apart
    columns: list[Readings] = []  # noqa: RUF012 - what its conditions read; empty when that is not known


@dataclass
class Steered:
    """One entry of a request's `steering`, resolved."""

    path: str
    vector: Vector
    params: SteeringParams
    edits: range  # which of the plan's edits it became
    soft: SoftPrompt | None = None
    special: int | None = None  # which of the plan's edits of the router or of attention it became
    probe: Vector | None = None  # that its condition reads
    is_off: bool = False  # whether it changes nothing and is left out

    @property
    def label(self) -> str:
        """Its method's name: one of ours, or the general one for files of other methods."""
        return self.vector.method.name

    def planned(self, plan: SteeringPlan) -> Sequence[PlannedEdit | PlannedSpecial]:
        """What the entry became in its plan."""
        return [plan.edits[i] for i in self.edits] if self.special is None else [plan.specials[self.special]]

    def check_keys(self, plan: SteeringPlan, prompt_len: int, caps: Capabilities) -> None:
        """The keys that heads are told to look at must be there. Raises: BadRequest naming the key."""
        if self.special is None or not isinstance(self.vector.method, AttentionOverride) or caps.attention is None:
            return
        special, where = plan.specials[self.special].special, plan.specials[self.special].where
        params, intervals = OverrideParams.model_validate_json(special.setting), where.intervals(prompt_len)
        first = intervals[0][0] if intervals else prompt_len - 1
        last = prompt_len - 1 if intervals and intervals[-1][1] is not None else None
        for index, edit in enumerate(params.edits):
            window = caps.attention["windows"].get(edit.layer)
            for number, key in enumerate(edit.keys):
                position, path = key + prompt_len if key < 0 else key, f"{self.path}.edits[{index}].keys[{number}]"
                if not 0 <= position <= min(first, prompt_len - 1):
                    raise BadRequest(
                        f"position {key} is not at or before token {first}, the first whose heads are told", path
                    )
                if window is not None and (last is None or last - position >= window):
                    raise BadRequest(f"layer {edit.layer} sees {window} tokens back; position {key} is beyond", path)

    def said(self, plan: SteeringPlan, fed: list[Fed], caps: Capabilities) -> dict[str, Any]:
        """The entry as the receipt shows it; `fed` are the finished sequences."""
        named = {
            "vector": self.params.vector,
            "digest": self.vector.digest,
            "method": self.vector.header.method,
        }
        if self.soft is not None and self.special is None:
            return {
                **named,
                **self.soft.params.model_dump(exclude_none=True),
                "prompt_tokens": self.soft.num,  # which usage counts
            }
        if self.special is not None:
            special = plan.specials[self.special]
            return {
                **named,
                **json.loads(special.special.setting),
                "where": [special.where.model_dump(exclude_none=True)],
                "edited_tokens": sum(_overlap(special, sequence) for sequence in fed),
            }
        planned = [plan.edits[index] for index in self.edits]
        settings = json.loads(planned[0].edit.setting) if planned else {}
        gain = self.params.schedule.largest if self.params.schedule else 1.0
        largest = largest_dose(self.vector, planned, caps.lengths, gain)
        return {
            **named,
            **settings,
            "layers": sorted(set(self.params.layers or self.vector.layers)),
            "sites": self.vector.sites,
            "where": [one.where.model_dump(exclude_none=True) for one in planned],
            **self.params.model_dump(
                by_alias=True, exclude_defaults=True, include={"when", "schedule", "normalize", "renorm"}
            ),
            "dose": None if largest is None else dose_said(largest),
            "edited_tokens": sum(_overlap(one, sequence) for one in planned for sequence in fed),
            **_fired(planned, fed),
        }


class SequenceSteering(NamedTuple):
    """How a sequence is steered, whatever its prompt will be: the request's own, or a companion's."""

    entries: Sequence[Steered] = ()
    plan: SteeringPlan = SteeringPlan(())
    warnings: Sequence[str] = ()  # for the receipt

    @property
    def paths(self) -> list[str]:
        """Where in the request each edit of the plan stands, then each special."""
        paths = [entry.path for entry in self.entries for _ in entry.edits]
        return paths + [entry.path for entry in self.entries if entry.special is not None]

    @property
    def soft(self) -> list[SoftPrompt]:
        """The rows that a prompt must have room for; a KV prefix stands first."""
        prefix_first = sorted(self.entries, key=lambda entry: entry.special is None)
        return [entry.soft for entry in prefix_first if entry.soft is not None]

    @property
    def vectors(self) -> list[Vector]:
        """The files that it reads."""
        return [vector for entry in self.entries for vector in (entry.vector, entry.probe) if vector is not None]


def check_one_set(entries: Iterable[Steered], plan: SteeringPlan) -> None:
    """The engine tells apart one set of tokens per sequence. Raises: BadRequest."""
    first: frozenset[int] = frozenset()
    for entry in entries:
        for planned in entry.planned(plan):
            where = planned.where
            for name, region in (("tokens", where), ("exclude.tokens", where.exclude)):
                ids = region.ids if region else frozenset()
                first = first or ids
                if ids and ids != first:
                    raise BadRequest(
                        f"a request may tell one set of tokens apart; these are {sorted(ids)}, and before them "
                        f"came {sorted(first)}",
                        f"{entry.path}.where.{name}",
                    )


def largest_dose(vector: Vector, planned: Iterable[PlannedEdit], lengths: Lengths, gain: float = 1.0) -> Dose | None:
    """The largest relative dose of an entry's edits, when a schedule multiplies them by `gain`; None if not known."""
    doses = (strongest(vector, one.edit._replace(gate=OPEN), lengths) for one in planned)
    found = max(filter(None, doses), default=None)
    return found and found._replace(relative=found.relative * gain)


def doses(vector: Vector, caps: Capabilities) -> list[dict[str, Any]]:
    """What a vector comes to at its own strength and at 1, beside the served model's activations, as far as known."""
    found: dict[str, dict[str, Any]] = {}
    for own in ({}, {"scale": 1.0}) if vector.method.served_by == "edits" else ():
        planner = Planner()
        try:
            planner.add(SteeringParams(vector="it"), own, vector, None)
        except (SteeringError, ValidationError):  # its parameters cannot be guessed, or it has no scale
            continue
        setting = planner.edits[0].edit.setting
        if dose := largest_dose(vector, planner.edits, caps.lengths):
            found[setting] = {"scale": json.loads(setting).get("scale"), **dose_said(dose)}
    return list(found.values())


def dose_said(dose: Dose) -> dict[str, Any]:
    return {"relative": dose.relative, "at": f"{dose.place.site}.{dose.place.layer}"}


def _fired(planned: list[PlannedEdit], fed: list[Fed]) -> dict[str, Any]:
    """On how many tokens a condition, or an entropy, let the edit through; of those where that is known."""
    if not planned or (planned[0].edit.gate.column < 0 and planned[0].edit.gate.ramp is None):
        return {}
    gate, counts = planned[0].edit.gate, [0, 0]
    for sequence in fed:
        for one in planned if sequence.columns else ():
            found = fired(gate, sequence.columns, _positions(one, sequence))
            counts = [counts[0] + found.num_open, counts[1] + found.num_known]
    readings = [sequence.columns[gate.column][0] for sequence in fed if sequence.columns] if gate.is_latched else []
    return {"fired": {"tokens": counts[0], "of": counts[1], **({"readings": readings} if readings else {})}}


def _positions(planned: PlannedEdit, sequence: Fed) -> list[int]:
    """The positions of a sequence that an edit was meant for."""
    usual = planned.where.intervals(sequence.prompt_len)
    at_tokens, ids = planned.where.intervals_at_tokens(sequence.prompt_len), planned.where.token_ids
    return [
        position
        for position in range(sequence.num_fed)
        if _has(at_tokens if ids and sequence.ids[position] in ids else usual, position)
    ]


def _overlap(planned: PlannedEdit | PlannedSpecial, sequence: Fed) -> int:
    """How many of a sequence's tokens an edit was meant for."""
    where, num_fed = planned.where, sequence.num_fed
    if where.token_ids:
        apart = [index for index, token in enumerate(sequence.ids[:num_fed]) if token in where.token_ids]
        at_tokens = where.intervals_at_tokens(sequence.prompt_len)
        usual = where.intervals(sequence.prompt_len)
        return _covered(usual, num_fed) + sum(_has(at_tokens, position) - _has(usual, position) for position in apart)
    return _covered(where.intervals(sequence.prompt_len), num_fed)


def _covered(intervals: list[Interval], num_fed: int) -> int:
    return sum(max(0, min(num_fed, num_fed if end is None else end) - start) for start, end in intervals)


def _has(intervals: list[Interval], position: int) -> bool:
    return any(start <= position and (end is None or position < end) for start, end in intervals)
