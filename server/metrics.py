"""Every series of our own that /metrics exports, beside vLLM's; labels hold names of our own only, so they are few."""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from prometheus_client import Counter, Gauge, Histogram

TOKEN_BUCKETS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

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
VECTORS = Gauge("whipstaff_vectors_loaded", "Vectors that fit the served model")


async def watch(
    method: str, outputs: AsyncGenerator[Any, None], note: Callable[[Any], None] | None
) -> AsyncGenerator[Any, None]:
    """Pass a generation's outputs on, timing them under `method`; `note` sees each. Closing this closes `outputs`."""
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
