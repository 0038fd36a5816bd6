"""The entries of a request's `steering`, resolved, and what the receipt says of them."""

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from whipstaff.server.catalogue import Catalogue
from whipstaff.server.placing import SoftPrompt
from whipstaff.steering.artifacts import Vector
from whipstaff.steering.conditions import Readings, fired
from whipstaff.steering.dose import Dose
from whipstaff.steering.plan import PlannedEdit, PlannedSpecial, RowEdit, SteeringParams, SteeringPlan, strongest
from whipstaff.steering.programs import OPEN
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
    special: PlannedSpecial | None = None

    @property
    def label(self) -> str:
        """Its method's name: one of ours, or the general one for files of other methods."""
        return self.vector.method.name

    def said(self, plan: SteeringPlan, fed: list[Fed], have: Catalogue) -> dict[str, Any]:
        """The entry as the receipt shows it; `fed` are the finished sequences."""
        if self.soft is not None and self.special is None:
            return {
                "vector": self.params.vector,
                "digest": self.vector.digest,
                "method": self.vector.header.method,
                **self.soft.params.model_dump(exclude_none=True),
                "prompt_tokens": self.soft.num,  # which usage counts
            }
        if self.special is not None:
            return {
                "vector": self.params.vector,
                "digest": self.vector.digest,
                "method": self.vector.header.method,
                **json.loads(self.special.special.setting),
                "where": [self.special.where.model_dump(exclude_none=True)],
                "edited_tokens": sum(_overlap(self.special, sequence) for sequence in fed),
            }
        planned = [plan.edits[index] for index in self.edits]
        settings = json.loads(planned[0].edit.setting) if planned else {}
        largest = max((found for one in planned if (found := self._dose(one.edit, have))), default=None)
        return {
            "vector": self.params.vector,
            "digest": self.vector.digest,
            "method": self.vector.header.method,
            **settings,
            "layers": list(self.params.layers or self.vector.layers),
            "sites": self.vector.sites,
            "where": [one.where.model_dump(exclude_none=True) for one in planned],
            **self.params.model_dump(
                by_alias=True, exclude_defaults=True, include={"when", "schedule", "normalize", "renorm"}
            ),
            "dose": None
            if largest is None
            else {"relative": largest.relative, "at": f"{largest.place.site}.{largest.place.layer}"},
            "edited_tokens": sum(_overlap(one, sequence) for one in planned for sequence in fed),
            **_fired(planned, fed),
        }

    def _dose(self, edit: RowEdit, have: Catalogue) -> Dose | None:
        found = strongest(self.vector, edit._replace(gate=OPEN), have.lengths)
        most = self.params.schedule.largest if self.params.schedule else 1.0
        return found and Dose(found.relative * most, found.place)


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
