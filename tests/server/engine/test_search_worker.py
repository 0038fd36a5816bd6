"""Searches in the worker without a model: who is tried together, what is drawn, what goes on in which seat."""

from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor
from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput
from vllm.v1.worker.utils import copy_kv_cache_blocks_inplace

from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.plan import DecodingPlan, SearchPlan
from whipstaff.decoding.search.search import (
    Continuation,
    Decision,
    Hypothesis,
    Living,
    Search,
    SearchFacts,
    SearchMethod,
    SearchParams,
    Steps,
    Tried,
)
from whipstaff.server.engine.searches import SearchStep, Verdict, attach_verdicts, verdicts_of
from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.server.engine.worker.kv_cache import copy_blocks
from whipstaff.server.engine.worker.logits.metadata import RequestState
from whipstaff.server.engine.worker.logits.request_tables import RequestTables
from whipstaff.server.engine.worker.requests import Arrival, Requests
from whipstaff.server.engine.worker.runner_v1 import place_seats
from whipstaff.server.engine.worker.search.log_probs import LogProbs
from whipstaff.server.engine.worker.search.searches import Searches
from whipstaff.server.engine.worker.search.seats import seated
from whipstaff.server.plan import CompanionPlan, PositionedPlan, RequestPlan

CPU = torch.device("cpu")
STEP = SearchStep(("p", "p/seat1"), ("p", "p/seat1", "p/seat2"), 10, 20)


def grow(source: int, length: int, token: int = 5) -> Continuation:
    return Continuation(source, length, (token,))


def test_blocks_are_copied_as_vllm_copies_them() -> None:
    """Where a cache has its memory to itself, where several share it, and where one is another's."""
    num, pairs = 6, [(1, 3), (1, 4), (5, 0)]

    def made() -> list[Tensor]:
        random = torch.Generator().manual_seed(0)
        whole, both = (torch.randn(2 * num, *size, generator=random) for size in ((3, 4), (2, 3, 4)))
        return [whole, both[:, 0], both[:, 1], whole]

    ours, theirs, before = made(), made(), made()
    copy_blocks(ours, num, pairs)
    copy_kv_cache_blocks_inplace(theirs, num, pairs)
    for own, other, old in zip(ours, theirs, before, strict=True):
        assert torch.equal(own, other) and not torch.equal(own, old)


def test_who_grows_stays_in_its_seat() -> None:
    placed = seated([Continuation(0, 1, (4,)), grow(0, 3), grow(1, 2)], [3, 2], STEP)
    assert [(one.seat, one.source) for one in placed] == [("p/seat2", "p"), ("p", "p"), ("p/seat1", "p/seat1")]


def test_the_primarys_seat_is_always_taken() -> None:
    (placed,) = seated([grow(1, 2)], [3, 2], STEP)
    assert (placed.seat, placed.source) == ("p", "p/seat1")
    placed_two = seated([grow(1, 2), grow(1, 2, 6)], [3, 2], STEP)
    assert [one.seat for one in placed_two] == ["p/seat1", "p"]


def test_a_seat_in_which_nothing_lives_any_more_is_taken_before_a_new_one() -> None:
    placed = seated([grow(0, 3), grow(0, 3, 6)], [3, 2], STEP)
    assert [one.seat for one in placed] == ["p", "p/seat1"]


@pytest.mark.parametrize(
    "living", [[grow(0, 3)] * 4, [grow(0, 4)], [Continuation(0, 3, (1,) * 18)]], ids=["many", "kept", "long"]
)
def test_what_cannot_be_is_refused(living: list[Continuation]) -> None:
    with pytest.raises(ValueError):
        seated(living, [3, 2], STEP)


class Nothing(SearchParams):
    method: Literal["both"] = "both"
    rounds: int = 1


class Both(SearchMethod[Nothing]):
    """Tries tokens for some rounds, keeps two sequences, and ends after three steps."""

    name, paper, params = "both", "", Nothing
    needs = frozenset({"hidden", "tries"})

    def off(self, streams: Any, heads: Any) -> None:
        return None

    def num_sequences(self, params: Nothing) -> int:
        return 2

    def start(self, setting: Nothing, facts: SearchFacts) -> Search:
        return Ways(setting, facts)


class Ways(Search):
    def __init__(self, setting: Nothing, facts: SearchFacts) -> None:
        self.setting, self.facts, self.num_steps = setting, facts, 0

    def step(self, living: Living) -> Steps:
        assert living.hidden is not None and living.logits.dtype == torch.float32
        score = 0.0
        for number in range(self.setting.rounds):
            tried = yield torch.full((len(living.generated),), number)
            score += float(tried.hidden.sum())
        self.num_steps += 1
        if self.num_steps == 3:
            return Decision(hypotheses=(Hypothesis(tuple(living.generated[0]), score, "stop"),), counts={"own": 1})
        last, best = len(living.generated) - 1, int(living.logits[0].argmax())
        length = len(living.generated[0])
        return Decision((grow(last, length, best), grow(0, length, 3)), counts={"own": 1, "tried": 100})

    def stop(self, living: Living) -> Decision:
        return Decision(hypotheses=tuple(Hypothesis(tuple(text), 0.0, "length") for text in living.generated))


class Passes:
    """A look-ahead that notes what is tried together: (position + token) is what the model makes of it."""

    def __init__(self) -> None:
        self.seen: list[tuple[list[int], list[int]]] = []

    def after(self, view: BatchView, rows: list[int], positions: Any, reads_attention: bool) -> Any:
        def try_(tokens: Tensor) -> Tried:
            self.seen.append((list(rows), tokens.tolist()))
            return Tried((torch.tensor(positions) + tokens)[:, None].float())

        return try_


def requests(rounds: dict[str, int], num_companions: int = 0) -> Requests:
    made = Requests()
    for name, num in rounds.items():
        search = SearchPlan("both", Nothing(rounds=num).model_dump_json(), 2)
        companions = tuple(CompanionPlan((9,)) for _ in range(num_companions))
        placed = PositionedPlan(RequestPlan(None, DecodingPlan(search=search), companions=companions), 4)
        for request, _ in made.take([Arrival(name, placed)]):
            assert placed.plan.decoding is not None
            request.decoding = RequestState(placed.plan.decoding, 4, 0, False, False, [], ends=frozenset({2}))
    return made


def view(*names: str, position: int = 3) -> BatchView:
    num = len(names)
    return BatchView([None] * num, np.arange(num + 1), np.full(num, position), names, np.ones(num, np.bool_))


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> tuple[Searches, Passes, Requests]:
    monkeypatch.setitem(METHODS, "both", Both())
    held, passes = requests({"a": 2, "b": 1}, num_companions=1), Passes()
    return Searches(held, lambda digest: {}, passes, None, CPU), passes, held  # type: ignore[arg-type]


def step(*living: str) -> SearchStep:
    return SearchStep(living, (living[0], f"{living[0]}/seat1"), 10, 20)


def test_searches_decide_together(searches: tuple[Searches, Passes, Requests]) -> None:
    made, passes, _ = searches
    made.expected = {"a": step("a"), "b": step("b")}
    logits = torch.eye(6)[[0, 5, 0, 4]]
    sampled = torch.tensor([[1], [1], [1], [1]])
    made.decide(view("other", "a", "a/1", "b"), torch.zeros(4, 2), logits, sampled)
    assert passes.seen == [([1, 3], [0, 0]), ([1], [1])]  # the second asks once only
    assert sampled.flatten().tolist() == [1, 5, 1, 4]
    verdicts, copies = made.take()
    assert [(one.seat, one.tokens) for one in verdicts["a"].living] == [("a", (5,)), ("a/seat1", (3,))]
    assert sorted(copies) == [("a", "a/seat1"), ("a/1", "a/seat1/1"), ("b", "b/seat1"), ("b/1", "b/seat1/1")]
    assert made.take() == ({}, [])
    made.decide(view("a"), torch.zeros(1, 2), logits, sampled)  # a step that none takes
    assert made.take() == ({}, [])


def test_an_answer_tells_what_was_done(searches: tuple[Searches, Passes, Requests]) -> None:
    made, _, _ = searches
    logits = torch.eye(6)[[5, 5]]
    for living in (["a"], ["a", "a/seat1"], ["a/seat1", "a"]):
        made.expected = {"a": SearchStep(tuple(living), ("a", "a/seat1"), 10, 20)}
        made.decide(view(*living), torch.zeros(2, 2), logits, torch.zeros(2, dtype=torch.int64))
    verdict = made.take()[0]["a"]
    (answer,) = verdict.hypotheses
    assert answer.tokens == (3, 5) and verdict.counts == {"own": 3, "tried": 2 + 4 + 4}  # and not what the method says
    assert set(made.end(["a", "b"])) == {"a/seat1", "a/seat1/1"}
    assert made.end(["a"]) == []


def test_a_search_that_may_take_no_more_tries_nothing(searches: tuple[Searches, Passes, Requests]) -> None:
    made, passes, _ = searches
    logits, tokens = torch.eye(6)[[5, 5]], torch.zeros(2, dtype=torch.int64)
    made.expected = {"a": step("a")}
    made.decide(view("a"), torch.zeros(2, 2), logits, tokens)
    num, before = len(passes.seen), made.take()[0]["a"].counts
    made.expected = {"a": step("a", "a/seat1")._replace(is_last=True)}
    made.decide(view("a", "a/seat1"), torch.zeros(2, 2), logits, tokens)
    verdict = made.take()[0]["a"]
    assert [one.tokens for one in verdict.hypotheses] == [(5,), (3,)] and len(passes.seen) == num
    assert before == {"own": 1, "tried": 2} == verdict.counts


def test_log_probabilities_of_what_is_settled_and_of_answers() -> None:
    """A text that died and comes back is known; what is told, is told once."""
    told, logits = LogProbs(2, frozenset({2})), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    rows = logits.log_softmax(1)

    def said(row: int, token: int) -> Any:
        best = rows[row].topk(2)
        rank = int((rows[row] >= rows[row, token]).sum())
        values = [rows[row, token], *best.values]
        return (token, *best.indices.tolist()), pytest.approx([float(one) for one in values]), rank

    living = Decision((grow(0, 0, 4), grow(0, 0, 5)))
    assert told.note(logits[:1], [()], living) == ()
    forked = Decision((grow(1, 1, 3), grow(1, 1, 1)), settled=1)
    assert told.note(logits, [(4,), (5,)], forked) == ((said(0, 5),),)
    back = Decision((Continuation(0, 1, (1,)), Continuation(0, 0, (4,))), settled=1)
    assert told.note(logits, [(5, 3), (5, 1)], back) == ()
    answers = tuple(Hypothesis(text, 0.0, "length") for text in ((5, 1, 0), (4, 2), (5, 3)))
    first, second, third = told.note(logits, [(5, 1), (4,)], Decision(hypotheses=answers))
    assert first == (said(1, 1), said(0, 0))
    assert second == (said(0, 4), said(0, 2)) and third == (said(0, 5), said(1, 3))


def test_tables_are_copied_all_at_once() -> None:
    tables = RequestTables(4, CPU)
    slots = [tables.add([number] * 3, 1) for number in (7, 8, 9)]
    first, second, third = slots
    tables.copy([(first, second), (second, first), (first, third)])
    assert [int(tables._tokens[slot, 0]) for slot in slots] == [8, 7, 7]


def test_seats_are_like_the_primary_for_the_legacy_runner() -> None:
    known = {"p": SimpleNamespace(req_id="p", num_prompt_tokens=2, output_token_ids=[5, 6], sampling_params="same")}
    place_seats(known, {"p/seat1": "p", "p": "p"}, {"p": [1, 2, 5], "p/seat1": [1, 2, 5, 9]})
    assert known["p"].output_token_ids == [5] and known["p/seat1"].output_token_ids == [5, 9]
    assert known["p/seat1"].req_id == "p/seat1" and known["p/seat1"].sampling_params == "same"


class OnItsWay(AsyncModelRunnerOutput):
    """An output that the device has yet to give."""

    def get_output(self) -> ModelRunnerOutput:
        return ModelRunnerOutput(["a"], {"a": 0})


def test_verdicts_travel_with_outputs_also_while_those_are_on_their_way() -> None:
    verdicts = {"a": Verdict(())}
    assert verdicts_of(attach_verdicts(ModelRunnerOutput(["a"], {"a": 0}), verdicts)) is verdicts
    assert verdicts_of(attach_verdicts(OnItsWay(), verdicts).get_output()) is verdicts
    assert verdicts_of(attach_verdicts(OnItsWay(), {}).get_output()) == {}
