"""A scheduler of ours without a model: what a model runner would do is made up, and traffic is random."""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from modes import async_on_cpu
from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from whipstaff.server.engine.frontend.launch import Setup, configure
from whipstaff.server.engine.scheduler.scheduler import AsyncSteeredScheduler, SteeredScheduler
from whipstaff.server.engine.step_notes import CacheUse, GroupUse, SlotUse, StepNotes
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, RequestPlan
from whipstaff.steering.plan import Edit, PlannedEdit, SteeringPlan
from whipstaff.steering.where import Where

BLOCK, MAX_LEN = 16, 128
STOP = 7


@dataclass
class Case:
    """An engine's size and the way it runs."""

    is_async: bool = False
    uses_v2: bool = False
    policy: str = "fcfs"
    num_blocks: int = 20
    max_num_seqs: int = 6
    budget: int = 48
    threshold: int = 0
    num_slots: int = 2
    caches: bool = True
    looks_ahead: bool = False
    num_drafts: int = 0


CASES = {
    "sync": Case(),
    "async": Case(is_async=True),
    "v2": Case(is_async=True, uses_v2=True),
    "priority": Case(is_async=True, policy="priority"),
    "sync_priority": Case(policy="priority", num_blocks=14),
    "starved": Case(num_blocks=12, max_num_seqs=4, budget=8),
    "starved_async": Case(is_async=True, num_blocks=12, max_num_seqs=5, budget=8, caches=False),
    "thresholds": Case(is_async=True, threshold=5, budget=64, max_num_seqs=12),
    "ahead": Case(is_async=True, num_blocks=14, looks_ahead=True),
    "drafts": Case(num_blocks=14, num_drafts=3),
    "starved_drafts": Case(num_blocks=12, max_num_seqs=4, budget=8, num_drafts=5),
    "starved_ahead": Case(num_blocks=12, max_num_seqs=4, budget=8, looks_ahead=True),
}


def scheduler(model: str, case: Case) -> Any:
    args = AsyncEngineArgs(
        model=model,
        skip_tokenizer_init=True,
        max_model_len=MAX_LEN,
        block_size=BLOCK,
        max_num_seqs=case.max_num_seqs,
        max_num_batched_tokens=case.budget,
        long_prefill_token_threshold=case.threshold,
        scheduling_policy=case.policy,
        enable_prefix_caching=case.caches,
        enforce_eager=True,
        speculative_config={"method": "ngram", "num_speculative_tokens": case.num_drafts} if case.num_drafts else None,
    )
    with async_on_cpu():
        config = args.create_engine_config()
    config.scheduler_config.async_scheduling = case.is_async
    configure(config, Setup(num_slots=case.num_slots, lookahead=case.looks_ahead))
    config.cache_config.num_gpu_blocks = case.num_blocks
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cls = AsyncSteeredScheduler if case.is_async else SteeredScheduler
    made = cls(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(case.num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        structured_output_manager=StructuredOutputManager(config),
        block_size=BLOCK,
        log_stats=True,
    )
    made.use_v2_model_runner = case.uses_v2
    return made


def notes_of(output: Any) -> StepNotes:
    """What comes with a step, as a worker takes it that had not heard of any group."""
    told: StepNotes = getattr(output, "whipstaff_notes", StepNotes({}, SlotUse(), GroupUse(), CacheUse({}, {})))
    return told


@dataclass
class Worker:
    """What a model runner would do: it knows tokens as the scheduler tells them, and makes one up where it samples.

    The token after n generated ones is a function of the group and n; it stands in for the model.
    """

    scheduler: Any
    known: dict[str, int] = field(default_factory=dict)  # tokens that the worker believes a sequence to have

    def run(self, output: Any) -> ModelRunnerOutput:
        for new in output.scheduled_new_reqs:
            tokens = new.prefill_token_ids if self.scheduler.use_v2_model_runner else new.prompt_token_ids
            self.known[new.req_id] = len(tokens)
        cached = output.scheduled_cached_reqs
        computed = {new.req_id: new.num_computed_tokens for new in output.scheduled_new_reqs}
        computed |= dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
        for name in cached.resumed_req_ids:
            self.known[name] = len(cached.all_token_ids[name])
        names = list(output.num_scheduled_tokens)
        assert set(names) == set(computed)
        sampled: list[list[int]] = []
        steps = notes_of(output).groups
        together = {name for primary, others in steps.items() for name in (primary, *others) if name}
        for name in names:
            end = computed[name] + output.num_scheduled_tokens[name]
            assert end <= self.known[name] + len(output.scheduled_spec_decode_tokens.get(name, ()))
            drafts = output.scheduled_spec_decode_tokens.get(name, [])
            samples = end - len(drafts) == self.known[name]
            (blocks,) = self.scheduler.kv_cache_manager.get_block_ids(name)
            assert len(blocks) * BLOCK >= end + self.scheduler.num_lookahead_tokens, f"{name} has nowhere to try tokens"
            is_member = "/" in name or self.scheduler.requests[name].sampling_params.extra_args
            if is_member and name in self.scheduler._group_of:
                assert samples == (name in together), f"{name} samples alone"
                assert not drafts, f"{name} takes drafts"
            sampled.append(list(self.verified(name, drafts)) if samples else [])
            self.known[name] += len(sampled[-1])
        return ModelRunnerOutput(
            names,
            {name: row for row, name in enumerate(names)},
            sampled,
            prompt_logprobs_dict={},
            prompt_token_id_logprobs_dict={},
        )

    def verified(self, name: str, drafts: list[int]) -> Iterator[int]:
        """The tokens that come next: as many as were drafted right, and one."""
        num = self.known[name] - self.prompt_len(name)
        for index, draft in enumerate([*drafts, None]):
            yield (right := token(name, num + index))
            if draft != right:
                return

    def drafts(self, sampled: ModelRunnerOutput, chance: random.Random, most: int) -> DraftTokenIds:
        """For everybody who has sampled, some of them right."""
        known = [name for name, tokens in zip(sampled.req_ids, sampled.sampled_token_ids, strict=True) if tokens]
        known = [name for name in known if name in self.scheduler.requests]
        found = []
        for name in known:
            next_ones = range(self.known[name] - self.prompt_len(name), 1 << 20)[: chance.randint(0, most)]
            found.append([token(name, index) if chance.random() < 0.7 else 301 for index in next_ones])
        return DraftTokenIds(known, found)

    def prompt_len(self, name: str) -> int:
        return int(self.scheduler.requests[name].num_prompt_tokens)


def token(name: str, index: int) -> int:
    return random.Random(f"{name.split('/')[0]} {index}").randrange(300)


@dataclass
class Asked:
    request: Request
    num_members: int
    got: list[int] = field(default_factory=list)
    end: Any = None


class Traffic:
    """Drives a scheduler as the engine core does: one step at a time, or with one more in flight."""

    def __init__(self, model: str, case: Case, seed: int) -> None:
        self.case, self.chance = case, random.Random(seed)
        self.scheduler = scheduler(model, case)
        self.worker = Worker(self.scheduler)
        self.asked: dict[str, Asked] = {}
        self.names = map(str, count())
        self.in_flight: deque[tuple[Any, ModelRunnerOutput]] = deque()
        self.num_together = self.num_drafted = 0
        init_none_hash(get_hash_fn_by_name("sha256"))
        self.hasher = get_request_block_hasher(BLOCK, get_hash_fn_by_name("sha256")) if case.caches else None
        self.stem = self.chance.choices(range(300), k=BLOCK * 3 + 1)

    def prompt(self) -> list[int]:
        kind = self.chance.random()
        if kind < 0.15:
            return [self.chance.randrange(300)]
        if kind < 0.5:
            return self.stem[: self.chance.choice((1, 16, 17, 32, 33, 40, 49))]
        return self.chance.choices(range(300), k=self.chance.randint(1, 60 if kind < 0.95 else MAX_LEN - 31))

    def plan(self, members: int) -> dict[str, Any] | None:
        edit = SteeringPlan((PlannedEdit(Edit("v", str(self.chance.randrange(3)), None), Where.of("all")),))
        mine = edit if self.chance.random() < 0.3 else None
        theirs = tuple(
            CompanionPlan(
                tuple(self.prompt()),
                edit if self.chance.random() < 0.2 else None,
                self.chance.choice((None, None, 1, 4)),
            )
            for _ in range(members)
        )
        return {PLAN_KEY: RequestPlan(mine, companions=theirs).to_wire()} if mine or theirs else None

    def add(
        self, members: int, max_tokens: int | None = None, prompt: list[int] | None = None, **sampling: Any
    ) -> Asked:
        name = next(self.names)
        bad_words = sampling.pop("bad_words", None)
        params = SamplingParams(
            max_tokens=max_tokens or self.chance.randint(1, 30),
            extra_args=self.plan(members),
            temperature=sampling.pop("temperature", 0),
            stop_token_ids=[STOP],
            **sampling,
        )
        params._bad_words_token_ids = bad_words
        request = Request(
            name,
            prompt or self.prompt(),
            params,
            None,
            priority=self.chance.randrange(3) if self.case.policy == "priority" else 0,
            block_hasher=self.hasher,
        )
        self.asked[name] = asked = Asked(request, members)
        self.scheduler.add_request(request)
        return asked

    def step(self) -> None:
        if self.scheduler.has_requests():
            output = self.scheduler.schedule()
            self.in_flight.append((output, self.worker.run(output)))
            self.num_together += len(notes_of(output).groups)
            if len(self.in_flight) <= self.case.is_async and (
                output.num_scheduled_tokens or self.scheduler.has_requests()
            ):
                return
        if self.in_flight:
            self.update()

    def update(self) -> None:
        step = self.in_flight.popleft()
        told = self.scheduler.update_from_output(*step)
        if self.case.num_drafts:
            drafted = self.worker.drafts(step[1], self.chance, self.case.num_drafts)
            self.num_drafted += sum(map(len, drafted.draft_token_ids))
            self.scheduler.update_draft_token_ids(drafted)
        for client, outputs in told.items():
            assert client == 0
            for one in outputs.outputs:
                assert "/" not in one.request_id
                asked = self.asked[one.request_id]
                asked.got += one.new_token_ids
                asked.end = one.finish_reason
        for name, asked in self.asked.items():
            if asked.end is None and name in self.scheduler.requests:
                members = [r for n, r in self.scheduler.requests.items() if n.split("/")[0] == name]
                assert len({r.num_output_tokens for r in members}) == 1

    def disturb(self) -> None:
        kind = self.chance.random()
        if kind < 0.02:
            running = [name for name, asked in self.asked.items() if asked.end is None]
            for name in self.chance.sample(running, min(2, len(running))):
                finished = self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
                assert [r.request_id for r in finished] == [name]
                self.asked[name].end = "aborted"
        elif kind < 0.03:
            self.scheduler.reset_prefix_cache(reset_running_requests=True)
        elif kind < 0.05:
            self.scheduler.set_pause_state(self.chance.choice(list(PauseState)))
        elif kind < 0.5:
            self.scheduler.set_pause_state(PauseState.UNPAUSED)

    def cut(self) -> None:
        """Everybody, as an engine does that ends."""
        running = {name for name, asked in self.asked.items() if asked.end is None}
        finished = self.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        assert {request.request_id for request in finished} == running  # what vLLM tells clients of
        for name in running:
            self.asked[name].end = "aborted"

    def drain(self) -> None:
        self.scheduler.set_pause_state(PauseState.UNPAUSED)
        for _ in range(6000):
            if not self.scheduler.has_requests() and not self.in_flight:
                return
            self.step()
        raise AssertionError(f"nothing moves: {self.scheduler.get_request_counts()}")

    def check(self) -> None:
        s = self.scheduler
        pool = s.kv_cache_manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        assert not s.requests and not s.running and not s.waiting and not s._held
        assert not s._held_since
        assert not s._groups and not s._group_of and not s._ended and not s._placed
        assert s._slots.num_used == 0 and not s._slots._rows
        assert s._half_scheduled == 0 and s._steps_together == self.num_together
        for name, asked in self.asked.items():
            assert asked.got == [token(name, index) for index in range(len(asked.got))]
            if str(asked.end) == "stop":
                assert asked.got[-1] == STOP and STOP not in asked.got[:-1]
            elif str(asked.end) == "error":  # it could never run
                plan = RequestPlan.from_wire(asked.request.sampling_params.extra_args)
                assert plan is not None and not asked.got
                lengths = [asked.request.num_prompt_tokens, *(len(member.prompt) for member in plan.companions)]
                too_long = sum(-(-(length + 1) // BLOCK) for length in lengths) >= self.case.num_blocks
                assert too_long or len(lengths) > self.case.max_num_seqs
            elif asked.end != "aborted":
                assert str(asked.end) == "length"
                assert len(asked.got) == asked.request.max_tokens and STOP not in asked.got[:-1]
                assert (asked.request.stop_reason is None) == (
                    len(asked.got) == asked.request.sampling_params.max_tokens
                )
