"""Both runner adapters give the same view of a step, and the token table says what happens to every token."""

import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from clauses import PLANNED, valid
from hypothesis import given
from hypothesis import strategies as st
from steps import step_edits

from whipstaff.decoding.mix import MAIN, Mix, Stream, Term
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.engine.worker import runner_v1, runner_v2
from whipstaff.server.engine.worker.batch import ABSENT, NOBODY, BatchView
from whipstaff.server.engine.worker.edits.step_edits import StepEdits
from whipstaff.server.engine.worker.requests import Arrival, Requests
from whipstaff.server.engine.worker.step import WorkerStep
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, PositionedPlan, RequestPlan
from whipstaff.steering.conditions import Schedule
from whipstaff.steering.plan import Edit, EditSet, PlannedEdit, PlannedProbe, ProbeRead, SteeringPlan
from whipstaff.steering.tables import NOTHING
from whipstaff.steering.where import Region, Where

CLAUSES = [
    Where.of("each_last"),
    Where.of("all"),
    Where.of("generation"),
    Where(prompt=[(1, -1)], generation=[(2, 5)], exclude=Region(prompt=[(3, 4)])),
]


class FakeTables:
    """Numbers rows in the order they come."""

    def __init__(self) -> None:
        self.slots: dict[EditSet, int] = {}

    def acquire(self, rows: Any) -> dict[EditSet, int]:
        return {row: self.slots.setdefault(row, len(self.slots)) for row in rows}


def placed(clauses: list[int], prompt_len: int) -> PositionedPlan:
    edits = tuple(PlannedEdit(Edit(f"vector {c}", "{}", None), CLAUSES[c]) for c in clauses)
    return PositionedPlan(RequestPlan(SteeringPlan(edits)), prompt_len)


def requests_of(**plans: PositionedPlan | None) -> Requests:
    made = Requests()
    list(made.take(Arrival(name, plan) for name, plan in plans.items()))
    return made


def edits_of(requests: Requests, **sizes: int) -> StepEdits:
    return step_edits(requests, FakeTables(), **sizes)


@given(planned=st.lists(PLANNED, max_size=4), prompt_len=st.integers(1, 14))
def test_a_placed_plan_knows_its_rows_and_where_they_begin(planned: list[Any], prompt_len: int) -> None:
    edits = [PlannedEdit(edit, where) for edit, clause in planned if (where := valid(clause)) is not None]
    plan = SteeringPlan(tuple(edits))
    segments, placed = plan.segments(prompt_len), PositionedPlan(RequestPlan(plan if edits else None), prompt_len)
    assert placed.rows == {row for one in segments for row in (one.row, one.row_at_tokens) if row}
    assert placed.first_edited == min((one.start for one in segments), default=None)


def test_both_adapters_give_the_same_view() -> None:
    """Three rows: a plain one, a chunk of a steered prompt, and a steered decode, in longer buffers."""
    plans = {"plain": None, "prefill": placed([1], 50), "decode": placed([0], 7)}
    step: Any = SimpleNamespace(requests=requests_of(**plans), groups={})
    starts, positions = np.array([0, 1, 21, 22, 99, 99], np.int32), np.array([12, 30, 9, 77], np.int32)
    v1 = SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=list(plans), num_reqs=3, num_computed_tokens_cpu=positions),
        query_start_loc=SimpleNamespace(np=starts),
        discard_request_mask=SimpleNamespace(np=np.array([False, False, True, True])),
        num_spec_tokens=0,
    )
    v2 = SimpleNamespace(
        req_ids=list(plans),
        num_reqs=3,
        query_start_loc_np=starts,
        num_computed_tokens_np=positions,
        prefill_len_np=np.array([12, 50, 11, 99]),
    )
    for view in (runner_v1.view(v1, step), runner_v2.view(v2, step)):
        assert list(view.plans) == list(plans.values())
        assert view.token_positions().tolist() == [12, *range(30, 50), 9]
        assert [plan.prompt_len for _, plan in view.planned()] == [50, 7]
        assert view.draws.tolist() == [True, True, False]


def test_a_step_in_which_nobody_asks_for_anything_is_not_looked_at() -> None:
    step: Any = SimpleNamespace(requests=requests_of(plain=None), groups={})
    assert runner_v1.view(None, step) is runner_v2.view(None, step) is NOBODY


def coupled(until: int | None, num_generated: int) -> BatchView:
    """Four rows: a plain one, a companion, a primary (prompt of 7) and its other companion."""
    companions = (CompanionPlan((1, 2), until=until), CompanionPlan((3,)))
    primary = PositionedPlan(RequestPlan(companions=companions), 7)
    starts, positions = np.arange(5, dtype=np.int32), np.array([3, 2, 6, 1]) + num_generated
    return BatchView([None, None, primary, None], starts, positions, ["x", "g/1", "g", "g/2"], np.ones(4, np.bool_))


def test_a_primary_knows_its_companions_rows() -> None:
    view = coupled(4, 3).in_groups({"g": ("g/1", "g/2")})
    assert (view.companions, view.companion_rows) == ({2: (1, 3)}, [(1, 2), (3, 2)])


def test_companions_leave_the_mix_at_their_time_and_the_batch_when_they_are_dropped() -> None:
    late = coupled(4, 4).in_groups({"g": ("g/1", "g/2")})
    assert (late.companions, late.companion_rows) == ({2: (ABSENT, 3)}, [(1, 2), (3, 2)])
    dropped = coupled(4, 5).in_groups({"g": (None, "g/2")})
    assert (dropped.companions, dropped.companion_rows) == ({2: (ABSENT, 3)}, [(3, 2)])


@pytest.mark.parametrize("groups", [{}, {"g": (None, "g/2")}, {"g": ("g/1", "elsewhere")}])
def test_no_token_is_drawn_without_a_companion_that_it_needs(groups: dict[str, tuple[str | None, ...]]) -> None:
    with pytest.raises(RuntimeError, match="g would get token 3 without all of its sequences"):
        coupled(4, 3).in_groups(groups)
    computing = replace(coupled(4, 3), draws=np.zeros(4, np.bool_))
    assert computing.in_groups(groups) is computing


def test_companions_get_the_token_of_their_primary() -> None:
    parts: Any = Mock()
    step, sampled = WorkerStep(Requests(), parts, parts), torch.tensor([[5], [6], [7], [8]], dtype=torch.int32)
    for companion_rows, expected in ([], [5, 6, 7, 8]), ([(1, 2), (3, 2)], [5, 7, 7, 7]), ([(1, 0)], [5, 5, 7, 7]):
        step.begin(replace(NOBODY, companion_rows=companion_rows), None)
        step.give_to_companions_(sampled)
        assert sampled.flatten().tolist() == expected


def test_companions_travel_as_json() -> None:
    steering = SteeringPlan((PlannedEdit(Edit("v", "{}", None), CLAUSES[1]),))
    mix = Mix((Term(MAIN, 1.5), Term(Stream("expert", 2), -0.5)))
    plan = RequestPlan(None, DecodingPlan(mix), companions=(CompanionPlan((1, 2), steering, 5), CompanionPlan((3,))))
    again = RequestPlan.from_wire({PLAN_KEY: json.loads(json.dumps(plan.to_wire()))})
    assert again == plan
    assert (plan.plan_of(1), plan.plan_of(2)) == (RequestPlan(steering), RequestPlan(models=("expert",)))


REQUESTS = st.lists(
    st.tuples(st.lists(st.integers(0, 3), max_size=3), st.integers(1, 12), st.integers(0, 15), st.integers(1, 9)),
    max_size=6,
)


@given(steps=st.lists(REQUESTS, min_size=1, max_size=4))
def test_every_token_gets_the_slot_of_the_edits_at_its_position(steps: list[Any]) -> None:
    """Several steps in a row, so that what one step leaves behind would show in the next."""
    known = Requests()
    made = edits_of(known)
    for requests in steps:
        plans = [placed(clauses, prompt_len) if clauses else None for clauses, prompt_len, _, _ in requests]
        lengths = [length for *_, length in requests]
        starts = np.cumsum([0, *lengths]).astype(np.int32)
        view = BatchView(plans, starts, np.array([position for _, _, position, _ in requests], np.int32))
        names = [str(index) for index in range(len(plans))]
        list(known.take(map(Arrival, names, plans)))
        made.begin_step(replace(view, requests=names), None)
        expected = []
        for plan, (_, _, position, length) in zip(plans, requests, strict=True):
            for p in range(position, position + length):
                rows = (
                    [row for start, end, row, _ in plan.segments if start <= p and (end is None or p < end)]
                    if plan
                    else []
                )
                expected.append(made.sites.tables.slots[rows[0]] if rows else NOTHING)  # type: ignore[attr-defined]
        assert made.token_table.tokens[:, 0].tolist() == expected + [NOTHING] * (256 - len(expected))


FOLLOWING = [
    SteeringPlan((PlannedEdit(Edit("ramp", "{}", None), CLAUSES[1]),), schedules=(Schedule(shape="linear", tokens=4),)),
    SteeringPlan(
        (PlannedEdit(Edit("two", "{}", None), CLAUSES[2]),),
        schedules=(Schedule(shape="exponential", half_life=2), Schedule(shape="linear", tokens=9, to=3)),
    ),
    SteeringPlan(
        (PlannedEdit(Edit("gated", "{}", None), CLAUSES[1]),),
        (PlannedProbe(ProbeRead("probe", 0, 0, False), CLAUSES[1]),),
    ),
    SteeringPlan((PlannedEdit(Edit("fixed", "{}", None), CLAUSES[1]),)),
]


@given(
    plans=st.lists(st.tuples(st.sampled_from(FOLLOWING), st.integers(1, 5)), min_size=1, max_size=5),
    steps=st.lists(st.lists(st.integers(0, 4), max_size=5, unique=True), min_size=2, max_size=6),
    repeats=st.integers(1, 3),
)
def test_what_follows_positions_moves_with_them(plans: list[Any], steps: list[list[int]], repeats: int) -> None:
    """Token by token, as batches decode, with some that join, leave and change places: the tables say what tables that
    never saw an earlier step say."""
    placed = [PositionedPlan(RequestPlan(plan), prompt_len) for plan, prompt_len in plans]
    known = requests_of(**{str(index): plan for index, plan in enumerate(placed)})
    sizes = {"num_histories": 8, "max_len": 64, "max_tokens": 8}
    made = edits_of(known, **sizes)
    for request in known.values():
        made.histories.add(request)
    fed = [0] * len(plans)
    for batch in [step for step in steps for _ in range(repeats)]:
        rows = [index for index in batch if index < len(plans)]
        view = BatchView(
            [placed[row] for row in rows],
            np.arange(len(rows) + 1, dtype=np.int32),
            np.array([fed[row] for row in rows], np.int32),
            [str(row) for row in rows],
        )
        fresh = edits_of(known, **sizes)
        fresh.sites.tables.slots = made.sites.tables.slots  # type: ignore[attr-defined]
        for one in (made, fresh):
            one.begin_step(view, None)
        edited = (fresh.token_table.tokens[:, 0] != NOTHING).nonzero()[:, 0]
        assert made.token_table.tokens[:, 0].tolist() == fresh.token_table.tokens[:, 0].tolist()
        assert made.token_table.tokens[edited].tolist() == fresh.token_table.tokens[edited].tolist()
        for token in edited.tolist():
            steering = placed[rows[token]].plan.steering
            named = len(steering.schedules) if steering else 0
            assert made.token_table.gains[token, :named].tolist() == fresh.token_table.gains[token, :named].tolist()
        for row in rows:
            fed[row] += 1
