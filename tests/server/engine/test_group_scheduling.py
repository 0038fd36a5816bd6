"""Groups in the scheduler alone: random arrivals, aborts, pauses and resets, with blocks and seats for a fraction."""

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import tiny
import torch
from scheduling import CASES, STOP, Case, Traffic, Worker, notes_of, token
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import RequestStatus

from whipstaff.decoding.plan import DecodingPlan, Rewrite
from whipstaff.server.engine.scheduler.bans import NO_TOKEN_LEFT
from whipstaff.server.engine.scheduler.scheduler import IdleScheduling
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, RequestPlan
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import Edit, PlannedEdit, SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.tables import SiteSpec, Tables
from whipstaff.steering.vector_file import Header, Vector, packed, parse
from whipstaff.steering.where import Where


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save("llama", Path(tmp_path_factory.mktemp("llama")))


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("seed", range(6))
def test_random_groups(model: str, case: Case, seed: int) -> None:
    traffic = Traffic(model, case, seed)
    for _ in range(250):
        if traffic.chance.random() < 0.25:
            traffic.add(traffic.chance.choice((0, 0, 1, 1, 2, 3)))
        traffic.step()
        traffic.disturb()
    traffic.drain()
    traffic.check()
    assert len(traffic.asked) > 30


SCHEDULES = [{"shape": "linear", "from": 1.0, "to": to, "tokens": 20} for to in (0.0, 0.5, 2.0)]


def everywhere(model: str) -> Vector:
    """A vector for every stream of the model, most of them edited as what leaves one block and enters the next."""
    shape = ModelShape(architecture="Llama", hidden_size=96, num_layers=3, num_heads=4, head_dim=32)
    tensors = {
        f"{site}.{layer}.{part}": torch.randn(96)
        for layer in range(3)
        for site in ("resid_pre", "resid_post")
        for part in ("add", "gain")
    }
    return parse(packed(Header(method="vector", model=shape), tensors))


class Loading(Worker):
    """A worker that also makes room for the rows of every step."""

    def __init__(self, scheduler: Any, vector: Vector, num_slots: int) -> None:
        super().__init__(scheduler)
        hook_points = [HookPoint("resid_pre", 0), *(HookPoint("resid_post", layer) for layer in range(3))]
        specs = [SiteSpec(place, 0, 96) for place in hook_points]
        self.tables = Tables(specs, num_slots, 3, torch.device("cpu"), {vector.digest: vector}.__getitem__)
        self.waits: list[float] = []

    def run(self, output: Any) -> ModelRunnerOutput:
        self.waits += notes_of(output).slot_use.waits
        self.tables.acquire(row for name in output.num_scheduled_tokens for row in self.scheduler._placed[name].rows)
        return super().run(output)


@pytest.mark.parametrize("is_async", (False, True))
def test_requests_with_more_lines_than_there_is_room_for_wait(
    model: str, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request has three schedules over a file of many lines; no step may ask for more than the tables hold."""
    case, vector = Case(is_async=is_async, num_blocks=200, max_num_seqs=16, budget=512, num_slots=16), everywhere(model)
    traffic = Traffic(model, case, seed=0)
    traffic.worker = worker = Loading(traffic.scheduler, vector, case.num_slots)

    def steered(members: int) -> dict[str, Any]:
        planner = Planner()
        for schedule in SCHEDULES:
            params = SteeringParams.model_validate({"vector": "v", "where": "all", "schedule": schedule})
            planner.add(params, {"scale": traffic.chance.random()}, vector, None)
        return {PLAN_KEY: RequestPlan(planner.plan).to_wire()}

    monkeypatch.setattr(traffic, "plan", steered)
    for _ in range(16):
        traffic.add(members=0)
    traffic.step()
    assert 0 < (num_held := len(traffic.scheduler._held)) < 16
    (given_up := traffic.asked[traffic.scheduler._held[-1].primary.request_id]).end = "aborted"
    traffic.scheduler.finish_requests(given_up.request.request_id, RequestStatus.FINISHED_ABORTED)
    traffic.drain()
    traffic.check()
    assert len(worker.waits) == num_held - 1 and min(worker.waits) > 0  # those who had slots at once waited for none
    ends = [str(asked.end) for asked in traffic.asked.values()]
    assert worker.tables.num_uploads == 15 and sorted(ends) == ["aborted", *["length"] * 15]
    assert worker.tables.num_uploaded_bytes > 0


@pytest.mark.parametrize("name", ["sync", "async", "v2"])
def test_the_prefix_cache_is_counted_by_whose_tokens_are_looked_for(model: str, name: str) -> None:
    """Each kind asks twice for the same; what all find together is what vLLM counts."""
    case = Case(**{**CASES[name].__dict__, "num_blocks": 200, "max_num_seqs": 16, "budget": 512, "num_slots": 8})
    traffic, theirs = Traffic(model, case, seed=0), [0, 0]
    made = traffic.scheduler.kv_cache_manager.make_prefix_cache_stats

    def make() -> Any:
        stats = made()
        theirs[0], theirs[1] = theirs[0] + stats.queries, theirs[1] + stats.hits
        return stats

    traffic.scheduler.kv_cache_manager.make_prefix_cache_stats = make
    edit = SteeringPlan((PlannedEdit(Edit("v", "0", None), Where.of("all")),))
    further = (CompanionPlan(tuple(range(50, 99))), CompanionPlan((5,)))
    for plan in (None, RequestPlan(edit), RequestPlan(companions=further), RequestPlan(decoding=DecodingPlan())):
        said = {PLAN_KEY: plan.to_wire()} if plan else None
        traffic.plan = Mock(return_value=said)  # type: ignore[method-assign]
        for _ in range(2):
            traffic.add(members=0, prompt=traffic.stem)
            traffic.drain()
    traffic.add(members=0, prompt=[3])
    traffic.drain()
    traffic.check()
    use = traffic.scheduler._cache_use
    # 48 of 49 tokens are whole blocks; members of a group keep their last token back, and so its whole block
    assert use.queries == {"plain": 4 * 49, "steered": 2 * 49, "guided": 4 * 49}
    assert use.hits == {"plain": 3 * 48, "steered": 48, "guided": 2 * 32 + 32}
    assert sum(use.hits.values()) == theirs[1]


@pytest.mark.parametrize("name", ["sync", "async", "v2"])
def test_while_nobody_asks_the_scheduler_is_vllms(model: str, name: str) -> None:
    """A request that asks wakes it, even one that takes no room; what it needed is said to be free before it rests."""
    traffic = Traffic(model, CASES[name], seed=0)
    scheduler = traffic.scheduler

    def rests() -> bool:
        return isinstance(scheduler, IdleScheduling)

    steered = RequestPlan(SteeringPlan((PlannedEdit(Edit("v", "0", None), Where.of("all")),)))
    for plan in (steered, RequestPlan(decoding=DecodingPlan())):
        traffic.plan = Mock(return_value=None)  # type: ignore[method-assign]
        traffic.add(members=0, max_tokens=9)
        traffic.drain()
        assert rests() and scheduler._notes.slot_use.num_used == 0
        traffic.plan = Mock(return_value={PLAN_KEY: plan.to_wire()})  # type: ignore[method-assign]
        asking = traffic.add(members=0, max_tokens=9).request
        assert not rests()
        while not asking.is_finished():
            traffic.step()
            assert asking.is_finished() or not rests()
    traffic.check()


@pytest.mark.parametrize("name", ["sync", "async", "v2"])
def test_a_worker_is_told_only_what_is_new(model: str, name: str) -> None:
    """What a step carries is sent to every worker: tokens that follow tokens carry nothing of ours."""
    traffic = Traffic(model, CASES[name], seed=0)
    told: list[Any] = []
    run = traffic.worker.run
    traffic.worker.run = lambda output: told.append(output) or run(output)  # type: ignore[method-assign, func-returns-value]
    steered = RequestPlan(SteeringPlan((PlannedEdit(Edit("v", "0", None), Where.of("all")),)))
    traffic.plan = Mock(return_value={PLAN_KEY: steered.to_wire()})  # type: ignore[method-assign]
    traffic.add(members=0, max_tokens=9)
    traffic.drain()
    used = [notes.slot_use.num_used if (notes := getattr(one, "whipstaff_notes", None)) else None for one in told]
    num = used.index(0)
    assert num >= 9 and used[:num] == [1, 1] + [None] * (num - 2)


@pytest.mark.parametrize("name", ["sync", "async", "v2"])
@pytest.mark.parametrize("members", [0, 2])
def test_a_banned_token_was_drawn_since_no_other_was_left(model: str, name: str, members: int) -> None:
    """It is not told, and the request ends."""
    said = [token("0", index) for index in range(4)]
    assert len({*said, STOP}) == 5
    limits: dict[str, dict[str, Any]] = {
        "a list": {"allowed_token_ids": said[:3]},
        "a word of two tokens": {"bad_words": [said[2:4], [299]]},
        "neither": {"allowed_token_ids": list(range(300)), "bad_words": [said[1:3][::-1]]},
    }
    for kind, sampling in limits.items():
        traffic = Traffic(model, CASES[name], 1)
        asked = traffic.add(members, 4, [5] * 20, **sampling)
        traffic.drain()
        reason = None if kind == "neither" else NO_TOKEN_LEFT
        assert asked.got == (said if reason is None else said[:3])
        assert (str(asked.end), asked.request.stop_reason) == ("stop" if reason else "length", reason)
        pool = traffic.scheduler.kv_cache_manager.block_pool
        assert not traffic.scheduler.requests and pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def test_a_method_that_says_what_was_banned_goes_on(model: str) -> None:
    rewrite = Rewrite("forced", json.dumps({"ids": [token("0", 0)]}))
    traffic = Traffic(model, CASES["async"], 1)
    traffic.plan = lambda members: {PLAN_KEY: RequestPlan(None, DecodingPlan(rewrites=(rewrite,))).to_wire()}  # type: ignore[method-assign]
    asked = traffic.add(0, 4, [5] * 20, allowed_token_ids=[299])
    traffic.drain()
    assert asked.got == [token("0", index) for index in range(4)]
