"""Searches in the scheduler alone: sequences fork, die, shrink and move at random among plain and grouped traffic.

The worker here keeps what a model runner would: each sequence's tokens as it was told, and in every place of every
block the text whose keys and values stand there. Every token that is computed reads all places before it, so a block
that was shared wrongly, overwritten, copied too late or freed too early shows.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import tiny
from scheduling import BLOCK, CASES, Asked, Case, Traffic, notes_of, token
from vllm import SamplingParams
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from whipstaff.decoding.plan import DecodingPlan, SearchPlan
from whipstaff.decoding.search.search import Continuation, Hypothesis
from whipstaff.server.engine.scheduler.block_keys import key_blocks
from whipstaff.server.engine.scheduler.group import SearchGroup
from whipstaff.server.engine.searches import Placed, SearchStep, Verdict
from whipstaff.server.engine.worker.search.seats import seated
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, PositionedPlan, RequestPlan
from whipstaff.steering.plan import Edit, PlannedEdit, SteeringPlan
from whipstaff.steering.where import Where

BUDGET = 60  # tokens that some searches may compute
Text = tuple[Any, ...]  # what steers it, then tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save("llama", Path(tmp_path_factory.mktemp("llama")))


class Sequences:
    """What a model runner knows of one sequence."""

    def __init__(self, prompt: Sequence[int], generated: Sequence[int], blocks: Sequence[int], tag: str = "") -> None:
        self.prompt, self.generated, self.blocks, self.tag = list(prompt), list(generated), list(blocks), tag

    def __len__(self) -> int:
        return len(self.prompt) + len(self.generated)

    def text(self, num: int) -> Text:
        return (self.tag, *[*self.prompt, *self.generated][:num])


class Runner:
    """Stands in for a model runner, and for the methods that decide."""

    def __init__(self, traffic: "Searching") -> None:
        self.traffic, self.scheduler, self.chance = traffic, traffic.scheduler, traffic.chance
        self.known: dict[str, Sequences] = {}
        self.written: dict[tuple[int, int], Text] = {}  # (block, place in it) -> the text up to there
        self.searches: dict[str, list[Text]] = {}  # primary -> what lives, in order
        self.locked: dict[str, int] = {}  # tokens that were said to be settled
        self.num_computed = self.num_wanted = self.num_copies = self.most_copies = 0
        self.shared: dict[str, list[int]] = {}  # what has to be the first blocks of sequences in their next step
        self.decided: dict[str, deque[Text]] = defaultdict(deque)  # what lived first after each decision
        self.seen: set[str] = set()

    def run(self, output: Any) -> ModelRunnerOutput:
        computed = self.learn(output)
        copies = list(output.kv_cache_block_copies or ())
        self.num_copies += len(copies)
        assert len({target for _, target in copies}) == len(copies)
        for name in self.shared.keys() & computed.keys():
            blocks = self.shared.pop(name)
            if self.traffic.is_alone:
                assert self.known[name].blocks[: len(blocks)] == blocks, f"{name} does not share what it keeps"
        for source, target in copies:
            for place in range(BLOCK):
                self.written[target, place] = self.written.get((source, place), ())
        notes, names, sampled = notes_of(output), list(output.num_scheduled_tokens), []
        assert set(names) == set(computed)
        pairs = notes.groups.items()
        lead_of = {name: lead for lead, others in pairs for name in (lead, *others) if name}
        verdicts = {}
        for name in names:
            one, end = self.known[name], computed[name] + output.num_scheduled_tokens[name]
            self.feed(one, computed[name], end)
            assert end <= len(one)
            samples = end == len(one)
            if name in self.scheduler._group_of:
                assert samples == (name in lead_of), f"{name} samples alone"
            sampled.append([token(name, len(one.generated))] if samples else [])
        for primary, step in notes.searches.items():
            verdicts[primary] = verdict = self.decide(primary, step)
            for placed in verdict.living:
                if placed.stays:
                    sampled[names.index(placed.seat)] = list(placed.tokens)
        for name, new in zip(names, sampled, strict=True):
            lead = lead_of.get(name, name)
            if (new and "seat" in lead) or lead in notes.searches:
                new = sampled[names.index(lead)]
            self.known[name].generated += new
        made = ModelRunnerOutput(
            names,
            {name: row for row, name in enumerate(names)},
            sampled,
            prompt_logprobs_dict={},
            prompt_token_id_logprobs_dict={},
        )
        made.whipstaff_verdicts = verdicts
        return made

    def learn(self, output: Any) -> dict[str, int]:
        """Take in what the scheduler tells. Tokens that are computed already, by name."""
        v2, notes, cached = self.scheduler.use_v2_model_runner, notes_of(output), output.scheduled_cached_reqs
        gone = set(output.finished_req_ids) | (set(output.preempted_req_ids or ()) if v2 else set())
        for name in gone:
            self.known.pop(name, None)
        for name in output.finished_req_ids:
            self.searches.pop(name, None)
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for new in output.scheduled_new_reqs:
            tokens, num = new.prompt_token_ids, len(new.prompt_token_ids)
            after = new.prefill_token_ids[num:] if v2 else ()
            plan = RequestPlan.from_wire(new.sampling_params.extra_args)
            self.known[new.req_id] = Sequences(tokens, after, new.block_ids[0], repr(plan and plan.steering))
        for name, origin in notes.seats.items():
            self.known.setdefault(name, Sequences(self.known[origin].prompt, (), (), self.known[origin].tag))
            one = self.known[name]
            one.generated = cached.all_token_ids[name][len(one.prompt) :]
        for name, blocks, num in zip(cached.req_ids, cached.new_block_ids, cached.num_output_tokens, strict=True):
            one = self.known[name]
            del one.generated[num:]
            if name in cached.resumed_req_ids:
                one.blocks = list(blocks[0])
                if self.traffic.case.is_async and num:
                    one.generated = cached.all_token_ids[name][-num:]
            elif blocks is not None:
                one.blocks += blocks[0]
        most = self.scheduler.scheduler_config.max_num_seqs
        if v2:
            assert len(self.known) <= most, "more sequences than Model Runner V2 has room for"
        return computed

    def feed(self, one: Sequences, start: int, end: int) -> None:
        """Compute tokens: each reads all before it, and is written."""
        assert len(one.blocks) * BLOCK >= end + self.scheduler.num_lookahead_tokens
        for position in range(end):
            cell, text = (one.blocks[position // BLOCK], position % BLOCK), one.text(position + 1)
            if position >= start:
                self.written[cell] = text
            assert self.written.get(cell) == text, f"position {position} holds another text"
        self.num_computed += end - start

    def decide(self, primary: str, step: SearchStep) -> Verdict:
        texts = self.searches.setdefault(primary, [()])
        assert len(texts) == len(step.living)
        for seat, text in zip(step.living, texts, strict=True):
            assert tuple(self.known[seat].generated) == text, f"{seat} was told other tokens"
            assert self.known[seat].prompt == self.known[primary].prompt
        if step.is_last:
            assert all(texts)
            self.searches[primary] = []
            self.seen.add("budget")
            return Verdict((), hypotheses=tuple(Hypothesis(text, 0.0, "length") for text in texts), counts={"tried": 3})
        longest = max(map(len, texts))
        if longest >= step.room or self.chance.random() < 0.02:
            ended = longest >= step.room
            best = max(texts, key=len)
            reason: Literal["length", "stop"] = "length" if ended else "stop"
            self.searches[primary] = []
            last = self.chance.randrange(300)
            hypotheses = tuple(Hypothesis((*text, last), 0.0, reason) for text in (best, *texts[1:]))
            self.seen.add("end")
            return Verdict((), hypotheses=hypotheses, counts={"tried": 3})
        living, after = [], []
        for _ in range(self.chance.choice((1, len(texts), len(step.seats), len(step.seats)))):
            one = self.continuation(texts, self.locked.get(primary, 0), min(step.max_tokens + 5, step.room))
            living.append(one)
            after.append((*texts[one.source][: one.keep], *one.tokens))
        common = next((i for i, row in enumerate(zip(*after, strict=False)) if len(set(row)) > 1), min(map(len, after)))
        settled = self.locked[primary] = self.chance.randint(self.locked.get(primary, 0), common)
        placed = seated(living, [len(text) for text in texts], step)
        assert len({one.seat for one in placed}) == len(placed) and step.seats[0] in {one.seat for one in placed}
        self.expect(
            placed,
            [1 + sum(one.source == other.source for other in living[:index]) for index, one in enumerate(living)],
        )
        self.searches[primary] = after
        self.decided[primary].append(after[0])
        return Verdict(tuple(placed), settled, counts={"tried": 3})

    def expect(self, placed: Sequence[Placed], ranks: Sequence[int]) -> None:
        """What the next step may take: of every sequence its new tokens, or its last one again; full blocks of what is
        kept are those of the sequence that it goes on from, and of all that go on from one, one needs no copy."""
        for one, rank in zip(placed, ranks, strict=True):
            source = self.known[one.source]
            num, is_rollback = len(source.prompt) + one.keep, one.keep < len(source.generated)
            self.num_wanted += max(len(one.tokens), 1)
            self.most_copies += rank > 1 or is_rollback or not one.tokens
            self.shared[one.seat] = source.blocks[: (num if one.tokens else num - 1) // BLOCK]

    def continuation(self, texts: list[Text], locked: int, most: int) -> Continuation:
        source = self.chance.randrange(len(texts))
        keep, kind = len(texts[source]), self.chance.random()
        if kind < 0.15:
            keep = self.chance.randint(locked, keep)
            self.seen.add("rollback")
        if 0.1 < kind < 0.2 and keep > locked:
            return Continuation(source, keep, ())
        num = self.chance.choice((1, 1, 1, 1, 2, 20)) if kind < 0.3 else 1
        return Continuation(source, keep, tuple(self.chance.choices(range(300), k=max(1, min(num, most - keep)))))


def _companions(request: Request) -> tuple[CompanionPlan, ...]:
    plan = RequestPlan.from_wire(request.sampling_params.extra_args)
    return plan.companions if plan is not None else ()


class Searching(Traffic):
    """Traffic some of which searches."""

    def __init__(self, model: str, case: Case, seed: int) -> None:
        super().__init__(model, case, seed)
        self.scheduler._max_search_seqs = max(case.max_num_seqs - 1, 1)
        self.worker: Any = Runner(self)
        self.searchers: dict[str, int] = {}
        self.is_alone = False  # whether nothing but searches without companions runs, with room for all
        self.drafts: list[Text] = []  # that were told

    def search(self, num_seats: int, companions: int = 0, prompt: list[int] | None = None, **asked: Any) -> Asked:
        name, budget = next(self.names), self.chance.choice((None, None, BUDGET))
        drafts = self.chance.random() < 0.5
        edit = SteeringPlan((PlannedEdit(Edit("v", str(self.chance.randrange(3)), None), Where.of("all")),))
        plan = RequestPlan(
            edit if self.chance.random() < 0.3 else None,
            DecodingPlan(search=SearchPlan("none", "{}", num_seats, (), (), asked.get("max_time"), budget, drafts)),
            companions=tuple(CompanionPlan(tuple(self.prompt())) for _ in range(companions)),
            label=f"of {num_seats}",
        )
        params = SamplingParams(
            max_tokens=asked.get("max_tokens") or self.chance.randint(1, 40),
            temperature=0,
            extra_args={PLAN_KEY: plan.to_wire()},
        )
        request = Request(name, prompt or self.prompt(), params, None, block_hasher=self.hasher)
        self.asked[name] = asked_for = Asked(request, companions)
        self.searchers[name] = num_seats * (1 + companions)
        self.scheduler.add_request(request)
        return asked_for

    def update(self) -> None:
        output, made = self.in_flight.popleft()
        for client, outputs in self.scheduler.update_from_output(output, made).items():
            assert client == 0
            for one in outputs.outputs:
                asked = self.asked[one.request_id]
                asked.got += one.new_token_ids
                asked.end = one.finish_reason
                told = getattr(made, "whipstaff_explanations", {}).get(one.request_id)
                assert told is None or (one.kv_transfer_params or {})["whipstaff"] is told
                if told is not None and "draft" in told:
                    assert told["draft"]["settled"] == len(asked.got)
                    self.drafts.append((*asked.got, *told["draft"]["tokens"]))
                    assert self.drafts[-1] == self.worker.decided[one.request_id].popleft()
                is_searched = one.request_id in self.searchers and str(asked.end) not in ("error", "abort")
                if is_searched:
                    assert told is not None
                    self.check_record(told["search"], asked)
        pool = self.scheduler.kv_cache_manager.block_pool
        held: dict[int, int] = {}
        (manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        pending = [block for pair in manager._pending_cow_copies for block in pair]
        for blocks in (*manager.req_to_blocks.values(), pending):
            for block in blocks:
                held[block.block_id] = held.get(block.block_id, 0) + 1
        assert all(block.ref_cnt == held.get(block.block_id, 0) for block in pool.blocks if not block.is_null)
        groups = self.scheduler._groups.values()
        living = [group for group in groups if isinstance(group, SearchGroup) and group.num_running]
        if self.case.caches:
            for member in (one for group in living for one in group.members):
                assert member.block_hashes == self.keys(member), f"{member.request_id}: keys of another text"
        assert sum(group.num_seats for group in living) <= self.scheduler._max_search_seqs

    def check_record(self, record: dict[str, Any], asked: Asked) -> None:
        """What goes with tokens says what was computed for them; with the last ones, what the answers are."""
        before = getattr(asked, "record", {"counts": {"tokens_computed": 0}})
        assert record["counts"]["tried"] == 3
        assert record["counts"]["tokens_computed"] >= before["counts"]["tokens_computed"]
        assert ("hypotheses" in record) == (asked.end is not None)
        if asked.end is not None:
            assert asked.got == record["hypotheses"][0]["tokens"]
            self.check_budget(record, asked)
        asked.record = record  # type: ignore[attr-defined]

    def check_budget(self, record: dict[str, Any], asked: Asked) -> None:
        """A search ends with the step in which it has computed what it may."""
        plan, ended_by = RequestPlan.from_wire(asked.request.sampling_params.extra_args), record.get("ended_by")
        assert plan is not None and plan.decoding is not None and plan.decoding.search is not None
        most, num = plan.decoding.search.max_computed_tokens, record["counts"]["tokens_computed"]
        if ended_by != "max_time":
            assert ended_by == (None if most is None or num + 3 < most else "max_computed_tokens"), (most, num)
        assert ended_by is None or asked.request.stop_reason == ended_by

    def keys(self, member: Request) -> list[bytes]:
        """Of the blocks of a sequence, as a new request with the same text has them."""
        fresh = Request("fresh", list(member._all_token_ids), member.sampling_params, None, block_hasher=self.hasher)
        plan = RequestPlan.from_wire(member.sampling_params.extra_args)
        if plan is not None:
            key_blocks(fresh, PositionedPlan(plan, member.num_prompt_tokens), BLOCK)
        return fresh.block_hashes

    def check(self) -> None:
        s = self.scheduler
        pool = s.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not s.requests and not s.running and not s.waiting and not s._held and not s._moved
        assert not s._groups and not s._group_of and not s._ended and not s._placed
        most = sum(asked.request.num_prompt_tokens for asked in self.asked.values()) + sum(
            len(one.prompt) for asked in self.asked.values() for one in _companions(asked.request)
        )
        assert sum(s._cache_use.queries.values()) <= most  # a sequence that goes on from another looks for nothing
        for name, asked in self.asked.items():
            assert asked.end is not None
            if name in self.searchers and str(asked.end) == "error":
                assert not asked.got
            elif name in self.searchers and asked.end != "aborted":
                assert asked.record["hypotheses"]  # type: ignore[attr-defined]


SEARCH_CASES = {
    **{name: case for name, case in CASES.items() if not case.num_drafts},  # `Runner` verifies none
    "roomy": Case(num_blocks=200, max_num_seqs=24, budget=256),
    "roomy_async": Case(is_async=True, num_blocks=200, max_num_seqs=24, budget=256),
    "roomy_v2": Case(is_async=True, uses_v2=True, num_blocks=200, max_num_seqs=24, budget=256, looks_ahead=True),
    "v2_sync": Case(uses_v2=True, num_blocks=40, max_num_seqs=10),
    "uncached": Case(num_blocks=60, max_num_seqs=12, budget=96, caches=False),
}


@pytest.mark.parametrize("case", SEARCH_CASES.values(), ids=SEARCH_CASES)
@pytest.mark.parametrize("seed", range(3))
def test_random_searches(model: str, case: Case, seed: int) -> None:
    traffic = Searching(model, case, seed)
    for _ in range(300):
        chance = traffic.chance.random()
        if chance < 0.12:
            traffic.add(traffic.chance.choice((0, 0, 1, 2)))
        elif chance < 0.25:
            traffic.search(traffic.chance.choice((1, 2, 3, 5)), traffic.chance.choice((0, 0, 0, 1)))
        traffic.step()
        traffic.disturb()
    traffic.drain()
    traffic.check()
    assert len(traffic.drafts) > 20
    assert len(traffic.searchers) > 20 and traffic.worker.seen >= {"rollback", "end"}
    assert not traffic.worker.known or not traffic.scheduler.has_requests()


@pytest.mark.parametrize("case", ["sync", "starved_async", "roomy_v2"])
def test_an_engine_that_ends_cuts_off_whoever_there_is(model: str, case: str) -> None:
    """And says so of nobody whom no client has asked for: vLLM has no way to such a client, and would die of it."""
    traffic = Searching(model, SEARCH_CASES[case], 0)
    for number in range(240):
        if number % 6 == 0:
            traffic.add(traffic.chance.choice((0, 1, 2)))
            traffic.search(traffic.chance.choice((1, 2, 3)), traffic.chance.choice((0, 1)))
        traffic.step()
        if number % 60 == 59:
            traffic.cut()
            traffic.drain()
            traffic.check()
    assert len(traffic.searchers) == 40


@pytest.mark.parametrize("case", ["roomy", "roomy_async", "roomy_v2"])
def test_what_is_kept_is_shared_and_computed_once(model: str, case: str) -> None:
    """A fork shares full blocks by reference and copies at most one; what the worker computes are prompts and what was
    new, to the token."""
    traffic = Searching(model, replace(SEARCH_CASES[case], caches=False, num_blocks=2000), 5)
    traffic.is_alone = True
    for _ in range(200):
        if len(traffic.scheduler.requests) < 12 and traffic.chance.random() < 0.3:
            prompt = [*traffic.prompt(), 0]  # groups compute a prompt of one token twice
            traffic.search(traffic.chance.choice((1, 2, 3, 5)), prompt=prompt)
        traffic.step()
    traffic.drain()
    traffic.check()
    worker, use = traffic.worker, traffic.scheduler.search_use()
    prompts = sum(asked.request.num_prompt_tokens for asked in traffic.asked.values())
    assert len(traffic.searchers) > 10 and worker.seen >= {"rollback", "end"} and use.recomputed_tokens == 0
    assert worker.num_computed - prompts == worker.num_wanted == sum(use.computed.values())
    records = [asked.record["counts"] for asked in traffic.asked.values()]  # type: ignore[attr-defined]
    assert sum(use.computed.values()) == sum(one["tokens_computed"] for one in records)
    assert set(use.computed) == {f"of {num}" for num in traffic.searchers.values()}
    assert 0 < worker.num_copies == use.copied_blocks <= worker.most_copies


@pytest.mark.parametrize("case", ["roomy", "roomy_async", "roomy_v2"])
def test_a_search_whose_time_is_over_ends_with_its_next_step(model: str, case: str) -> None:
    """And takes one, so that there is an answer, however late it is."""
    traffic = Searching(model, SEARCH_CASES[case], 0)
    late, early = traffic.search(3, max_time=1e-9), traffic.search(3, max_time=1e6, max_tokens=5)
    traffic.drain()
    assert late.record["ended_by"] == late.request.stop_reason == "max_time"  # type: ignore[attr-defined]
    assert str(late.end) == "length" and len(late.got) <= 20 and early.record.get("ended_by") != "max_time"  # type: ignore[attr-defined]
