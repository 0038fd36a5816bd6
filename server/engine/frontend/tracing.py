"""What the span of a request says of us, where vLLM traces requests (`--otlp-traces-endpoint`): methods, plan, preset.

vLLM makes one span of each request once it is over (`OutputProcessor.do_tracing`), as a child of the client's, where
that sends `traceparent`. A processor of spans adds to it what the request asked for.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.trace import Span, SpanProcessor, TracerProvider

from whipstaff.server.plan import configuration

PREFIX = "whipstaff."
_attributes: ContextVar[Mapping[str, str | int | Sequence[str]] | None] = ContextVar("whipstaff_span", default=None)


class Attributes(SpanProcessor):
    """Adds to each span what is to be said while it begins."""

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        if (attributes := _attributes.get()) is not None:
            span.set_attributes(attributes)


def install(provider: Any = None) -> None:
    """Once vLLM has made its tracer; `provider` in place of the process's own."""
    provider = trace.get_tracer_provider() if provider is None else provider
    if not isinstance(provider, TracerProvider):  # then no span would say anything of us
        raise RuntimeError(f"--otlp-traces-endpoint: vLLM has not made a tracer, but {type(provider).__name__}")
    provider.add_span_processor(Attributes())


@contextmanager
def said_of(plan: Mapping[str, Any], asked: Mapping[str, Any]) -> Iterator[None]:
    """Spans that begin in here are of a request with this plan, in wire form, which `asked` for methods by name."""
    token = _attributes.set(
        {f"{PREFIX}{name}": value for name, value in asked.items()}
        | {f"{PREFIX}plan_digest": digest(plan), f"{PREFIX}sequences": 1 + len(plan["companions"])}
    )
    try:
        yield
    finally:
        _attributes.reset(token)


def digest(plan: Mapping[str, Any]) -> str:
    """SHA-256 of what the engine is to do: requests of one digest differ in prompt and sampling parameters alone."""
    return hashlib.sha256(json.dumps(configuration(plan), sort_keys=True, default=repr).encode()).hexdigest()
