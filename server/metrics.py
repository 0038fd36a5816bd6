"""Every series of our own that /metrics exports, beside vLLM's.

Labels come from closed sets: methods' and presets' names, outcomes, reasons. No user, key, vector, text or request is
ever one. What only the engine knows is read by one API server, now and then (`WorkerCounts`): others would count it
again, and a scrape waits for nobody.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping
from contextlib import aclosing, contextmanager
from typing import Any, Protocol

from prometheus_client import Counter, Gauge, Histogram

from whipstaff.server.errors import WhipstaffError

# Seconds. Neighbours differ by at most 2.5, since a quantile is no better than that; every goal that a dashboard offers
# is a bound, since a share within a goal is read off one.
REQUEST_BUCKETS = (
    *(0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1, 1.5, 2.5, 5, 10, 30, 60, 120, 300),
)
TOKEN_BUCKETS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5),
)
ADMISSION_BUCKETS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1)
DOSE_BUCKETS = (0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 100)

PLAIN = "plain"  # the method of requests of which the engine does nothing differently
SEVERAL, MIXED = "several", "mixed"  # of those with several methods of one side; of those with steering and decoding
ABORTED, CUT, ERROR = "aborted", "cut", "error"  # the client left; the server ended it; something went wrong
OUTCOMES = ("stop", "length", "repetition", CUT, ERROR)  # a request's is the last that one of its sequences has
_OF_ENGINE = {"abort": CUT}  # whoever still reads when the engine aborts did not leave
REASONS = {  # of refusals, by HTTP status
    400: "bad_value",
    401: "unauthorized",
    403: "policy",
    404: "unknown_name",
    405: "bad_value",
    408: "bad_value",
    409: "conflict",
    413: "too_large",
    415: "bad_value",
    422: "unavailable",
    429: "rate_requests",
    503: "queue_full",
}
LIMITS = ("rate_requests", "rate_tokens", "rate_cost", "concurrency")  # what of a key's is used up
DRAINING_REASON = "draining"  # of what comes to a server that is about to end
REFUSED = "whipstaff_refused"  # the key in a request's scope under which an error of ours is kept
TOLD_EVERY = 1.0  # seconds between two counts of a generation's tokens
MAX_PRESETS = 100  # that are told apart
OTHER = "other"


class Watched(Protocol):
    """A plan as the engine's front end carries it."""

    label: str  # its methods
    note: Callable[[Any], None] | None  # called with each output

    @property
    def num_computed(self) -> int:
        """Tokens that its sequences have computed so far."""


def _gauge(name: str, what: str, labels: Iterable[str] = ()) -> Gauge:
    """A number that is the same whichever API server says it: the last one said."""
    return Gauge(name, what, labels, multiprocess_mode="mostrecent")


REQUESTS = Counter("whipstaff_requests", "Generations by method and outcome", ["method", "outcome"])
FIRST_TOKEN = Histogram(
    "whipstaff_time_to_first_token_seconds", "Time to first token by method", ["method"], buckets=REQUEST_BUCKETS
)
NEXT_TOKEN = Histogram(
    "whipstaff_inter_token_latency_seconds",
    "Time between tokens by method; of an answer that is not streamed, its mean for each token",
    ["method"],
    buckets=TOKEN_BUCKETS,
)
END_TO_END = Histogram(
    "whipstaff_e2e_request_latency_seconds", "Time from arrival to last token of generations that came to an end",
    ["method"], buckets=REQUEST_BUCKETS,
)  # fmt: skip
GENERATED = Counter("whipstaff_generated_tokens", "Tokens of answers by method", ["method"])
COMPUTED = Counter(
    "whipstaff_computed_tokens",
    "Tokens that were computed for those of answers, further sequences' and those that were tried included",
    ["method"],
)  # fmt: skip
PRESETS = Counter("whipstaff_preset_requests", "Requests that named a preset", ["preset"])
PRESET_TIME = Histogram(
    "whipstaff_preset_e2e_request_latency_seconds", "Time from arrival to the end of the answer by preset", ["preset"],
    buckets=REQUEST_BUCKETS,
)  # fmt: skip
ADMISSION = Histogram(
    "whipstaff_admission_seconds", "Time to check and compile the extra fields of a request", ["kind"],
    buckets=ADMISSION_BUCKETS,
)  # fmt: skip
REFUSALS = Counter("whipstaff_refusals", "Requests that were answered with an error of theirs, by reason", ["reason"])
CONDITIONAL = Counter("whipstaff_conditional_tokens", "Tokens of conditional edits where the condition is known")
FIRED = Counter("whipstaff_conditional_tokens_open", "Those of them that were edited")
DOSE = Histogram(
    "whipstaff_dose", "Largest edit of each steered request, relative to the activations that it edits",
    buckets=DOSE_BUCKETS,
)  # fmt: skip
REGISTRY_CHANGES = Counter(
    "whipstaff_registry_changes", "Changes of the registry that an administrator asked for",
    ["kind", "action", "outcome"],
)  # fmt: skip
FITS = Counter("whipstaff_fits", "Fits that an administrator asked for, by how they ended", ["method", "outcome"])
FITS_RUNNING = Gauge("whipstaff_fits_running", "Fits at work", multiprocess_mode="livesum")
FIT_TEXTS = Counter("whipstaff_fit_texts", "Texts that fits had the model read")
AUDIT_LOST = Counter("whipstaff_audit_lost", "Lines of the audit log that could not be written")
VECTORS = _gauge("whipstaff_vectors_loaded", "Vectors that fit the served model")
SLOTS = _gauge("whipstaff_slots", "Distinct steering configurations that may be in use at once")
SELF_TEST = _gauge("whipstaff_selftest_ok", "1 once every hook was seen to obey; a server where one does not ends")
DRAINING = Gauge(
    "whipstaff_draining", "1 once the server was told to end: running answers go on, nothing new is taken",
    multiprocess_mode="max",
)  # fmt: skip
STARTED = _gauge("whipstaff_start_time_seconds", "When the server was started, in seconds since 1970")
BUILD = _gauge("whipstaff_build_info", "1, with what is served by what", ["version", "vllm", "device", "mode"])

# ---- what the engine counts

SLOTS_IN_USE = _gauge("whipstaff_slots_in_use", "Slots of running requests")
WAITING = _gauge("whipstaff_requests_waiting_for_slots", "Requests whose steering does not fit beside what is running")
SLOT_WAIT = Histogram(
    "whipstaff_slot_wait_seconds", "Time that requests waited for slots, of those that had to", buckets=REQUEST_BUCKETS
)
CAPTURES_HELD = _gauge("whipstaff_captures_held", "Finished sequences whose activations nobody took yet")
HELD = _gauge("whipstaff_vectors_held", "Vectors in the workers; those of running requests stay when replaced")
UPLOADS = Counter("whipstaff_table_uploads", "Configurations written into the tables of edits")
UPLOADED = Counter("whipstaff_table_upload_bytes", "Bytes written into the tables of edits")
COMPANIONS = _gauge("whipstaff_group_sequences_running", "Sequences that run beside a request's own to guide it")
GROUP_STEPS = Counter(
    "whipstaff_group_steps", "Steps of requests with further sequences: taken together, or held by one that was late",
    ["state"],
)  # fmt: skip
PREEMPTED = Counter("whipstaff_group_preempted", "Preemptions of requests with further sequences")
HALF = Counter(
    "whipstaff_groups_half_scheduled", "Steps that took some sequences of a request only: a bug if not 0"
)  # fmt: skip
AUX_STEPS = Counter("whipstaff_aux_steps", "Steps of each auxiliary model, by whether it had to run", ["ran"])
LOOKAHEAD = Counter("whipstaff_lookahead_passes", "Forward passes over tokens that were tried")
CACHE_QUERIES = Counter(
    "whipstaff_prefix_cache_queries", "Tokens of prompts that were looked for in the prefix cache", ["traffic"]
)
CACHE_HITS = Counter("whipstaff_prefix_cache_hits", "Those of them that were found there", ["traffic"])
SEARCHES = _gauge("whipstaff_searches_running", "Requests that search")
SEARCH_SEQUENCES = _gauge("whipstaff_search_sequences_living", "Sequences that searches have alive")
FORKS = Counter("whipstaff_search_forks", "Sequences that went on from one that another went on from, too")
ROLLBACKS = Counter("whipstaff_search_rollbacks", "Times that a search took tokens back")
TRIED = Counter("whipstaff_search_tried_tokens", "Tokens that searches fed to see what they lead to")
MOVED = Counter("whipstaff_search_moved_sequences", "Sequences that were put in the place of another")
COPIED = Counter("whipstaff_search_copied_blocks", "Blocks of KV cache that were copied for a fork")
RECOMPUTED = Counter("whipstaff_search_recomputed_tokens", "Tokens that a search had to compute once more")
DECIDING = Counter("whipstaff_search_decision_seconds", "Time that decisions took, with what they tried")

# By the name that the worker counts it under (`SteeredWorker.whipstaff_counters`): a number, or a mapping from the
# values of the one label to numbers. Whoever counts something new in the engine adds a line here.
WORKER_COUNTERS: Mapping[str, Counter] = {
    "table_uploads": UPLOADS,
    "table_upload_bytes": UPLOADED,
    "group_steps": GROUP_STEPS,
    "groups_preempted": PREEMPTED,
    "groups_half_scheduled": HALF,
    "auxiliary_steps": AUX_STEPS,
    "lookahead_passes": LOOKAHEAD,
    "prefix_cache_queries": CACHE_QUERIES,
    "prefix_cache_hits": CACHE_HITS,
    "search_forks": FORKS,
    "search_rollbacks": ROLLBACKS,
    "search_tried": TRIED,
    "search_computed": COMPUTED,  # beside what is counted of other requests as their outputs pass by
    "search_moved_seats": MOVED,
    "search_copied_blocks": COPIED,
    "search_recomputed_tokens": RECOMPUTED,
    "search_seconds": DECIDING,
}
WORKER_GAUGES: Mapping[str, Gauge] = {
    "slots_in_use": SLOTS_IN_USE,
    "requests_waiting_for_slots": WAITING,
    "vectors_held": HELD,
    "captures_held": CAPTURES_HELD,
    "companions_running": COMPANIONS,
    "searches_running": SEARCHES,
    "search_sequences_living": SEARCH_SEQUENCES,
}

# A counter that is born with 1 has no rate: what everybody looks at is there from the start.
for _reason in (*REASONS.values(), *LIMITS, DRAINING_REASON):
    REFUSALS.labels(_reason)
for _outcome in (*OUTCOMES, ABORTED):
    REQUESTS.labels(PLAIN, _outcome)
for _series in (FIRST_TOKEN, NEXT_TOKEN, END_TO_END, GENERATED, COMPUTED):
    _series.labels(PLAIN)


class WorkerCounts:
    """What a worker said that it has counted since it started, as series of this process."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], float] = {}
        self._num_waits = 0

    def note(self, said: Mapping[str, Any]) -> None:
        for name, gauge in WORKER_GAUGES.items():
            gauge.set(said[name])
        for name, counter in WORKER_COUNTERS.items():
            if isinstance(said[name], Mapping):
                for label, count in said[name].items():
                    counter.labels(label).inc(self._more((name, label), count))
            else:
                counter.inc(self._more((name, ""), said[name]))
        waits, num = said["slot_waits"], said["num_slot_waits"]
        for wait in waits[max(len(waits) - (num - self._num_waits), 0) :]:
            SLOT_WAIT.observe(wait)
        self._num_waits = num

    def _more(self, key: tuple[str, str], count: float) -> float:
        """How many came since the last time."""
        before, self._seen[key] = self._seen.get(key, 0.0), count
        return max(count - before, 0.0)


# ---- requests


def note_steering(entries: Iterable[Mapping[str, Any]]) -> None:
    """What the receipt of a finished request says of its steering."""
    doses = [entry["dose"]["relative"] for entry in entries if entry.get("dose")]
    if doses:
        DOSE.observe(max(doses))
    for fired in (entry["fired"] for entry in entries if "fired" in entry):
        CONDITIONAL.inc(fired["of"])
        FIRED.inc(fired["tokens"])


def note_status(status: int, reason: str | None = None) -> None:
    """Of an answer: whether it refused the request, and why, where the status alone does not say."""
    if status in REASONS:
        REFUSALS.labels(reason or REASONS[status]).inc()


def note_admission(started: float, has_steering: bool, has_decoding: bool) -> None:
    """A request's extra fields were compiled, from `started` by `time.perf_counter` on."""
    if has_steering or has_decoding:
        kind = "both" if has_steering and has_decoding else "steering" if has_steering else "decoding"
        ADMISSION.labels(kind).observe(time.perf_counter() - started)


@contextmanager
def registry_change(kind: str, action: str) -> Iterator[Callable[[str], None]]:
    """Count a change of the registry; what is yielded tells that it was another action."""
    said, outcome = [action], ERROR
    try:
        yield said.append
        outcome = "done"
    except WhipstaffError:
        outcome = "refused"
        raise
    finally:
        REGISTRY_CHANGES.labels(kind, said[-1], outcome).inc()


_presets: set[str] = set()


class PresetTime:
    """Of one request that named a preset, from now on."""

    def __init__(self, name: str) -> None:
        if len(_presets) < MAX_PRESETS:
            _presets.add(name)
        self._label, self._started = name if name in _presets else OTHER, time.perf_counter()
        PRESETS.labels(self._label).inc()

    def end(self) -> None:
        """The answer is complete."""
        PRESET_TIME.labels(self._label).observe(time.perf_counter() - self._started)

    async def over(self, events: AsyncIterator[Any]) -> AsyncGenerator[Any, None]:
        """Pass the events of a stream on; the answer is complete with the last."""
        async for event in events:
            yield event
        self.end()


class _Generation:
    """One generation, as its outputs pass by."""

    def __init__(self, method: str, plan: Watched | None = None) -> None:
        self.outcome = ABORTED
        self._started = time.perf_counter()
        self._method, self._plan = method, plan
        self._first, self._next = FIRST_TOKEN.labels(method), NEXT_TOKEN.labels(method)
        self._generated, self._computed = GENERATED.labels(method), COMPUTED.labels(method)
        self._last: dict[int, float] = {}  # by sequence, when its last token came
        self._num: dict[int, int] = {}  # by sequence, how many have come
        self._told, self._told_at = (0, 0), self._started  # generated and computed tokens that were counted, and when
        self._reasons: set[str] = set()

    def note(self, output: Any) -> None:
        """One of vLLM's outputs: what came since the one before, or the whole answer."""
        now = time.perf_counter()
        if not self._num and output.metrics is not None:  # the prompt was made before vLLM was asked to go on from it
            self._started = min(self._started, now - (time.time() - output.metrics.arrival_time))
        for sequence in output.outputs:
            if sequence.finish_reason:
                self._reasons.add(_OF_ENGINE.get(sequence.finish_reason, sequence.finish_reason))
            if num := len(sequence.token_ids):
                self._note_tokens(output, sequence.index, num, now)
        if output.finished:
            self.outcome = max(self._reasons, key=OUTCOMES.index, default=CUT)

    def _note_tokens(self, output: Any, index: int, num: int, now: float) -> None:
        before, decoding = self._num.get(index, 0), 0.0  # seconds since the sequence's first token
        if before:
            for _ in range(num):  # they came at once: because several were drawn, or because nobody took the first
                self._next.observe((now - self._last[index]) / num)
        elif num > 1 and output.metrics is not None:  # when they were made, vLLM tells
            told = output.metrics
            decoding = told.last_token_ts - told.first_token_ts
            for _ in range(num - 1):  # of several answers it tells one's number, which may be the smaller
                self._next.observe(decoding / (max(told.num_generation_tokens, num) - 1))
        if not self._last and (num == 1 or output.metrics is not None):
            self._first.observe(now - self._started - decoding)
        self._last[index], self._num[index] = now, before + num
        if now > self._told_at + TOLD_EVERY:
            self._tell(now)

    def _tell(self, now: float) -> None:
        """Count the tokens that came since the last time: one by one they would cost more than to be timed."""
        generated = sum(self._num.values())
        computed = generated if self._plan is None else self._plan.num_computed
        self._generated.inc(generated - self._told[0])
        self._computed.inc(computed - self._told[1])
        self._told, self._told_at = (generated, computed), now

    def end(self) -> None:
        self._tell(0.0)
        REQUESTS.labels(self._method, self.outcome).inc()
        if self.outcome not in (ABORTED, CUT, ERROR):
            END_TO_END.labels(self._method).observe(time.perf_counter() - self._started)


async def watch(
    plan: Watched | None, outputs: AsyncGenerator[Any, None], refusals: tuple[type[Exception], ...] = ()
) -> AsyncGenerator[Any, None]:
    """Pass a generation's outputs on, timing them; `plan`, unless it is plain, notes each. Closing this closes
    `outputs`. What ends with one of `refusals` never began."""
    generation = _Generation(plan.label if plan else PLAIN, plan)
    note, is_refused = plan.note if plan else None, False
    try:
        async with aclosing(outputs):
            async for output in outputs:
                generation.note(output)
                if note is not None:
                    note(output)
                yield output
    except refusals:
        is_refused = True
        raise
    except Exception:
        generation.outcome = ERROR
        raise
    finally:
        if not is_refused:
            generation.end()


class Refusals:
    """Laid around the application: counts every answer that refuses a request, ours and vLLM's. The check of keys is
    inside."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(scope.get("root_path", "") + "/v1/"):
            await self._app(scope, receive, send)
            return

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                note_status(message["status"], getattr(scope.get(REFUSED), "reason", None))
            await send(message)

        await self._app(scope, receive, noting)
