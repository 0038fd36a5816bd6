"""Every series of our own that /metrics exports, beside vLLM's; labels hold names of our own only, so they are few."""

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping
from contextlib import aclosing
from typing import Any, Protocol

from prometheus_client import Counter, Gauge, Histogram

TOKEN_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
DOSE_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 100)


PLAIN = "plain"  # the method of requests of which the engine does nothing differently


class Watched(Protocol):
    """A plan as the engine's front end carries it."""

    label: str  # its methods
    note: Callable[[Any], None] | None  # called with each output


def _gauge(name: str, what: str) -> Gauge:
    """A number that whichever API server is asked knows, since the worker or the registry's folder does."""
    return Gauge(name, what, multiprocess_mode="livemostrecent")


REQUESTS = Counter("whipstaff_requests", "Generations by method and outcome", ["method", "outcome"])
FIRST_TOKEN = Histogram(
    "whipstaff_time_to_first_token_seconds", "Time to first token by method", ["method"], buckets=REQUEST_BUCKETS
)
NEXT_TOKEN = Histogram(
    "whipstaff_inter_token_latency_seconds", "Time between tokens by method", ["method"], buckets=TOKEN_BUCKETS
)
END_TO_END = Histogram(
    "whipstaff_e2e_request_latency_seconds", "Time from arrival to last token by method", ["method"],
    buckets=REQUEST_BUCKETS,
)  # fmt: skip
REFUSALS = Counter("whipstaff_refusals", "Requests refused before scheduling, by HTTP status", ["status"])
PRESETS = Counter("whipstaff_preset_requests", "Requests that named a preset", ["preset"])
VECTORS = _gauge("whipstaff_vectors_loaded", "Vectors that fit the served model")
HELD = _gauge("whipstaff_vectors_held", "Vectors in the workers; those of running requests stay when replaced")
SLOTS = _gauge("whipstaff_slots", "Distinct steering configurations that may be in use at once")
SLOTS_IN_USE = _gauge("whipstaff_slots_in_use", "Slots of running requests")
WAITING = _gauge("whipstaff_requests_waiting_for_slots", "Requests whose steering does not fit beside what is running")
UPLOADS = _gauge("whipstaff_table_uploads_total", "Configurations written into the tables of edits since the start")
COMPANIONS = _gauge("whipstaff_companions_running", "Sequences that run beside a request's own to guide it")
STEPS_HELD = _gauge("whipstaff_group_steps_held_total", "Steps in which some sequences of a request waited for others")
HALF = _gauge(
    "whipstaff_groups_half_scheduled_total", "Steps that took some sequences of a request only: a bug if not 0"
)
SEARCHES = _gauge("whipstaff_searches_running", "Requests that search")
SEARCH_SEQUENCES = _gauge("whipstaff_search_sequences_living", "Sequences that searches have alive")
FORKS = _gauge("whipstaff_search_forks_total", "Sequences that went on from one that another went on from, too")
ROLLBACKS = _gauge("whipstaff_search_rollbacks_total", "Times that a search took tokens back")
TRIED = _gauge("whipstaff_search_tried_tokens_total", "Tokens that searches fed to see what they lead to")
MOVED = _gauge("whipstaff_search_moved_sequences_total", "Sequences that were put in the place of another")
COPIED = _gauge("whipstaff_search_copied_blocks_total", "Blocks of KV cache that were copied for a fork")
RECOMPUTED = _gauge("whipstaff_search_recomputed_tokens_total", "Tokens that a search had to compute once more")
DECIDING = _gauge("whipstaff_search_decision_seconds_total", "Time that decisions took, with what they tried")
CONDITIONAL = Counter("whipstaff_conditional_tokens", "Tokens of conditional edits where the condition is known")
FIRED = Counter("whipstaff_conditional_tokens_open", "Those of them that were edited")
DOSE = Histogram(
    "whipstaff_dose", "Largest edit of each steered request, relative to the activations that it edits",
    buckets=DOSE_BUCKETS,
)  # fmt: skip


def note_worker(counters: Mapping[str, Any]) -> None:
    """What only a worker knows, read when somebody asks for metrics: counted since it started."""
    SLOTS_IN_USE.set(counters["slots_in_use"])
    WAITING.set(counters["requests_waiting_for_slots"])
    HELD.set(counters["vectors_held"])
    UPLOADS.set(counters["table_uploads"])
    COMPANIONS.set(counters["companions_running"])
    STEPS_HELD.set(counters["group_steps_held"])
    HALF.set(counters["groups_half_scheduled"])
    SEARCHES.set(counters["searches_running"])
    SEARCH_SEQUENCES.set(counters["search_sequences_living"])
    FORKS.set(counters["search_forks"])
    ROLLBACKS.set(counters["search_rollbacks"])
    TRIED.set(counters["search_tried"])
    MOVED.set(counters["search_moved_seats"])
    COPIED.set(counters["search_copied_blocks"])
    RECOMPUTED.set(counters["search_recomputed_tokens"])
    DECIDING.set(counters["search_seconds"])


def note_steering(entries: Iterable[Mapping[str, Any]]) -> None:
    """What the receipt of a finished request says of its steering."""
    doses = [entry["dose"]["relative"] for entry in entries if entry.get("dose")]
    if doses:
        DOSE.observe(max(doses))
    for fired in (entry["fired"] for entry in entries if "fired" in entry):
        CONDITIONAL.inc(fired["of"])
        FIRED.inc(fired["tokens"])


async def watch(plan: Watched | None, outputs: AsyncGenerator[Any, None]) -> AsyncGenerator[Any, None]:
    """Pass a generation's outputs on, timing them; `plan`, unless it is plain, notes each. Closing this closes
    `outputs`."""
    method, note = (plan.label, plan.note) if plan else (PLAIN, None)
    first, following = FIRST_TOKEN.labels(method), NEXT_TOKEN.labels(method)
    start = last = time.perf_counter()
    outcome, is_first = "aborted", True
    try:
        async with aclosing(outputs):
            async for output in outputs:
                now = time.perf_counter()
                (first if is_first else following).observe(now - last)
                last, is_first = now, False
                if note is not None:
                    note(output)
                if output.finished:
                    outcome = "finished"
                yield output
    except Exception:
        outcome = "error"
        raise
    finally:
        END_TO_END.labels(method).observe(time.perf_counter() - start)
        REQUESTS.labels(method, outcome).inc()
