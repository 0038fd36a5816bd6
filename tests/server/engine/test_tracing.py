"""Where vLLM traces requests, the span of each says what it asked us for; a plain one's is vLLM's own."""

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from vllm import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestOutputCollector
from vllm.v1.metrics.stats import IterationStats

from whipstaff.server.engine.frontend import tracing
from whipstaff.server.engine.frontend.launch import Listening, PlanDict
from whipstaff.server.engine.patch import swap
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, RequestPlan

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"  # W3C's own example


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    """What a collector would get."""
    provider, exporter = TracerProvider(), InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing.install(provider)
    monkeypatch.setattr(trace, "get_tracer", provider.get_tracer)
    yield exporter
    provider.shutdown()


def processor(is_tracing: bool = True) -> Any:
    made: Any = OutputProcessor(None, log_stats=True, tracing_enabled=is_tracing)
    swap(made, Listening)
    return made


def finish(made: Any, **plans: PlanDict | None) -> None:
    """Requests of these plans in one batch, of one token each."""
    for name, plan in plans.items():
        params = SamplingParams(detokenize=False, extra_args=None if plan is None else {PLAN_KEY: plan})
        request = EngineCoreRequest(name, [1, 2], None, params, None, 0.0, None, None, None, external_req_id=name)
        made.add_request(request, None, None, 0, RequestOutputCollector(params.output_kind, name))
    outputs = [
        EngineCoreOutput(name, [5], finish_reason=FinishReason.LENGTH, trace_headers={"traceparent": PARENT})
        for name in plans
    ]
    made.process_outputs(outputs, 1.0, IterationStats())


def by_request(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    found = {str((span.attributes or {})["gen_ai.request.id"]): span for span in exporter.get_finished_spans()}
    assert len(found) == len(exporter.get_finished_spans())
    return found


def ours(span: ReadableSpan) -> dict[str, Any]:
    return {name: value for name, value in (span.attributes or {}).items() if name.startswith(tracing.PREFIX)}


def test_each_span_says_its_own_request(spans: InMemorySpanExporter) -> None:
    guided = RequestPlan(companions=(CompanionPlan((1, 2)),), readings_id="one").to_wire()
    asked = {"methods": ["caa", "cfg"], "preset": "gloomy"}
    finish(processor(), a=PlanDict(guided, asked=asked), b=PlanDict(RequestPlan().to_wire()), plain=None)
    found = by_request(spans)
    assert ours(found["a"]) == {
        "whipstaff.methods": ("caa", "cfg"),
        "whipstaff.preset": "gloomy",
        "whipstaff.sequences": 2,
        "whipstaff.plan_digest": tracing.digest(guided),
    }
    assert ours(found["b"]).keys() == {"whipstaff.plan_digest", "whipstaff.sequences"}
    assert ours(found["plain"]) == {}
    assert all((span.attributes or {})["gen_ai.usage.completion_tokens"] == 1 for span in found.values())
    assert all(span.parent and f"{span.parent.span_id:x}" in PARENT for span in found.values())


def test_what_begins_later_is_of_nobody(spans: InMemorySpanExporter) -> None:
    finish(processor(), a=PlanDict(RequestPlan().to_wire(), asked={"methods": ["caa"]}))
    trace.get_tracer("test").start_span("later", attributes={"gen_ai.request.id": "later"}).end()
    assert ours(by_request(spans)["later"]) == {}


def test_nobody_traces_who_was_not_told_to(spans: InMemorySpanExporter) -> None:
    finish(processor(is_tracing=False), a=PlanDict(RequestPlan().to_wire(), asked={"methods": ["caa"]}))
    assert spans.get_finished_spans() == ()


def test_a_digest_is_of_what_the_engine_is_to_do() -> None:
    """And not of the ids under which its client is told things."""
    one, same = (
        RequestPlan(readings_id=name, models=("tuned",), captures_id=name, max_fed=len(name)).to_wire()
        for name in ("one", "other")
    )
    assert tracing.digest(one) == tracing.digest(same) != tracing.digest(RequestPlan(models=("other",)).to_wire())


def test_without_a_tracer_it_does_not_go_on_in_silence() -> None:
    with pytest.raises(RuntimeError, match="vLLM has not made a tracer, but object"):
        tracing.install(object())
