"""No request can read another's steered KV: every answer is that of an engine without a prefix cache.

Hundreds of requests (with WHIPSTAFF_SOAK=1 thousands), plain and steered in every way, over a tree of prompts and the
answers to them, in an engine with a small step budget (chunked prefill) and few blocks (eviction, preemption). Then all
of them again, in one without a cache or a preemption; that there each is answered as if alone, test_many.py shows.
"""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from engines import Ask, EngineUnderTest, plan, vllm_counters
from hypothesis import given, settings
from hypothesis import strategies as st
from soak import SOAK
from torch import Tensor

from whipstaff.server.engine.worker.edits.histories import Histories
from whipstaff.server.engine.worker.requests import Arrival, Requests
from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.steering.conditions import Schedule
from whipstaff.steering.plan import Edit, PlannedEdit, PlannedProbe, ProbeRead, SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.programs import Gate
from whipstaff.steering.vector_file import Header, Vector
from whipstaff.steering.where import Interval, Region, Shorthand, Where

from .test_block_keys import BLOCK as KEYED
from .test_block_keys import keys

engine = pytest.mark.engine

NUM_REQUESTS, NUM_PLANS = 2200 if SOAK else 600, 90
BLOCK, MOST = 32, 200  # MOST tokens in a prompt
TOLERANCE = 1e-4  # log-probabilities
ALPHABET = range(3, 40)  # few, so that clauses on tokens meet some
SOME = list(ALPHABET[::6])
NAMED: tuple[Shorthand, ...] = ("all", "all", "prompt", "generation", "last_prompt", "each_last")
WHERES = [
    *(Where.of(said) for said in NAMED),
    Where(prompt=[(0, 9)]),
    Where(prompt=[(-20, -3)], generation=[(1, 4)]),
    Where(prompt=[(37, 70), (-5, None)], generation="all", exclude=Region(prompt=[(41, 60)], generation=[(2, 3)])),
    Where(tokens=SOME),
    Where(prompt="all", generation="all", exclude=Region(tokens=SOME)),
    Where(tokens=SOME, generation=[(0, 3)], exclude=Region(prompt=[(0, 33)])),
]
WHENS: list[dict[str, Any]] = [
    {"above": 0.0},
    {"below": 0.3},
    {"above": 0.2, "decide": "step"},
    {"below": -0.5, "release": 0.5, "decide": "step"},
    {"above": 1.0, "release": -1.0, "decide": "step"},
]
SCHEDULES: list[dict[str, Any]] = [
    {"shape": "constant", "from": 0.5},
    {"shape": "linear", "from": 1.5, "to": -0.5, "tokens": 5},
    {"shape": "cosine", "from": 0.0, "to": 1.2, "tokens": 3},
    {"shape": "exponential", "from": 1.0, "half_life": 2},
    {"shape": "entropy", "from": 1.5, "to": -0.5, "low": 2.0, "high": 5.0},
]


@dataclass
class Tool:
    """A vector's file, and settings of its method to choose from."""

    method: str
    tensors: dict[str, Tensor]
    settings: list[dict[str, Any]]


def tools() -> dict[str, Tool]:
    generator = torch.Generator().manual_seed(21)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def everywhere(site: str, **parts: Any) -> dict[str, Tensor]:
        return {f"{site}.{layer}.{part}": a * normal(*n) for layer in range(3) for part, (a, *n) in parts.items()}

    scales = [{"scale": scale} for scale in (-1.0, 0.6, 1.5)]
    basis = torch.linalg.qr(normal(64, 2)).Q.T.contiguous()
    return {
        "add": Tool("vector", everywhere("resid_post", add=(0.5, 64)), scales),
        "gain": Tool("vector", everywhere("attn_head", gain=(0.4, 2, 32), add=(0.4, 2, 32)), scales),
        "ablate": Tool("directional_ablation", {"direction": normal(64)}, scales),
        "knob": Tool("context_knob", {"resid_post.1.basis": basis}, [{"value": 3.0}, {"value": [-2.0, 5.0]}]),
        "loreft": Tool(
            "loreft", everywhere("resid_post", weight=(0.3, 3, 64), bias=(1.0, 3), rotate=(0.2, 3, 64)), scales
        ),
        "angular": Tool(
            "angular",
            {"first_direction": normal(64), "second_direction": normal(64)},
            [{"angle": 70.0}, {"angle": 200.0, "adaptive": True}],
        ),
        "iti": Tool(
            "iti",
            everywhere("attn_head", direction=(1.0, 2, 32)) | {f"attn_head.{i}.sigma": torch.ones(2) for i in range(3)},
            [{"scale": 2.0}, {"scale": -3.0}],
        ),
        "probe": Tool("probe", {"resid_post.0.direction": 0.2 * normal(64)}, []),
    }


@dataclass
class Traffic:
    """Makes requests, some of them from the answers to earlier ones; the same seed and answers make the same ones."""

    plans: list[RequestPlan | None]
    chance: random.Random
    stems: list[list[int]] = field(default_factory=lambda: [[]])
    asks: list[Ask] = field(default_factory=list)
    answered: list[tuple[Ask, Any]] = field(default_factory=list)

    def wave(self) -> list[Ask]:
        found = [self._ask() for _ in range(self.chance.choice((1, 3, 12, 40)))]
        self.asks += found
        return found

    def _ask(self) -> Ask:
        chance = self.chance
        chosen = chance.choice(self.plans) if chance.random() < 0.7 else None
        max_tokens = chance.randint(1, 12)
        kind = chance.random()
        finished = [(ask, output) for ask, output in self.answered[-120:] if output and len(ask.prompt) < MOST - 40]
        if finished and kind < 0.4:
            before, output = chance.choice(finished)
            prompt = before.prompt + list(output.outputs[0].token_ids) + self._words(chance.choice((1, 9, 25)))
            chosen = before.plan if chance.random() < 0.7 else chosen
        elif finished and kind < 0.5:  # once more
            before, _ = chance.choice(finished)
            prompt, chosen = before.prompt, before.plan if chance.random() < 0.5 else chosen
        else:
            stem = chance.choice(self.stems[-8:])
            prompt = stem + self._words(chance.randint(1, 50))
            if len(prompt) < MOST - 60 and chance.random() < 0.3:
                self.stems.append(prompt)
        ask = Ask(prompt, chosen, max_tokens, {"logprobs": 0})
        if chance.random() < 0.05:
            ask.abort_after, ask.sampling = chance.randint(1, 3), {"output_kind": 1}
        return ask

    def _words(self, num: int) -> list[int]:
        return self.chance.choices(ALPHABET, k=num)


def random_plans(vectors: dict[str, Vector], kit: dict[str, Tool]) -> list[RequestPlan | None]:
    """Of one to three entries each, in the way that requests take."""
    chance, found = random.Random(5), []
    names = [name for name in kit if name != "probe"]
    for number in range(NUM_PLANS):
        planner = Planner()
        for _ in range(1 + number % 3):
            name = chance.choice(names)
            said: dict[str, Any] = {"vector": name, "where": chance.choice(WHERES), "renorm": chance.random() < 0.15}
            if chance.random() < 0.4:
                said["when"] = {"probe": "probe", **chance.choice(WHENS)}
                first = 2 if name == "ablate" else 1  # resid_pre of layer 1 is read before it is edited
                said["layers"] = [layer for layer in vectors[name].layers if layer >= first]
            if chance.random() < 0.4:
                said["schedule"] = chance.choice(SCHEDULES)
            params = SteeringParams.model_validate(said)
            planner.add(
                params, chance.choice(kit[name].settings), vectors[name], vectors["probe"] if params.when else None
            )
        found.append(plan(planner.plan))
    return found


@dataclass
class Record:
    """What happened."""

    traffic: Traffic
    outputs: list[Any]
    uncached: dict[str, Any]  # the same requests in an engine without a cache
    counted: dict[str, float]
    shared: dict[str, list[int]]  # by scenario, how many tokens of each request's prompt were cached


def key(ask: Ask) -> str:
    return repr((ask.prompt, ask.plan, ask.max_tokens))


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Record]:
    path = tiny.save(
        "llama",
        tmp_path_factory.mktemp("model"),
        hidden_size=64,
        intermediate_size=96,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    kit = tools()

    def start(name: str, **flags: Any) -> tuple[EngineUnderTest, dict[str, Vector]]:
        engine = EngineUnderTest(
            path,
            num_slots=96,
            sites=("resid_pre", "attn_in", "attn_out", "mlp_in", "mlp_out"),
            served_model_name=name,
            enforce_eager=True,
            skip_tokenizer_init=True,
            **flags,
        )
        made = {n: engine.add_vector(t.tensors, Header(method=t.method, model=engine.shape)) for n, t in kit.items()}
        return engine, made

    engine, vectors = start(
        "cached",
        enable_prefix_caching=True,
        max_num_batched_tokens=96,
        max_num_seqs=16,
        num_gpu_blocks_override=22,
        kv_cache_metrics=True,
        kv_cache_metrics_sample=1.0,
    )
    try:
        traffic = Traffic(random_plans(vectors, kit), random.Random(8))
        outputs = engine.run(in_waves(engine, traffic))
        shared = {name: how_much_is_cached(engine, asks) for name, asks in scenarios(vectors).items()}
        counted = vllm_counters("cached")
        engine.generate(Ask([5, 6, 7], max_tokens=1))  # one more step, so that the worker hears of the last to finish
        left = engine.counters()
    finally:
        engine.close()
    assert left["requests_held"] == left["histories_used"] == 0
    engine, again = start("uncached", enable_prefix_caching=False, max_num_seqs=16)
    assert {n: v.digest for n, v in again.items()} == {n: v.digest for n, v in vectors.items()}
    try:
        wanted = {key(ask): ask for ask in traffic.asks if ask.abort_after is None}
        uncached = dict(zip(wanted, engine.generate(*wanted.values()), strict=True))
        assert engine.num_preemptions == 0
    finally:
        engine.close()
    yield Record(traffic, outputs, uncached, counted, shared)


async def in_waves(engine: EngineUnderTest, traffic: Traffic) -> list[Any]:
    """Two waves at once; answers to the one before are there when the next is made."""
    flying: list[tuple[list[Ask], Any]] = []
    outputs: list[Any] = []
    while flying or len(traffic.asks) < NUM_REQUESTS:
        if len(traffic.asks) < NUM_REQUESTS:
            wave = traffic.wave()
            flying.append((wave, asyncio.gather(*map(engine.answer, wave))))
        if len(flying) == 2 or len(traffic.asks) >= NUM_REQUESTS:
            wave, answers = flying.pop(0)
            found = await answers
            outputs += found
            traffic.answered += zip(wave, found, strict=True)
    return outputs


def scenarios(vectors: dict[str, Vector]) -> dict[str, list[Ask]]:
    """Sequences of requests with one prompt of four full blocks and two tokens."""

    def steered(scale: float, where: str | Where, **more: Any) -> RequestPlan | None:
        planner = Planner()
        params = SteeringParams.model_validate({"vector": "add", "where": where, **more})
        planner.add(params, {"scale": scale}, vectors["add"], None)
        return plan(planner.plan)

    late = steered(1.0, "generation")
    sequences: dict[str, list[RequestPlan | None]] = {
        "plain, then generated-only": [None, late, steered(2.0, "generation")],
        "generated-only, then plain": [late, None],
        "one steering twice": [steered(1.0, "all"), steered(1.0, "all")],
        "two steerings and plain": [steered(1.0, "all"), steered(2.0, "all"), None],
        "plain, then from position 70 on": [None, steered(1.0, Where(prompt=[(70, None)]))],
        "the last prompt token only": [None, steered(1.0, "last_prompt")],
        "two schedules": [steered(1.0, "all", schedule=schedule) for schedule in SCHEDULES[1:3]],
    }
    chance = random.Random(3)
    return {
        name: [Ask(prompt, chosen, 2) for chosen in plans]
        for name, plans in sequences.items()
        for prompt in [chance.choices(ALPHABET, k=4 * BLOCK + 2)]
    }


def how_much_is_cached(engine: EngineUnderTest, asks: list[Ask]) -> list[int]:
    return [engine.generate(ask)[0].num_cached_tokens for ask in asks]


@engine
def test_every_answer_is_that_of_an_uncached_engine(record: Record) -> None:
    wrong, num = [], 0
    for ask, output in zip(record.traffic.asks, record.outputs, strict=True):
        if ask.abort_after is not None:
            continue
        num += 1
        if why := difference(output, record.uncached[key(ask)]):
            wrong.append((why, len(ask.prompt), output.num_cached_tokens, ask.plan))
    assert num >= 0.9 * NUM_REQUESTS
    assert not wrong, (len(wrong), wrong[:5])


def difference(one: Any, other: Any) -> str:
    """How two outputs differ, if they do."""
    (mine,), (theirs,) = one.outputs, other.outputs
    if list(mine.token_ids) != list(theirs.token_ids):
        return f"{mine.token_ids} and not {theirs.token_ids}"
    said = zip(mine.token_ids, mine.logprobs, theirs.logprobs, strict=True)
    far = max(abs(ours[token].logprob - others[token].logprob) for token, ours, others in said)
    return f"{far:.1e} apart" if far > TOLERANCE else ""


@engine
def test_the_traffic_was_hard(record: Record) -> None:
    """Blocks were evicted, requests preempted, prefixes cached for plain and for steered requests; steering shows."""
    counted = record.counted
    assert counted["vllm:num_preemptions_total"] >= NUM_REQUESTS / 200
    assert counted["vllm:kv_block_lifetime_seconds_count"] > NUM_REQUESTS / 2.2
    pairs = [
        (ask, output) for ask, output in zip(record.traffic.asks, record.outputs, strict=True) if output is not None
    ]
    for is_steered in (False, True):
        cached = [output.num_cached_tokens for ask, output in pairs if (ask.plan is not None) == is_steered]
        assert sum(num > 0 for num in cached) > NUM_REQUESTS / 22
    plain = {repr(ask.prompt): output for ask, output in pairs if ask.plan is None}
    twins = [(output, plain[repr(ask.prompt)]) for ask, output in pairs if ask.plan and repr(ask.prompt) in plain]
    assert sum(bool(difference(a, b)) for a, b in twins if len(a.outputs[0].token_ids) == len(b.outputs[0].token_ids))


@engine
def test_prompts_are_shared_as_far_as_their_kv_is_the_same(record: Record) -> None:
    everything = 4 * BLOCK
    assert record.shared == {
        "plain, then generated-only": [0, everything, everything],
        "generated-only, then plain": [0, everything],
        "one steering twice": [0, everything],
        "two steerings and plain": [0, 0, 0],
        "plain, then from position 70 on": [0, 2 * BLOCK],
        "the last prompt token only": [0, everything],
        "two schedules": [0, 0],
    }


GATES = [
    Gate(),
    Gate(schedule_index=0),
    Gate(condition_index=0, is_latched=True),
    Gate(condition_index=0, on=0.5, off=0.5),
    Gate(ramp=(1, 1.0, 2.0, 0.0, 1.0)),
]
LATCH = PlannedProbe(ProbeRead("probe", 0, 0, True), Where.of("last_prompt"))
READ = PlannedProbe(ProbeRead("probe", 0, 0, False), Where.of("all"))


@st.composite
def some_plans(draw: st.DrawFn) -> SteeringPlan | None:
    if draw(st.booleans()) and draw(st.booleans()):
        return None
    edits = draw(
        st.lists(
            st.builds(
                lambda digest, gate, where: PlannedEdit(Edit(digest, "{}", None, gate=gate), where),
                st.sampled_from("ab"),
                st.sampled_from(GATES),
                st.sampled_from(WHERES),
            ),
            min_size=1,
            max_size=2,
        )
    )
    gates = [planned.edit.gate for planned in edits]
    schedule = Schedule.model_validate(draw(st.sampled_from(SCHEDULES[:4])))
    latches = any(gate.is_latched for gate in gates)
    return SteeringPlan(
        tuple(edits),
        (LATCH,) if latches else (READ,) if any(gate.condition_index == 0 for gate in gates) else (),
        (schedule,) if any(gate.schedule_index == 0 for gate in gates) else (),
        entropy_column=1 if any(gate.ramp for gate in gates) else -1,
    )


def happens(steering: SteeringPlan | None, tokens: list[int], prompt_len: int, position: int) -> list[Any]:
    """All that is done to one token, as the definitions have it."""

    def inside(intervals: list[Interval]) -> bool:
        return any(start <= position and (end is None or position < end) for start, end in intervals)

    found: list[Any] = []
    if steering is None:
        return found
    for edit, where in ((planned.edit, planned.where) for planned in steering.edits):
        gate, is_special = edit.gate, tokens[position] in where.token_ids
        if not inside((where.intervals_at_tokens if is_special else where.intervals)(prompt_len)):
            continue
        if gate.is_latched and position < prompt_len - 1:
            continue  # not decided yet
        gain = (
            steering.schedules[0].gains(np.array([position - prompt_len])).item() if gate.schedule_index == 0 else 1.0
        )
        decided_at = prompt_len - 1 if gate.is_latched else position if gate.condition_index == 0 else None
        found.append((edit, gain, decided_at, gate.ramp is not None and position >= prompt_len))
    return found


TOKENS = [random.Random(1).choice(ALPHABET) for _ in range(7 * KEYED)]


@settings(max_examples=400, deadline=None)
@given(one=some_plans(), other=some_plans(), lengths=st.tuples(*[st.integers(1, 7 * KEYED)] * 2))
def test_blocks_with_one_key_hold_what_one_plan_made(
    one: SteeringPlan | None, other: SteeringPlan | None, lengths: tuple[int, int]
) -> None:
    """Of two requests with the same tokens, one the continuation of the other perhaps: keys are equal only as far as
    the same was done to the same tokens; they are those of plain requests as far as nothing was."""
    made = []
    for steering, prompt_len in zip((one, other), lengths, strict=True):
        chosen = None if steering is None else RequestPlan(steering)
        made.append(keys(TOKENS, prompt_len, chosen))
    done = [
        [happens(steering, TOKENS, prompt_len, position) for position in range(len(TOKENS))]
        for steering, prompt_len in zip((one, other), lengths, strict=True)
    ]
    unkeyed = keys(TOKENS, 1, None)
    for index in range(len(unkeyed)):
        end = (index + 1) * KEYED
        mine, theirs = done[0][:end], done[1][:end]
        if made[0][index] == made[1][index]:
            assert mine == theirs
        if any(mine):
            assert made[0][index] != unkeyed[index]


def test_a_request_that_comes_back_keeps_what_was_read() -> None:
    """Model Runner V2 is told of a resumed request as of a new one; what it read before may stand in cached blocks."""
    latched = PlannedEdit(Edit("a", "{}", None, gate=GATES[2]), Where.of("generation"))
    placed = PositionedPlan(RequestPlan(SteeringPlan((latched,), (LATCH,))), 5)
    requests = Requests()
    histories = Histories(requests, num_histories=3, max_len=16, device=torch.device("cpu"))

    def comes() -> None:
        for request, _ in requests.take([Arrival("one", placed)]):
            histories.add(request)

    comes()
    histories.values[:, 0] = 2.0
    comes()
    assert histories.num_used == 1
    assert histories.values[:, 0].tolist() == [2.0] * 3
    for request in requests.finish(["one"]):
        histories.remove(request)
    assert histories.num_used == 0


@given(steering=some_plans(), prompt_len=st.integers(1, 7 * KEYED), later=st.integers(1, 6 * KEYED))
@settings(max_examples=100, deadline=None)
def test_what_was_generated_has_the_keys_of_a_prompt(
    steering: SteeringPlan | None, prompt_len: int, later: int
) -> None:
    """Keys do not depend on how many are made at once: a continuation finds what was generated before it."""
    chosen = None if steering is None else RequestPlan(steering)
    assert keys(TOKENS, prompt_len, chosen, later) == keys(TOKENS, prompt_len, chosen)
