"""The searches of one worker: each step, all of them decide together over the logits that tokens would be drawn from.

A search's step is a generator (`decoding/search/search.py`). What they want tried passes the model in rounds: in each,
one token after every living sequence of all the searches that want something, in one pass. Decisions become tokens in
the step's rows where a sequence stays in its seat, and verdicts for the scheduler. Every rank comes to the same.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whipstaff.decoding.method import setting_type
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.search.search import Decision, Living, Search, SearchFacts, SearchMethod, Steps, Tried
from whipstaff.server.engine.searches import Placed, SearchStep, Verdict, companion_id
from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.server.engine.worker.logits.inputs import Heads
from whipstaff.server.engine.worker.logits.last_attention import LastAttention
from whipstaff.server.engine.worker.logits.lookahead import Lookahead, NoLookahead
from whipstaff.server.engine.worker.logits.metadata import sent
from whipstaff.server.engine.worker.requests import PlannedRequest, Requests
from whipstaff.server.engine.worker.search.log_probs import LogProbs
from whipstaff.server.engine.worker.search.seats import seated

Copies = list[tuple[str, str]]  # (source, target) requests: what is kept of the first is the second's, too


@dataclass
class Running:
    """One request's search."""

    method: SearchMethod[Any]
    search: Search
    random: torch.Generator
    num_companions: int
    hidden_of: int  # the companion whose hidden states it reads; 0: none, but its own
    tells_facts: bool
    label: str  # of the request, for metrics
    num_tried: int  # tokens that other methods of the request try for each that is computed
    log_probs: LogProbs | None = None  # None: nobody asked
    generated: list[tuple[int, ...]] = field(default_factory=lambda: [()])  # by each living sequence
    counts: Counter[str] = field(default_factory=Counter)
    seats: set[str] = field(default_factory=set)  # sequences that were made for it


class Turn(NamedTuple):
    """One search in one step."""

    running: Running
    step: SearchStep
    rows: list[int]  # of the step, of what lives
    logits: Tensor  # (S, V) float32
    steps: Steps


class SearchCounts(NamedTuple):
    """Since the start."""

    tried: Mapping[str, int] = {}  # tokens, by the label of whose they are
    seconds: float = 0.0  # that decisions took, with what they tried


class Searches:
    """Of one worker."""

    def __init__(
        self,
        requests: Requests,
        heads: Heads,
        lookahead: Lookahead | NoLookahead,
        attention: LastAttention | None,
        device: torch.device,
    ) -> None:
        self.expected: Mapping[str, SearchStep] = {}  # by primary, the searches that take this step
        self.counts, self._tried_by = SearchCounts(), Counter[str]()
        self._requests, self._heads, self._lookahead, self._attention = requests, heads, lookahead, attention
        self._device = device
        self.running: dict[str, Running] = {}  # by primary
        self._verdicts: dict[str, Verdict] = {}
        self._copies: Copies = []

    def decide(self, view: BatchView, hidden: Tensor, logits: Tensor, sampled: Tensor) -> None:
        """Let every search of the step decide, and put its tokens in the place of those that were drawn.

        Args:
            hidden: (B, H) last hidden states.
            logits: (B, V) after penalties.
            sampled: B token ids, changed in place.
        """
        if not self.expected:
            return
        started, row_of = time.perf_counter(), {name: row for row, name in enumerate(view.requests)}
        turns = {
            name: self._turn(name, step, [row_of[seat] for seat in step.living], view, hidden, logits)
            for name, step in self.expected.items()
        }
        self.expected = {}
        told: dict[int, int] = {}
        for name, decision in self._decisions(turns, view).items():
            verdict = self._verdict(turns[name], decision)
            self._verdicts[name] = verdict
            told |= {row_of[one.seat]: one.tokens[0] for one in verdict.living if one.stays}
        if told:
            rows, tokens = sent(list(told.items()), self._device).unbind(1)
            sampled.view(-1)[rows] = tokens.to(sampled.dtype)
        seconds = self.counts.seconds + time.perf_counter() - started
        self.counts = SearchCounts(dict(self._tried_by), seconds)

    def take(self) -> tuple[dict[str, Verdict], Copies]:
        """The verdicts of the last step by primary, and what goes on in other seats, once."""
        found = self._verdicts, self._copies
        self._verdicts, self._copies = {}, []
        return found

    def end(self, request_ids: Iterable[str]) -> list[str]:
        """Forget the searches of finished requests. The sequences that were made for them."""
        return [seat for name in request_ids for seat in self._end(name)]

    def _end(self, name: str) -> set[str]:
        running = self.running.pop(name, None)
        return running.seats if running is not None else set()

    # -- one step ----------------------------------------------------------------------------------------------------

    def _turn(
        self, name: str, step: SearchStep, rows: list[int], view: BatchView, hidden: Tensor, logits: Tensor
    ) -> Turn:
        running = self.running.get(name)
        if running is None:
            running = self.running[name] = self._start(self._requests[name], step)
        self._count_tried(running, len(rows) * running.num_tried)
        needs, here = running.method.needs, sent(rows, self._device)
        read = rows
        if running.hidden_of:
            read = [view.companions[row][running.hidden_of - 1] for row in rows]
        living = Living(
            running.generated,
            logits[here].to(torch.float32),
            hidden[sent(read, self._device)].to(torch.float32) if "hidden" in needs else None,
            self._last_attention(view, rows) if "attention" in needs else None,
            running.random,
        )
        steps = _last_step(running.search, living) if step.is_last else running.search.step(living)
        return Turn(running, step, rows, living.logits, steps)

    def _count_tried(self, running: Running, num: int) -> None:
        if num:
            running.counts["tried"] += num
            self._tried_by[running.label] += num

    def _last_attention(self, view: BatchView, rows: Sequence[int]) -> Tensor:
        assert self._attention is not None, "a search reads attention, and this worker keeps none"
        return self._attention.rows(view, rows)

    def _start(self, request: PlannedRequest, step: SearchStep) -> Running:
        state, plan = request.decoding, request.placed.plan
        assert state is not None and plan.decoding is not None and plan.decoding.search is not None
        asked, method = plan.decoding.search, METHODS[plan.decoding.search.method]
        assert isinstance(method, SearchMethod)
        heads = {name: self._heads(digest) for name, digest in zip(method.head_fields, asked.heads, strict=True)}
        facts = SearchFacts(request.placed.prompt_len, step.max_tokens, state.ends, heads, step.room)
        setting = setting_type(method).model_validate_json(asked.setting)
        random = torch.Generator().manual_seed(state.seed & 0x7FFFFFFFFFFFFFFF)
        tells_facts = plan.decoding.explain is not None
        log_probs = None if asked.logprobs is None else LogProbs(asked.logprobs, state.ends)
        search, num = method.start(setting, facts), len(plan.companions)
        own = tells_facts, plan.label, plan.decoding.num_tried, log_probs
        return Running(method, search, random, num, asked.hidden_of, *own)

    def _decisions(self, turns: Mapping[str, Turn], view: BatchView) -> dict[str, Decision]:
        """Run the searches' steps to their ends, trying what they want tried in common passes."""
        decided: dict[str, Decision] = {}
        answers: dict[str, Tried | None] = dict.fromkeys(turns)
        try_: dict[tuple[str, ...], Callable[[Tensor], Tried]] = {}  # by who tries
        while answers:
            wanted: dict[str, Tensor] = {}
            for name, answer in answers.items():
                steps = turns[name].steps
                try:
                    wanted[name] = next(steps) if answer is None else steps.send(answer)
                except StopIteration as stopped:
                    decided[name] = stopped.value
            answers = dict(self._tried(turns, wanted, view, try_)) if wanted else {}
        return decided

    def _tried(
        self,
        turns: Mapping[str, Turn],
        wanted: Mapping[str, Tensor],
        view: BatchView,
        prepared: dict[tuple[str, ...], Callable[[Tensor], Tried]],
    ) -> Iterable[tuple[str, Tried]]:
        names = tuple(wanted)
        rows = [row for name in names for row in turns[name].rows]
        reads = {name: "attention" in turns[name].running.method.needs for name in names}
        ends = view.positions[rows] + view.starts[1:][rows] - view.starts[:-1][rows] - 1
        if names not in prepared:
            after = self._lookahead.after(view, rows, ends, any(reads.values()))
            assert after is not None, "a search tries tokens, and this worker sets no place apart for them"
            prepared[names] = after
        found = prepared[names](torch.cat([wanted[name].to(self._device) for name in names]))
        first = 0
        for name in names:
            num = len(turns[name].rows)
            own = slice(first, first := first + num)
            self._count_tried(turns[name].running, num)
            attention = found.attention
            if attention is not None:
                attention = attention[own, : int(ends[own].max()) + 2] if reads[name] else None
            yield name, Tried(found.hidden[own].to(torch.float32), attention)

    def _verdict(self, turn: Turn, decision: Decision) -> Verdict:
        running = turn.running
        running.counts.update({name: num for name, num in decision.counts.items() if name != "tried"})
        facts = decision.facts if running.tells_facts else {}
        said = () if running.log_probs is None else running.log_probs.note(turn.logits, running.generated, decision)
        if decision.hypotheses:
            return Verdict((), 0, tuple(decision.hypotheses), dict(running.counts), facts, said)
        assert decision.living, "a search came to nothing"
        placed = seated(decision.living, list(map(len, running.generated)), turn.step)
        for one in placed:
            if one.seat != one.source:
                self._copy(running, one)
        running.generated = [(*running.generated[one.source][: one.keep], *one.tokens) for one in decision.living]
        return Verdict(tuple(placed), decision.settled, (), dict(running.counts), facts, said)

    def _copy(self, running: Running, one: Placed) -> None:
        """What is kept of a sequence and its companions goes on in another seat, too."""
        indices = range(1, running.num_companions + 1)
        sources, targets = ([lead, *(companion_id(lead, i) for i in indices)] for lead in (one.source, one.seat))
        running.seats |= set(targets)
        self._copies += zip(sources, targets, strict=True)


def _last_step(search: Search, living: Living) -> Steps:
    """The step of a search that has to end now."""
    return search.stop(living)
    yield  # nothing is tried
