"""Conditions and schedules, token for token against plain transformers, in every way the engine can run.

Thresholds lie in the middle of what the probes read on these prompts, so that they fire for some and not for others;
requests of which a decision is closer than MARGIN are left out, since floats could decide them either way.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import modes
import pytest
import tiny
import torch
from engines import Ask, EngineUnderTest
from reference import conditioned
from reference.conditioned import Probe, Trace

from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.engine.frontend.launch import NUM_HISTORIES
from whipstaff.server.plan import RequestPlan
from whipstaff.steering.conditions import Threshold, fired
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.vector_file import Header, Vector

from .conftest import Shared

DRAFTS = "v1-eager-drafts"
ON_V1 = pytest.mark.parametrize("shared", modes.ON_V1, indirect=True)
EVERYWHERE = pytest.mark.parametrize("shared", [*modes.THREE, DRAFTS], indirect=True)
pytestmark = pytest.mark.engine

NUM_TOKENS = 18
MARGIN = 1e-3  # of readings and logits, both of order 1
KEPT = 256  # finished requests whose readings the worker keeps
SCHEDULES: list[dict[str, Any] | None] = [
    None,
    {"shape": "constant", "from": 0.5},
    {"shape": "linear", "from": 1.5, "to": -0.5, "tokens": 9},
    {"shape": "cosine", "from": 0.2, "to": 1.4, "tokens": 7},
    {"shape": "exponential", "from": 1.8, "half_life": 3.0},
    {"shape": "entropy", "from": 0.0, "to": 1.6, "low": 1.0, "high": 4.5},
]
TOUCHES = {
    "all": lambda position, prompt_len: True,
    "each_last": lambda position, prompt_len: position >= prompt_len - 1,
    "generation": lambda position, prompt_len: position >= prompt_len,
}


@dataclass
class Case:
    """One request in both worlds."""

    prompt: list[int]
    plan: RequestPlan
    entries: list[conditioned.Entry]
    mix: Mapping[str, float]
    num_tokens: int = NUM_TOKENS

    @property
    def ask(self) -> Ask:
        return Ask(self.prompt, self.plan, self.num_tokens)


KNOWN: dict[str, Trace] = {}  # references by request: every mode serves the same models and vectors


@dataclass
class Bench:
    """An engine, its vectors and probes, and the same models in transformers."""

    mode: str
    engine: EngineUnderTest
    models: dict[str, Any]
    vectors: list[Vector] = field(default_factory=list)
    probes: list[tuple[Vector, Probe, list[float]]] = field(default_factory=list)  # and sorted readings of the prompts

    def trace(self, case: Case) -> Trace:
        key = repr((case.prompt, case.plan.steering, case.plan.decoding, case.num_tokens))
        if key not in KNOWN:
            others = {self.models[name]: weight for name, weight in case.mix.items()}
            KNOWN[key] = conditioned.greedy(self.models["base"], case.prompt, case.num_tokens, case.entries, others)
        return KNOWN[key]

    def case(
        self,
        prompt: list[int],
        *entries: dict[str, Any],
        mix: Mapping[str, float] = {},
        stop: Mapping[str, Any] | None = None,
    ) -> Case:
        """A request as users write it; `vector` and `when.probe` are numbers of ours. The reference knows no `stop`,
        but what its probe reads."""
        planner, theirs = Planner(), []
        if stop is not None:
            probe_file, probe, _ = self.probes[stop["probe"]]
            planner.end_at(Threshold.model_validate({**stop, "probe": "p"}), probe_file)
            theirs.append(conditioned.Entry({}, 0.0, TOUCHES["all"], when=conditioned.When(probe, 0.0)))
        for entry in entries:
            when = entry.get("when")
            vector, (probe_file, probe, _) = self.vectors[entry["vector"]], self.probes[when["probe"] if when else 0]
            said = {**entry, "vector": "v"} | ({"when": {**when, "probe": "p"}} if when else {})
            scale = said.pop("scale")
            params = SteeringParams.model_validate(said)
            planner.add(params, {"scale": scale}, vector, probe_file if when else None)
            chosen = {p.layer: t for p, t in vector.tensors.items() if p.layer in entry.get("layers", vector.layers)}
            theirs.append(
                conditioned.Entry(
                    {layer: parts["add"] for layer, parts in chosen.items()},
                    scale,
                    TOUCHES[entry.get("where", "each_last")],
                    {layer: parts["gain"] for layer, parts in chosen.items() if "gain" in parts},
                    None
                    if when is None
                    else conditioned.When(
                        probe,
                        when.get("above", when.get("below")),
                        "above" in when,
                        when.get("release"),
                        when.get("decide", "prompt") == "prompt",
                        entry.get("where", "each_last") != "all",
                    ),
                    entry.get("schedule"),
                    entry.get("normalize", False),
                    entry.get("renorm", False),
                )
            )
        plan = RequestPlan(planner.plan, DecodingPlan(Mix.of(mix)) if mix else None, readings_id=str(uuid4()))
        return Case(prompt, plan, theirs, mix)

    def readings(self, case: Case) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.engine.run(
            self.engine.engine.collective_rpc("whipstaff_readings", args=(case.plan.readings_id,))
        )[0]
        return found


def _prompt(seed: int, num: int) -> list[int]:
    return torch.randint(3, tiny.VOCABULARY, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module")
def bench(shared: Shared) -> Bench:
    found = Bench(shared.mode, shared.engine, shared.models)
    _add_vectors(found)
    return found


def _add_vectors(bench: Bench) -> None:
    generator = torch.Generator().manual_seed(7)

    def numbers(scale: float) -> torch.Tensor:
        return scale * torch.randn(bench.engine.shape.hidden_size, generator=generator)

    for has_gain in (False, True, False):
        tensors = {f"resid_post.{layer}.add": numbers(0.4) for layer in (2, 3)}
        tensors |= {f"resid_post.{layer}.gain": numbers(0.2) for layer in (2, 3) if has_gain}
        bench.vectors.append(bench.engine.add_vector(tensors))
    for layer, is_cosine in ((0, False), (1, True), (1, False), (0, True)):
        direction, bias = numbers(10.0 if is_cosine else 0.3), 0.0 if is_cosine else 0.25
        tensors = {f"resid_post.{layer}.direction": direction}
        if not is_cosine:
            tensors[f"resid_post.{layer}.bias"] = torch.tensor(bias)
        defaults = {"metric": "cosine"} if is_cosine else {}
        file = bench.engine.add_vector(tensors, Header(method="probe", model=bench.engine.shape, defaults=defaults))
        probe, seen = Probe(file.digest, layer, direction, bias, is_cosine), []
        for seed in range(3):
            trace = Trace([], {}, {}, [set()], math.inf)
            entry = conditioned.Entry({}, 0.0, TOUCHES["all"], when=conditioned.When(probe, 0.0))
            conditioned._forward(bench.models["base"], _prompt(100 + seed, 60), 60, [entry], trace)
            seen += trace.readings[probe.name]
        bench.probes.append((file, probe, sorted(seen)))


def _quantile(bench: Bench, probe: int, share: float) -> float:
    readings = bench.probes[probe][2]
    return readings[int(share * len(readings))]


def _whens(bench: Bench, probe: int) -> list[dict[str, Any] | None]:
    """A condition of every kind, and none."""
    low, middle, high = (_quantile(bench, probe, share) for share in (0.3, 0.5, 0.7))
    return [
        {"probe": probe, "above": middle},
        {"probe": probe, "below": middle},
        {"probe": probe, "above": middle, "decide": "step"},
        {"probe": probe, "above": high, "release": low, "decide": "step"},
        {"probe": probe, "below": low, "release": high, "decide": "step"},
        None,
    ]


def _cases(bench: Bench, num: int, seed: int = 0) -> list[Case]:
    """Requests of one to three entries: conditions, schedules, clauses and settings by turns; a third of them mixed."""
    cases: list[Case] = []
    stem = _prompt(1, 90)
    for index in range(seed * 1000, seed * 1000 + 10 * num):
        if len(cases) == num:
            break
        generator = torch.Generator().manual_seed(index)
        pick = [int(each) for each in torch.randint(1 << 20, (40,), generator=generator)]
        entries = []
        for number in range(1 + index % 3):
            a, b, c, d, e, f = pick[6 * number : 6 * number + 6]
            vector = a % 3
            entry = {
                "vector": vector,
                "scale": (1.5, -1.5, 2.5)[b % 3],
                "where": list(TOUCHES)[c % 3],
                "when": _whens(bench, d % 4)[(index + number) % 6],
                "schedule": SCHEDULES[e % 6],
                "renorm": f % 3 == 0,
                **({"layers": [3]} if f % 2 else {}),
            }
            if vector != 1 and f % 5 == 0:
                entry |= {"normalize": True, "scale": 5.0}
            entries.append({name: value for name, value in entry.items() if value is not None})
        prompt = stem[: (5, 32, 50, 80)[pick[36] % 4]] + _prompt(index, 1 + pick[37] % 6)
        case = bench.case(prompt, *entries, mix={"expert": 0.7} if index % 3 == 1 else {})
        if bench.trace(case).margin > MARGIN:
            cases.append(case)
    assert len(cases) == num
    return cases


def _is_slow(bench: Bench) -> bool:
    return bench.mode.startswith("v2")


def _assert_readings(bench: Bench, case: Case) -> int:
    """That what the engine read, and how often an edit was open, is what the reference says; how many it compared."""
    trace, plan = bench.trace(case), case.plan.steering
    assert plan is not None
    if not plan.num_columns:
        assert bench.readings(case) == []
        return 0
    columns, num_compared = bench.readings(case)[-1]["columns"], 0
    num_fed = len(case.prompt) + case.num_tokens - 1
    for planned in plan.probes:
        expected = trace.readings[planned.probe.digest]
        said = columns[planned.probe.condition_index]
        if planned.probe.is_latched:
            assert said == [pytest.approx(expected[len(case.prompt) - 1], abs=MARGIN / 2)]
            num_compared += 1
            continue
        for position, reading in enumerate(said):
            if reading is not None:
                assert reading == pytest.approx(expected[position], abs=MARGIN / 2), position
                num_compared += 1
    if plan.entropy_column >= 0:
        for position, reading in enumerate(columns[plan.entropy_column]):
            assert (reading is None) == (position < len(case.prompt))
            assert reading is None or reading == pytest.approx(trace.entropies[position], abs=MARGIN / 2)
            num_compared += reading is not None
    for planned_edit, opened in zip(plan.edits, trace.opened, strict=True):
        gate, intervals = planned_edit.edit.gate, planned_edit.where.intervals(len(case.prompt))
        if gate.ramp is not None:
            continue
        positions = [p for p in range(num_fed) if any(s <= p and (e is None or p < e) for s, e in intervals)]
        counts = fired(gate, columns, positions)
        known = (
            positions
            if gate.condition_index < 0 or gate.is_latched
            else [p for p in positions if columns[gate.condition_index][p] is not None]
        )
        assert counts == (len(opened & set(known)), len(known))
    return num_compared


@EVERYWHERE
def test_conditions_and_schedules(bench: Bench, nobody_left: None) -> None:
    """Every kind of condition and schedule at once, in chunks, with preemptions, twice: the second time prefixes are
    cached. Plain requests among them are as they would be alone."""
    cases = _cases(bench, 12 if _is_slow(bench) else 48)
    plain = [Case(_prompt(50 + index, 20 + 9 * index), RequestPlan(), [], {}) for index in range(4)]
    expected = [bench.trace(case).tokens for case in (*cases, *plain)]
    decided = [
        bool(opened)
        for case in cases
        for entry, opened in zip(case.entries, bench.trace(case).opened, strict=True)
        if entry.when and entry.when.is_once
    ]
    assert any(decided) and not all(decided)
    asks = [*(case.ask for case in cases), *(Ask(case.prompt, None, NUM_TOKENS) for case in plain)]
    preempted = bench.engine.num_preemptions
    for _ in range(1 if _is_slow(bench) else 2):
        assert bench.engine.tokens(*asks) == expected
    assert bench.engine.num_preemptions > preempted, "all of them fitted: nothing was computed again"
    assert sum(_assert_readings(bench, case) for case in cases) > 100
    unsteered = [
        conditioned.greedy(bench.models["base"], case.prompt, NUM_TOKENS, [], {}).tokens for case in cases[:12]
    ]
    assert sum(tokens != alone for tokens, alone in zip(expected, unsteered, strict=False)) >= 6


def _stopping(bench: Bench, index: int) -> tuple[Case, list[int]]:
    """A request that ends at a token which the probe reads as more, or less, than any before it; and its tokens."""
    probe, side = index % 4, ("above", "below")[index // 4 % 2]
    entries = [{"vector": index % 3, "scale": 1.5, "where": ("all", "generation")[index % 2]}][: index % 3]
    prompt, mix = _prompt(600 + index, 20 + index), {"expert": 0.7} if index % 4 == 3 else {}
    watched = bench.case(prompt, *entries, mix=mix, stop={"probe": probe, side: 0.0})
    trace, sign = bench.trace(watched), 1 if side == "above" else -1
    read = [sign * reading for reading in trace.readings[bench.probes[probe][1].name][len(prompt) :]]
    records = [k for k in range(1, NUM_TOKENS - 1) if read[k] > max(read[:k]) + 2 * MARGIN]
    last, limit = NUM_TOKENS, max(read) + 1.0  # nothing reads that
    if records:
        last = records[index % len(records)]
        limit = (read[last] + max(read[:last])) / 2
    case = bench.case(prompt, *entries, mix=mix, stop={"probe": probe, side: sign * limit})
    return case, trace.tokens[: last + 1]


@EVERYWHERE
def test_a_generation_ends_at_the_first_token_where_a_probe_says_so(bench: Bench, nobody_left: None) -> None:
    """Beside others, in chunks and preempted; a prompt's tokens end nothing, and `min_tokens` come first."""
    found = [_stopping(bench, index) for index in range(4 if _is_slow(bench) else 24)]
    ends = {len(tokens) for _, tokens in found}
    assert NUM_TOKENS in ends or _is_slow(bench)
    assert len(ends) > 2
    plain = [Case(_prompt(50 + index, 20 + 9 * index), RequestPlan(), [], {}) for index in range(4)]
    asks = [*(case.ask for case, _ in found), *(Ask(case.prompt, None, NUM_TOKENS) for case in plain)]
    outputs = [output.outputs[0] for output in bench.engine.generate(*asks)]
    assert [list(one.token_ids) for one in outputs[: len(found)]] == [tokens for _, tokens in found]
    assert [list(one.token_ids) for one in outputs[len(found) :]] == [bench.trace(case).tokens for case in plain]
    for (_, tokens), one in zip(found, outputs, strict=False):
        why = ("stop", "stop_when") if len(tokens) < NUM_TOKENS else ("length", None)
        assert (one.finish_reason, one.stop_reason) == why
    case, tokens = next((case, tokens) for case, tokens in found if len(tokens) < NUM_TOKENS - 2)
    (patient,) = bench.engine.generate(Ask(case.prompt, case.plan, NUM_TOKENS, {"min_tokens": len(tokens) + 1}))
    assert (
        len(patient.outputs[0].token_ids) > len(tokens) and list(patient.outputs[0].token_ids)[: len(tokens)] == tokens
    )


@ON_V1
@pytest.mark.parametrize("side", ["above", "below"])
def test_a_decision_on_the_prompt_fires_or_not(bench: Bench, nobody_left: None, side: str) -> None:
    """The same request for many prompts: it changes the answer where the probe says so and nothing elsewhere."""
    when = {"probe": 2, side: _quantile(bench, 2, 0.5)}
    cases = [bench.case(_prompt(200 + i, 12), {"vector": 0, "scale": 3.0, "when": when}) for i in range(16)]
    cases = [case for case in cases if bench.trace(case).margin > MARGIN]
    plain = [Ask(case.prompt, None, NUM_TOKENS) for case in cases]
    outputs = bench.engine.tokens(*(case.ask for case in cases), *plain)
    answers = list(zip(cases, outputs[: len(cases)], outputs[len(cases) :], strict=True))
    fires = [bool(bench.trace(case).opened[0]) for case, _, _ in answers]
    assert 3 <= sum(fires) <= len(fires) - 3
    assert [answer != alone for _, answer, alone in answers] == fires
    assert [answer for _, answer, _ in answers] == [bench.trace(case).tokens for case in cases]


@ON_V1
def test_a_conversation_that_goes_on_is_not_given_the_cache_of_another_count(bench: Bench, nobody_left: None) -> None:
    """Blocks of generated tokens under a schedule hold how many were generated; to the next turn they are prompt."""
    for schedule in (SCHEDULES[2], SCHEDULES[5]):
        entry = {"vector": 0, "scale": 2.0, "where": "all", "schedule": schedule}
        first = bench.case(_prompt(300, 30), entry)
        first.num_tokens = 70
        (answer,) = bench.engine.tokens(first.ask)
        second = bench.case(first.prompt + answer, entry)
        for case in (second, bench.case(first.prompt + answer + [7], entry)):
            assert bench.trace(case).margin > 1e-4
            assert bench.engine.tokens(case.ask) == [bench.trace(case).tokens]


@ON_V1
def test_more_conditional_requests_than_histories_wait_their_turn(bench: Bench, nobody_left: None) -> None:
    cases = []
    for index in range(NUM_HISTORIES + 30):  # of a few configurations, so that slots are not what they wait for
        whens = [_whens(bench, index % 2)[index % 5], _whens(bench, (index + 1) % 2)[(index + 2) % 5]]
        entries = [{"vector": n, "scale": 2.0, "when": when} for n, when in enumerate(whens)]
        case = bench.case(_prompt(400 + index, 4), *entries, mix={})
        case.num_tokens = 3
        cases.append(case)
    sure = [case for case in cases if bench.trace(case).margin > MARGIN]
    assert len(sure) > NUM_HISTORIES
    assert bench.engine.tokens(*(case.ask for case in cases if case in sure)) == [bench.trace(c).tokens for c in sure]


@ON_V1
def test_readings_are_kept_for_a_while(bench: Bench, nobody_left: None) -> None:
    """Those of a running request, of finished ones up to a bound, and of nobody else."""
    when = {"probe": 0, "above": 0.0, "decide": "step"}
    cases = [bench.case([9, 8, 7, 6], {"vector": 0, "scale": 1.0, "when": when}) for _ in range(KEPT + 20)]
    for case in cases:
        case.num_tokens = 1
    bench.engine.tokens(*(case.ask for case in cases))
    bench.engine.generate(Ask([5, 6, 7], max_tokens=1))
    kept = [bool(bench.readings(case)) for case in cases]
    assert sum(kept) == KEPT and not any(kept[:10]) and all(kept[40:])  # those that finish in one step have no order
    (found,) = bench.readings(cases[-1])
    assert found["positions"] == 4
    assert [reading is not None for reading in found["columns"][0]] == [False, False, False, True]  # each_last
    assert bench.engine.run(bench.engine.engine.collective_rpc("whipstaff_readings", args=("nobody",))) == [[]]
