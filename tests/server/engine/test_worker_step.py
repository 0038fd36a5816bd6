"""What a step keeps of the requests: one map, entropies that schedules follow, and nothing of tokens only tried."""

from typing import Any
from unittest.mock import Mock, patch

import numpy as np
import pytest
import torch
from steps import step_edits

from whipstaff.server.engine.worker.batch import NOBODY, BatchView
from whipstaff.server.engine.worker.edits.step_edits import StepEdits
from whipstaff.server.engine.worker.edits.token_table import TokenTable
from whipstaff.server.engine.worker.requests import Arrival, PlannedRequest, Requests
from whipstaff.server.engine.worker.step import WorkerStep
from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.steering.plan import Edit, Insert, ModuleEdit, PlannedEdit, PlannedModuleEdit, SteeringPlan
from whipstaff.steering.programs import Gate
from whipstaff.steering.where import Where

PROMPT, MAX_LEN = 4, 16
FOLLOWS = PlannedEdit(Edit("v", "{}", None, gate=Gate(ramp=(0, 1.0, 4.0, 1.0, 0.0))), Where.of("generation"))
PLACED = PositionedPlan(RequestPlan(SteeringPlan((FOLLOWS,), entropy_column=0)), PROMPT)


class FakeTables:
    """One address for every row of edits, and no early layers."""

    def acquire(self, rows: Any) -> dict[Any, int]:
        return dict.fromkeys(rows, 0)


def known(**plans: PositionedPlan | None) -> tuple[Requests, StepEdits]:
    requests = Requests()
    edits = step_edits(requests, FakeTables(), num_histories=2, max_len=MAX_LEN)
    for request, _ in requests.take(Arrival(name, plan) for name, plan in plans.items()):
        edits.histories.add(request)
    return requests, edits


def rows(position: int, length: int, *names: str) -> BatchView:
    """Rows of one length each at the same position."""
    starts = np.arange(len(names) + 1, dtype=np.int32) * length
    return BatchView([PLACED] * len(names), starts, np.full(len(names), position), names)


@pytest.mark.parametrize("is_edited", (False, True))
def test_an_entropy_is_kept_though_no_token_of_the_step_is_edited(is_edited: bool) -> None:
    """The first generated token is drawn at the prompt's end, where an edit of what is generated has nothing to do."""
    requests, edits = known(a=PLACED)
    edits.begin_step(rows(PROMPT, 1, "a") if is_edited else rows(0, PROMPT, "a"), None)
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(0))
    edits.histories.note_logits(logits)
    read = edits.histories.values[requests["a"].histories[0]]
    expected = torch.distributions.Categorical(logits=logits).entropy()
    assert read[PROMPT + is_edited] == pytest.approx(float(expected), rel=1e-5)
    assert int((~read.isnan()).sum()) == 1


def test_a_prompt_that_is_not_done_awaits_no_entropy() -> None:
    _, edits = known(a=PLACED)
    edits.begin_step(rows(0, PROMPT - 1, "a"), None)
    assert edits.histories.awaited is None
    assert edits.histories.values.isnan().all()


def test_what_is_tried_leaves_no_reading_and_counts_for_nothing() -> None:
    requests, edits = known(a=PLACED, b=PLACED)
    edits.begin_step(rows(PROMPT, 1, "a", "b"), None)
    edits.histories.values[:, 0] = 7.0  # a latch
    before, num_read = edits.histories.values.clone(), requests["b"].num_read
    with edits.trying(rows(PROMPT + 1, 1, "b"), torch.tensor([5])):
        edits.histories.values[:, 0] = edits.histories.values[:, PROMPT + 1] = 9.0
    own, other = requests["b"].histories[0], requests["a"].histories[0]
    torch.testing.assert_close(edits.histories.values[own], before[own], rtol=0, atol=0, equal_nan=True)
    assert edits.histories.values[other, 0] == 9.0
    assert requests["b"].num_read == num_read == PROMPT + 1


def test_a_plain_step_asks_nothing_of_any_part_once_what_was_before_is_cleared() -> None:
    edits, pipeline = Mock(), Mock()
    step = WorkerStep(Requests(), edits, pipeline)

    def calls_of(view: BatchView) -> list[str]:
        for part in (edits, pipeline):
            part.reset_mock()
        step.begin(view, None)
        step.end_forward()
        output = step.tell(None)
        step.give_to_companions_(torch.zeros(1, 1))
        assert output is None
        return [name for part in (edits, pipeline) for name, *_ in part.method_calls]

    everything = [
        "begin_step",
        "captures.begin_step",
        "end_step",
        "captures.note",
        "begin_step",
        "end_forward",
        "take_explanations",
    ]
    assert [calls_of(view) for view in (NOBODY, NOBODY, rows(PROMPT, 1, "a"), NOBODY, NOBODY)] == [
        *(everything, []),  # in the first step every part learns that nobody asks
        *(everything, everything),
        [],
    ]


ASKS = {
    "histories": SteeringPlan((FOLLOWS,), entropy_column=0),
    "module_edits": SteeringPlan((), module_edits=(PlannedModuleEdit(ModuleEdit("v", "{}"), Where.of("all")),)),
    "soft_rows": SteeringPlan((), inserts=(Insert("v", 0, 2),)),
}


def test_a_step_runs_the_form_of_the_model_that_it_needs() -> None:
    """With sites where a token is edited, a condition read or a token tried that would be; plain in the step after."""
    _, edits = known(a=PLACED)
    forms = edits.forms
    edits.begin_step(rows(PROMPT, 1, "a"), None)
    assert not forms.runs_plain
    edits.begin_step(NOBODY, None)
    assert forms.runs_plain
    steered = PositionedPlan(
        RequestPlan(SteeringPlan((PlannedEdit(Edit("v", "{}", None), Where.of("generation")),))), PROMPT
    )
    requests = Requests()
    edits = step_edits(requests, FakeTables())
    list(requests.take([Arrival("a", steered)]))
    prompt, tried = (
        BatchView([steered], np.array([0, num], np.int32), np.array([position]), ["a"])
        for position, num in ((0, PROMPT), (PROMPT, 1))
    )
    edits.begin_step(prompt, None)
    assert edits.forms.runs_plain
    with edits.trying(tried, torch.tensor([5])):
        assert not edits.forms.runs_plain
    edits.begin_step(prompt, None)
    assert edits.forms.runs_plain


def test_what_a_step_was_told_is_told_again_only_where_it_is_other() -> None:
    """Rows that go on token by token get what they got, up to where their edits end or others begin."""
    constant = PlannedEdit(Edit("v", "{}", None), Where(generation=[[1, 4]]))
    placed = PositionedPlan(RequestPlan(SteeringPlan((constant,))), PROMPT)
    requests = Requests()
    edits = step_edits(requests, FakeTables())
    list(requests.take([Arrival("a", placed), Arrival("b", placed)]))
    table = edits.token_table
    written = Mock(wraps=table.write)

    def step(*positions: int) -> tuple[int, list[int]]:
        """How often the table was written, and what it says."""
        written.reset_mock()
        plans = requests.plans_of(["a", "b"])
        view = BatchView(plans, np.arange(3, dtype=np.int32), np.array(positions), ["a", "b"])
        with patch.object(TokenTable, "write", written):
            edits.begin_step(view, None)
        return written.call_count, table.tokens[:2, 0].ge(0).int().tolist()

    assert step(PROMPT, PROMPT + 1) == (1, [0, 1])
    assert step(PROMPT + 1, PROMPT + 2) == (1, [1, 1])
    assert step(PROMPT + 2, PROMPT + 3) == (0, [1, 1])
    with edits.trying(BatchView([placed], np.array([0, 1]), np.array([PROMPT]), ["a"]), torch.tensor([5])):
        assert table.tokens[:1, 0].tolist() == [-1]
    assert step(PROMPT + 2, PROMPT + 3) == (1, [1, 1])
    assert step(PROMPT + 3, PROMPT + 4) == (1, [1, 0])
    assert step(PROMPT + 1, PROMPT) == (1, [1, 0])  # as after a preemption
    list(requests.finish(["b"]))
    assert step(PROMPT + 2, PROMPT + 2) == (1, [1, 0])


@pytest.mark.parametrize("part", ASKS)
def test_what_a_part_was_told_goes_in_the_step_after(part: str) -> None:
    """Though nobody asks anything of it then: what stays would edit somebody else's token. Later it is left alone."""
    requests, told = Requests(), {name: Mock() for name in ASKS}
    edits: Any = step_edits(requests, FakeTables())
    edits.histories, edits.module_edits, edits.soft_rows = told.values()
    num_calls = []
    for steering in (ASKS[part], None, None):
        placed = PositionedPlan(RequestPlan(steering, models=("aux",)), PROMPT)
        list(requests.take([Arrival("a", placed)]))
        before = {name: mock.begin_step.call_count for name, mock in told.items()}
        edits.begin_step(BatchView([placed], np.array([0, 2]), np.array([0]), ["a"]), None)
        edits.end_step()
        num_calls.append({name: mock.begin_step.call_count - before[name] for name, mock in told.items()})
    others = dict.fromkeys(set(ASKS) - {part}, 0)
    assert num_calls == [{part: num, **others} for num in (1, 1, 0)]


def test_a_request_that_comes_again_keeps_what_was_made_for_it() -> None:
    requests = Requests()
    ((first, _),) = requests.take([Arrival("a", PLACED), Arrival("plain", None)])
    again = PositionedPlan(PLACED.plan, PROMPT - 1)
    ((second, _),) = requests.take([Arrival("a", again)])
    assert second is first and requests["a"].placed is again
    assert (list(requests), requests.decoding_of("a")) == (["a"], None)


def test_an_id_may_finish_and_come_back_in_one_step() -> None:
    requests = Requests()
    ((first, _),) = requests.take([Arrival("a", PLACED)])
    gone: list[PlannedRequest] = list(requests.finish(["a", "plain"]))
    ((second, _),) = requests.take([Arrival("a", PLACED)])
    assert gone == [first] and second is not first
