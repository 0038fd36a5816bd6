"""Metrics say what happened: of generations as vLLM's outputs pass by, and of what a worker has counted."""

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from whipstaff.server import metrics
from whipstaff.server.engine.frontend.launch import PlanDict
from whipstaff.server.metrics import PresetTime, WorkerCounts, watch

STEP = 0.25  # seconds between two outputs, by the clock of these tests


def output(*sequences: tuple[int, int, str | None], finished: bool = False, told: Any = None) -> Any:
    """One of vLLM's: (index, number of tokens, why it ended) of each sequence."""
    outputs = [SimpleNamespace(index=i, token_ids=[5] * num, finish_reason=why) for i, num, why in sequences]
    return SimpleNamespace(outputs=outputs, finished=finished, metrics=told)


def value(series: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(f"whipstaff_{series}", labels) or 0.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(now=100.0)
    made.wall, made.perf_counter = 1e9, lambda: made.now
    made.time = lambda: made.wall + made.now - 100.0
    monkeypatch.setattr(metrics, "time", made)
    return made


@pytest.fixture
def grown(request: pytest.FixtureRequest) -> Any:
    """How much a series of this test's own method has grown."""

    def of(series: str, **labels: str) -> float:
        return value(series, method=method_of(request), **labels)

    return of


def method_of(request: pytest.FixtureRequest) -> str:
    return str(request.node.name)


@pytest.fixture
def method(request: pytest.FixtureRequest) -> str:
    return method_of(request)


def run(
    clock: SimpleNamespace,
    method: str,
    outputs: Iterable[Any],
    companions: Iterable[int | None] = (),
    most: int | None = None,
) -> None:
    """A generation whose outputs come STEP after one another. After `most` the client leaves."""

    own = {"label": method, "decoding": None}
    plan = PlanDict({"companions": [{"until": until} for until in companions]} | own)

    async def generate() -> AsyncGenerator[Any, None]:
        for one in outputs:
            clock.now += STEP
            if isinstance(one, BaseException):
                raise one
            for sequence in one.outputs:
                plan.note_tokens(sequence.index, len(sequence.token_ids))
            yield one

    async def follow() -> None:
        async with aclosing(watch(plan, generate(), (ValueError,))) as watched:
            num = 0
            async for _ in watched:
                num += 1
                if num == most:
                    return

    asyncio.run(follow())


def test_tokens_of_a_stream_are_timed_one_by_one(clock: SimpleNamespace, method: str, grown: Any) -> None:
    run(clock, method, [output((0, 1, None)), output((0, 1, None)), output((0, 1, "stop"), finished=True)])
    assert grown("time_to_first_token_seconds_sum") == STEP
    assert (grown("inter_token_latency_seconds_count"), grown("inter_token_latency_seconds_sum")) == (2, 2 * STEP)
    assert grown("e2e_request_latency_seconds_sum") == 3 * STEP
    assert grown("requests_total", outcome="stop") == 1 and grown("generated_tokens_total") == 3


def test_an_output_of_several_tokens_counts_for_each(clock: SimpleNamespace, method: str, grown: Any) -> None:
    run(clock, method, [output((0, 1, None)), output((0, 5, None)), output((0, 0, "stop"), finished=True)])
    assert (grown("inter_token_latency_seconds_count"), grown("inter_token_latency_seconds_sum")) == (5, STEP)
    assert grown("inter_token_latency_seconds_bucket", le="0.05") == 5  # STEP / 5 each


def test_sequences_are_timed_apart(clock: SimpleNamespace, method: str, grown: Any) -> None:
    outputs = [output((i % 2, 1, "length" if i > 3 else None), finished=i == 5) for i in range(6)]
    run(clock, method, outputs)
    assert grown("time_to_first_token_seconds_count") == 1
    assert (grown("inter_token_latency_seconds_count"), grown("inter_token_latency_seconds_sum")) == (4, 8 * STEP)
    assert grown("requests_total", outcome="length") == 1


def test_an_answer_that_comes_whole_does_not_put_its_time_into_the_first_token(
    clock: SimpleNamespace, method: str, grown: Any
) -> None:
    told = stats(num=11)
    run(clock, method, [output((0, 11, "length"), finished=True, told=told)])
    assert grown("time_to_first_token_seconds_sum") == pytest.approx(STEP - 0.2)
    assert grown("inter_token_latency_seconds_count") == 10
    assert grown("inter_token_latency_seconds_sum") == pytest.approx(0.2)
    assert grown("e2e_request_latency_seconds_sum") == STEP


def test_tokens_that_nobody_took_at_once_are_none_of_the_first(clock: SimpleNamespace, method: str, grown: Any) -> None:
    told = stats(num=5)
    run(clock, method, [output((0, 3, None), told=told), output((0, 2, "length"), finished=True, told=told)])
    assert grown("time_to_first_token_seconds_sum") == pytest.approx(STEP - 0.2)
    assert grown("inter_token_latency_seconds_count") == 4
    assert grown("inter_token_latency_seconds_sum") == pytest.approx(2 * 0.05 + STEP)


def test_answers_that_are_longer_than_the_one_that_was_timed_are_timed_too(
    clock: SimpleNamespace, method: str, grown: Any
) -> None:
    """As those of a search: vLLM knows of the best one only."""
    told = stats(num=1)
    run(clock, method, [output((0, 1, "stop"), (1, 5, "length"), finished=True, told=told)])
    assert grown("time_to_first_token_seconds_count") == 1
    assert grown("inter_token_latency_seconds_count") == 4
    assert grown("inter_token_latency_seconds_sum") == pytest.approx(0.2)


def test_a_request_arrives_before_its_prompt_is_tokenised(clock: SimpleNamespace, method: str, grown: Any) -> None:
    told = stats(num=1, arrival_time=clock.wall - 3)
    run(clock, method, [output((0, 1, "length"), finished=True, told=told)])
    assert grown("time_to_first_token_seconds_sum") == grown("e2e_request_latency_seconds_sum") == 3 + STEP


def stats(num: int, arrival_time: float = 1e9) -> SimpleNamespace:
    """vLLM's: so many tokens in 0.2 s."""
    return SimpleNamespace(arrival_time=arrival_time, first_token_ts=7.0, last_token_ts=7.2, num_generation_tokens=num)


def test_nothing_is_made_up_where_vllm_counts_nothing(clock: SimpleNamespace, method: str, grown: Any) -> None:
    run(clock, method, [output((0, 11, "length"), finished=True)])
    assert grown("time_to_first_token_seconds_count") == grown("inter_token_latency_seconds_count") == 0
    assert grown("requests_total", outcome="length") == 1


@pytest.mark.parametrize(
    ("reasons", "outcome"),
    [
        ([None, "stop"], "stop"),
        (["length", "stop"], "length"),
        (["repetition", "length"], "repetition"),
        (["stop", "abort"], "cut"),
        (["error", "abort"], "error"),
    ],
)
def test_the_outcome_is_the_worst_of_its_sequences(
    clock: SimpleNamespace, method: str, grown: Any, reasons: list[str], outcome: str
) -> None:
    run(clock, method, [output((0, 1, reasons[0])), output((1, 1, reasons[1]), finished=True)])
    assert grown("requests_total", outcome=outcome) == 1
    assert grown("e2e_request_latency_seconds_count") == (outcome not in ("cut", "error"))


def test_a_client_that_leaves_is_no_error(clock: SimpleNamespace, method: str, grown: Any) -> None:
    run(clock, method, [output((0, 1, None))] * 3, most=2)
    assert grown("requests_total", outcome="aborted") == 1
    assert grown("e2e_request_latency_seconds_count") == 0 and grown("generated_tokens_total") == 2


def test_what_breaks_is_an_error(clock: SimpleNamespace, method: str, grown: Any) -> None:
    with pytest.raises(RuntimeError):
        run(clock, method, [output((0, 1, None)), RuntimeError("dead")])
    assert grown("requests_total", outcome="error") == 1


def test_what_was_refused_never_began(clock: SimpleNamespace, method: str, grown: Any) -> None:
    with pytest.raises(ValueError):
        run(clock, method, [ValueError("too long")])
    assert not any(grown("requests_total", outcome=outcome) for outcome in (*metrics.OUTCOMES, metrics.ABORTED))


def test_further_sequences_compute_tokens_too(clock: SimpleNamespace, method: str, grown: Any) -> None:
    run(clock, method, [output((0, 1, None))] * 4 + [output((0, 1, "stop"), finished=True)], companions=[None, 2])
    assert grown("generated_tokens_total") == 5 and grown("computed_tokens_total") == 5 + 5 + 2


def test_what_everybody_looks_at_is_there_from_the_start() -> None:
    for outcome in (*metrics.OUTCOMES, metrics.ABORTED):
        assert (
            REGISTRY.get_sample_value("whipstaff_requests_total", {"method": "plain", "outcome": outcome}) is not None
        )
    for reason in metrics.REASONS.values():
        assert REGISTRY.get_sample_value("whipstaff_refusals_total", {"reason": reason}) is not None


def test_presets_beyond_a_hundred_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_presets", set())
    before = value("preset_requests_total", preset="other")
    for number in range(metrics.MAX_PRESETS + 5):
        PresetTime(f"bounded-{number}")
    PresetTime("bounded-0")
    assert value("preset_requests_total", preset="bounded-0") == 2
    assert value("preset_requests_total", preset="other") - before == 5


def test_a_preset_is_timed_to_the_end_of_a_stream() -> None:
    async def events() -> AsyncGenerator[str, None]:
        yield "a"
        yield "b"

    async def follow(most: int) -> None:
        async with aclosing(PresetTime("streamed").over(events())) as timed:
            async for _ in timed:
                most -= 1
                if not most:
                    return

    asyncio.run(follow(1))
    assert value("preset_e2e_request_latency_seconds_count", preset="streamed") == 0
    asyncio.run(follow(3))
    assert value("preset_e2e_request_latency_seconds_count", preset="streamed") == 1


def worker_says(uploads: int, held: int, waits: list[float], num_waits: int) -> dict[str, Any]:
    said: dict[str, Any] = dict.fromkeys(metrics.WORKER_GAUGES, 3) | dict.fromkeys(metrics.WORKER_COUNTERS, 0)
    labelled: dict[str, dict[str, int]] = {
        name: {} for name, series in metrics.WORKER_COUNTERS.items() if series._labelnames
    }
    more = {"table_uploads": uploads, "group_steps": {"held": held, "together": 0}}
    return said | labelled | more | {"slot_waits": waits, "num_slot_waits": num_waits}


def test_what_a_worker_counts_is_added_up_once() -> None:
    names: list[tuple[str, dict[str, str]]]
    names = [("table_uploads_total", {}), ("group_steps_total", {"state": "held"}), ("slot_wait_seconds_count", {})]
    before = [value(name, **labels) for name, labels in names]
    counts = WorkerCounts()
    counts.note(worker_says(2, 1, [0.1], 1))
    counts.note(worker_says(2, 4, [0.1], 1))
    counts.note(worker_says(7, 4, [0.1, 0.2, 0.3], 3))
    after = [value(name, **labels) for name, labels in names]
    assert [new - old for new, old in zip(after, before, strict=True)] == [7, 4, 3]
    assert value("slots_in_use") == value("group_sequences_running") == 3


OF_SEARCHES = {
    "searches_running": "searches_running",
    "search_sequences_living": "search_sequences_living",
    "search_forks": "search_forks_total",
    "search_rollbacks": "search_rollbacks_total",
    "search_tried": "search_tried_tokens_total",
    "search_moved_seats": "search_moved_sequences_total",
    "search_copied_blocks": "search_copied_blocks_total",
    "search_recomputed_tokens": "search_recomputed_tokens_total",
    "search_seconds": "search_decision_seconds_total",
}


def test_what_searches_did_is_shown() -> None:
    told = {name: index + 1.0 for index, name in enumerate(OF_SEARCHES)}
    before = {name: value(series) if series.endswith("_total") else 0.0 for name, series in OF_SEARCHES.items()}
    WorkerCounts().note(worker_says(0, 0, [], 0) | told)
    assert {name: value(series) - before[name] for name, series in OF_SEARCHES.items()} == told


def test_what_searches_computed_is_counted_where_it_is_known(clock: SimpleNamespace, method: str, grown: Any) -> None:
    """In the engine, so that nothing is missing of those that were aborted, or have settled no token."""
    counts = WorkerCounts()
    plan = PlanDict({"companions": [], "label": method, "decoding": {"search": ["beam_search"]}})

    async def outputs() -> AsyncGenerator[Any, None]:
        yield output((0, 3, "length"), finished=True)

    async def follow() -> None:
        async for _ in watch(plan, outputs()):
            counts.note(worker_says(0, 0, [], 0) | {"search_computed": {method: 9}})
            counts.note(worker_says(0, 0, [], 0) | {"search_computed": {method: 12}})

    asyncio.run(follow())
    assert (grown("generated_tokens_total"), grown("computed_tokens_total")) == (3, 12)


def test_waits_that_nobody_asked_for_in_time_are_lost_and_not_counted_twice() -> None:
    before = value("slot_wait_seconds_count")
    counts = WorkerCounts()
    counts.note(worker_says(0, 0, [0.2, 0.3], 50))
    counts.note(worker_says(0, 0, [0.2, 0.3], 50))
    assert value("slot_wait_seconds_count") - before == 2


@pytest.mark.parametrize("status", [200, 201, 404, 401, 422, 503])
def test_refusals_are_counted_by_reason(status: int) -> None:
    reason = metrics.REASONS.get(status, "")
    before = value("refusals_total", reason=reason)
    metrics.note_status(status)
    assert value("refusals_total", reason=reason) - before == bool(reason)


def test_tokens_of_a_long_answer_are_counted_while_it_runs(clock: SimpleNamespace, method: str, grown: Any) -> None:
    generation = metrics._Generation(method)
    for _ in range(6):
        clock.now += STEP
        generation.note(output((0, 1, None)))
    assert 0 < grown("generated_tokens_total") < 6
    generation.end()
    assert grown("generated_tokens_total") == grown("computed_tokens_total") == 6
