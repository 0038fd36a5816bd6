"""Drafted tokens: who takes them, what becomes of those that are rejected, and that answers are as without."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from engines import Ask, edit, plan, vllm_counters
from reference import steered
from scheduling import Case, Traffic
from vllm import SamplingParams
from vllm.v1.outputs import DraftTokenIds
from vllm.v1.request import Request, RequestStatus

from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.admission.receipt import receipt
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.engine.scheduler.bans import NO_TOKEN_LEFT, without_banned
from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.server.engine.worker.logits.model_hook import _decoded
from whipstaff.server.engine.worker.requests import PlannedRequest, Requests
from whipstaff.server.engine.worker.step import WorkerStep
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, PositionedPlan, RequestPlan
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.plan import Edit, PlannedEdit, SteeringPlan, Stop
from whipstaff.steering.where import Where

from .conftest import Shared
from .test_group_scheduling import model  # noqa: F401 - a fixture

EDITED = SteeringPlan((PlannedEdit(Edit("v", "{}", None), Where.of("all")),))
DECODED = DecodingPlan(Mix.of({"expert": 1.0}))
UNDRAFTED: list[tuple[RequestPlan, str]] = [
    (RequestPlan(decoding=DECODED), "decoding"),
    (RequestPlan(EDITED, DECODED), "decoding"),
    (RequestPlan(companions=(CompanionPlan((1, 2)),)), "sequences"),
    (RequestPlan(EDITED, models=("expert",)), "sequences"),
    (RequestPlan(replace(EDITED, stop=Stop(0, 1, 0.5))), "stop_when"),
    (RequestPlan(replace(EDITED, entropy_column=0)), "steering.schedule"),
    (RequestPlan(replace(EDITED, is_metered=True)), "metering"),
]


@pytest.mark.parametrize(("asked", "field"), [(RequestPlan(EDITED), None), *UNDRAFTED])
def test_the_receipt_says_who_takes_drafts(asked: RequestPlan, field: str | None) -> None:
    assert asked.undrafted_by == field
    caps = Mock(spec=Capabilities, num_drafts=4)
    said = {"allowed": True} if field is None else {"allowed": False, "because_of": field}
    assert receipt(CompiledRequest(caps, asked))["drafts"] == said
    caps.num_drafts = 0
    assert "drafts" not in receipt(CompiledRequest(caps, asked))


def test_logits_that_verify_drafts_are_left_alone() -> None:
    """Of rows with two drafts, none and one; the pipeline sees one row of each."""
    starts = np.array([0, 3, 4, 9], np.int32)
    view = BatchView([None] * 3, starts, np.zeros(3, np.int32), num_drafts=np.array([2, 0, 1]))
    assert view.drawn_logits is not None and view.drawn_logits.tolist() == [2, 3, 5]
    assert replace(view, num_drafts=None).drawn_logits is None
    pipeline, rows = Mock(), torch.from_numpy(view.drawn_logits)
    logits, stream, hidden = torch.randn(6, 8).bfloat16(), torch.randn(6, 8), torch.randn(6, 4)
    pipeline.decode.side_effect = lambda drawn, streams, own: drawn.float() + streams["expert"]
    found = _decoded(pipeline, logits.clone(), {"expert": stream}, hidden, rows)
    expected = logits.float()
    expected[rows] += stream[rows]
    assert torch.equal(found, expected)
    assert torch.equal(pipeline.decode.call_args.args[2], hidden[rows])
    pipeline.decode.side_effect = lambda drawn, streams, own: drawn
    assert _decoded(pipeline, logits, {"expert": stream}, hidden, rows) is logits


def test_of_rejected_drafts_no_reading_counts_and_nothing_is_captured() -> None:
    placed = PositionedPlan(RequestPlan(EDITED), 4)
    requests = Requests({name: PlannedRequest(name, placed) for name in "abc"})
    requests["a"].histories, requests["c"].captured = [0], [Mock()]
    for request in requests.values():
        request.num_read = 13
    edits = Mock()
    edits.histories.watched = []
    edits.histories.telling = []
    pipeline = Mock()
    pipeline.take_explanations.return_value = None
    step = WorkerStep(requests, edits, pipeline)
    starts, positions = np.array([0, 3, 6, 7, 9], np.int32), np.array([10, 10, 10, 10])
    step._view = BatchView([placed] * 4, starts, positions, ["a", "c", "b", "gone"], num_drafts=np.array([2, 2, 0, 1]))
    output = SimpleNamespace(
        req_id_to_index={"c": 0, "a": 1, "b": 2, "gone": 3}, sampled_token_ids=[[5], [5, 6], [7], [8, 9]]
    )
    assert step.tell(output) is output
    assert (requests["a"].num_read, requests["b"].num_read) == (12, 13)
    edits.captures.forget.assert_called_once_with(requests["c"], 11)


@pytest.mark.parametrize(("asked", "field"), UNDRAFTED[:1] + UNDRAFTED[4:6])
def test_drafts_of_who_takes_none_are_dropped(
    model: str,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    asked: RequestPlan,
    field: str,
) -> None:
    """And so is the padding that stands for them, with which vLLM lets in who lacks a single token."""
    case = Case(num_blocks=200, max_num_seqs=8, budget=64, num_drafts=3)
    traffic = Traffic(model, case, seed=1)
    drafted: Counter[str] = Counter()

    def run(output: Any, then: Any = traffic.worker.run) -> Any:
        drafted.update({name: len(drafts) for name, drafts in output.scheduled_spec_decode_tokens.items()})
        assert output.total_num_scheduled_tokens == sum(output.num_scheduled_tokens.values())
        return then(output)

    monkeypatch.setattr(traffic.worker, "run", run)
    prompt = list(range(33))  # two blocks and a token
    for _ in range(3):
        pair = []
        for own in (asked, RequestPlan(EDITED)):
            monkeypatch.setattr(traffic, "plan", lambda members, own=own: {PLAN_KEY: own.to_wire()})
            pair.append(traffic.add(0, max_tokens=20, prompt=prompt).request.request_id)
        for _ in range(4):
            traffic.step()
        assert not drafted[pair[0]]
    traffic.drain()
    traffic.check()
    assert not any(drafted[str(name)] for name in (0, 2, 4)) and all(drafted[str(name)] for name in (1, 3, 5))
    assert not traffic.scheduler._undrafted
    traffic.scheduler.update_draft_token_ids(DraftTokenIds(["0"], [[1]]))  # it is gone


def test_the_first_banned_token_of_several_ends_an_answer() -> None:
    params = SamplingParams(allowed_token_ids=[5, 6])
    request = Request("a", [1, 2], params, None)
    request.append_output_token_ids([5, 6, 9, 5])
    assert without_banned(request, [6, 9, 5], False) == ([6], True)
    assert (request.status, request.stop_reason) == (RequestStatus.FINISHED_STOPPED, NO_TOKEN_LEFT)
    words = SamplingParams()
    words._bad_words_token_ids = [[5, 6]]
    other = Request("b", [1, 2], words, None)
    other.append_output_token_ids([5, 6, 5])
    assert without_banned(other, [6, 5], False) == ([], True)
    other.append_output_token_ids([5, 7])
    assert without_banned(other, [5, 7], False) == ([5, 7], False)


WHERE = Where(prompt=[(2, None)], generation=[(0, None)])


def _steered(shared: Shared, scale: float) -> tuple[RequestPlan, list[steered.Edit]]:
    add = 0.4 * torch.randn(shared.engine.shape.hidden_size, generator=torch.Generator().manual_seed(21))
    vector = shared.engine.add_vector({"resid_post.1.add": add})
    asked = plan(SteeringPlan((edit(vector, scale, WHERE),)))
    assert asked is not None
    return asked, [steered.Edit("resid_post", 1, scale, None, add, lambda position, prompt_len: position >= 2)]


def _counted(shared: Shared, *asks: Ask) -> tuple[list[list[int]], int, int]:
    """Answers, and how many tokens were drafted and accepted."""
    names = [f"vllm:spec_decode_num_{kind}_tokens_total" for kind in ("draft", "accepted")]
    model_name = shared.engine.engine.model_config.served_model_name
    before = [vllm_counters(model_name).get(name, 0) for name in names]
    answers = shared.engine.tokens(*asks)
    drafted, accepted = (int(vllm_counters(model_name)[name] - one) for name, one in zip(names, before, strict=True))
    return answers, drafted, accepted


@pytest.mark.engine
@pytest.mark.parametrize("shared", ["v1-eager-drafts"], indirect=True)
@pytest.mark.usefixtures("nobody_left")
class TestEngine:
    def test_steered_requests_take_drafts_and_others_do_not(self, shared: Shared) -> None:
        asked, edits = _steered(shared, 1.5)
        prompts = [[7, 8, 9] * 5, [30, 31] * 4, list(range(40, 60)) * 2]
        num = 40
        answers, drafted, accepted = _counted(shared, *(Ask(prompt, asked, num) for prompt in prompts))
        expected = [steered.greedy(shared.models["base"], prompt, num, edits) for prompt in prompts]
        assert answers == expected
        assert 0 < accepted < drafted
        mixed = plan(asked.steering, {"expert": 1.0})
        _, drafted, _ = _counted(shared, *(Ask(prompt, mixed, num) for prompt in prompts))
        assert drafted == 0

    def test_sampled_requests_take_none(self, shared: Shared) -> None:
        asked, _ = _steered(shared, 4.0)
        prompt, sampling = [5, 6, 7] * 4, {"temperature": 0.8, "allowed_token_ids": [5, 6, 7]}
        assert _counted(shared, Ask(prompt, asked, 6, sampling), Ask(prompt, None, 6, sampling))[1] == 0
