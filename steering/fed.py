"""Finished sequences, and on how many of their tokens an entry of a request took effect: what receipts count."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from whipstaff.steering.conditions import Readings, fired
from whipstaff.steering.plan import PlannedEdit, PlannedModuleEdit
from whipstaff.steering.where import Interval


class Fed(NamedTuple):
    """A finished sequence: what was fed to the model, which is all but the last token generated."""

    prompt_len: int
    num_fed: int
    ids: list[int]  # of prompt and generation; empty unless the plan tells tokens apart
    columns: list[Readings] = []  # noqa: RUF012 - what its conditions read; empty when that is not known


def num_edited(planned: Sequence[PlannedEdit | PlannedModuleEdit], fed: Sequence[Fed]) -> int:
    """How many tokens of all sequences the edits were meant for."""
    return sum(_overlap(one, sequence) for one in planned for sequence in fed)


def fired_tokens(planned: Sequence[PlannedEdit], fed: Sequence[Fed]) -> dict[str, Any]:
    """On how many tokens a condition, or an entropy, let an entry through, of those where that is known: the receipt's
    `fired`, where the entry has a condition."""
    if not planned or (planned[0].edit.gate.condition_index < 0 and planned[0].edit.gate.ramp is None):
        return {}
    gate, counts = planned[0].edit.gate, [0, 0]
    for sequence in fed:
        for one in planned if sequence.columns else ():
            found = fired(gate, sequence.columns, _positions(one, sequence))
            counts = [counts[0] + found.num_open, counts[1] + found.num_known]
    readings = (
        [sequence.columns[gate.condition_index][0] for sequence in fed if sequence.columns] if gate.is_latched else []
    )
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


def _overlap(planned: PlannedEdit | PlannedModuleEdit, sequence: Fed) -> int:
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
