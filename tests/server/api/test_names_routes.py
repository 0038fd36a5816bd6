"""The routes' part in names, without an engine: what is sent to it, and what is added to its answers."""

import json
from collections.abc import AsyncIterator, Iterator
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
from asking import assert_refused, ok
from catalogues import SHAPE, at_prompt
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from whipstaff.server.admission.prepare import prepare
from whipstaff.server.api import generate as routes
from whipstaff.server.engine.frontend import openai
from whipstaff.server.engine.frontend.requests import TextRequest, parse
from whipstaff.server.errors import WhipstaffError
from whipstaff.server.leases import NOTHING
from whipstaff.server.plan import RequestPlan
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset
from whipstaff.server.registry.vectors import VectorSnapshot

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"model": "base", "prompt": "a"},
    "/v1/chat/completions": {"model": "base", "messages": [{"role": "user", "content": "a"}]},
}
HEADER = "x-whipstaff-warnings"


class Answer(BaseModel):
    text: str = "said"


class Models:
    """What vLLM lists."""

    lora_requests: dict[str, Any] = {}  # noqa: RUF012 - empty

    def is_base_model(self, name: str) -> bool:
        return name in ("base", "org/base@v2")

    async def show_available_models(self) -> Any:
        cards = [SimpleNamespace(id=name, model_dump=dict) for name in ("base", "org/base@v2", "base@calm")]
        return SimpleNamespace(data=cards)


@pytest.fixture
def asked() -> list[Any]:
    """The requests that reached the engine's front end."""
    return []


@pytest.fixture
def http(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[httpx.Client]:
    app, caps = FastAPI(), Capabilities(VectorSnapshot({}, SHAPE), {})
    presets = {"calm": Preset.of("calm", {"forced": {"repeat_penalty": 1.5}})}

    async def current() -> Capabilities:
        return Capabilities(caps.registry, {}, presets=presets)

    async def answer(request: Any, raw: Any) -> Any:
        asked.append(request)
        return events() if request.stream else Answer()

    monkeypatch.setattr(openai, "answer", answer)
    app.state.whipstaff = SimpleNamespace(current=current, hold=lambda vectors: NOTHING.again())
    app.state.args = SimpleNamespace()
    app.state.openai_serving_models, app.state.engine_client = Models(), None
    app.state.enable_server_load_tracking = False
    app.include_router(routes.router)
    app.add_exception_handler(WhipstaffError, routes.answer_refusal)
    with TestClient(app) as client:
        yield cast(httpx.Client, client)  # Starlette's is of httpx2, which has the same names


async def events() -> AsyncIterator[str]:
    yield 'data: {"choices": []}\n\n'
    yield "data: [DONE]\n\n"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_unknown_names_are_told_of_in_receipt_and_header(http: httpx.Client, path: str, stream: bool) -> None:
    answer = http.post(path, json=BODIES[path] | {"stream": stream, "temprature": 1})
    said = "temprature did nothing: this route has no such field; did you mean temperature?"
    body = json.loads(answer.text.split("data: ")[1]) if stream else ok(answer)
    assert body["whipstaff"]["warnings"] == [said] and answer.headers[HEADER] == said
    plain = http.post(path, json=BODIES[path] | {"stream": stream, "store": True, "temprature": None})
    assert "whipstaff" not in plain.text and HEADER not in plain.headers
    refused = http.post(path, json=BODIES[path] | {"stream": stream, "temprature": 1, "on_unknown": "error"})
    assert_refused(refused, 400, "temprature")


@pytest.mark.parametrize("path", BODIES)
def test_other_servers_names_of_vllms_fields(http: httpx.Client, asked: list[Any], path: str) -> None:
    assert ok(http.post(path, json=BODIES[path] | {"repeat_penalty": 1.25})) == {"text": "said"}
    assert asked[-1].repetition_penalty == 1.25
    for more in ({"repeat_penalty": "x"}, {"repeat_penalty": 1.2, "repetition_penalty": 1.3}):
        assert_refused(http.post(path, json=BODIES[path] | more), 400, "repeat_penalty")
    forced = BODIES[path] | {"model": "base@calm"}
    assert ok(http.post(path, json=forced)) and asked[-1].repetition_penalty == 1.5
    for name in ("repeat_penalty", "repetition_penalty"):
        assert_refused(http.post(path, json=forced | {name: 1.0}), 400, name)


@pytest.mark.parametrize("path", BODIES)
def test_what_is_neutral_reaches_the_engine_as_a_plain_request(http: httpx.Client, asked: list[Any], path: str) -> None:
    fields = {"typical_p": 1, "mirostat_tau": 3, "steering": []}
    answer = http.post(path, json=BODIES[path] | fields)
    assert asked[-1].is_plain and len(ok(answer)["whipstaff"]["warnings"]) == 2
    hot = http.post(path, json=BODIES[path] | {"temperature": 3, "min_p": 0.1})
    assert ok(hot) and not asked[-1].is_plain
    assert_refused(http.post(path, json=BODIES[path] | {"temperature": 3}), 400, "temperature")


def test_a_model_is_found_by_its_whole_name(http: httpx.Client) -> None:
    for name in ("base", "org/base@v2", "base@calm"):
        assert http.get(f"/v1/models/{name}").status_code == 200
    assert_refused(http.get("/v1/models/org/base"), 404, "model")


def test_temperatures_that_vllm_does_not_take_travel_in_the_plan() -> None:
    request = parse(TextRequest, BODIES["/v1/completions"] | {"temperature": 3, "top_k": 4})
    compiled = prepare(request, Capabilities(VectorSnapshot({}, SHAPE), {}))
    assert compiled is not None
    request.attach(compiled)
    request.placed.append(at_prompt(compiled, Prompt(1, [5], 64, None)))
    params = request.to_sampling_params(5, {})
    plan = RequestPlan.from_wire(params.extra_args)
    assert plan is not None and plan.decoding is not None and plan.decoding.draw is not None
    draw = plan.decoding.draw
    assert (params.temperature, draw.temperature, draw.top_k, request.temperature) == (1.0, 3.0, 4, 3.0)


@pytest.mark.parametrize("path", BODIES)
def test_errors_in_vllm_xargs_say_so(http: httpx.Client, path: str) -> None:
    for xargs, param in (
        ({"steering": '{"vector": "nope"}'}, "steering.vector"),
        ({"dry_multiplier": -1}, "dry_multiplier"),
        ({"explain": "5"}, "explain"),
    ):
        answer = http.post(path, json=BODIES[path] | {"vllm_xargs": xargs})
        assert answer.json()["error"]["param"] == f"vllm_xargs.{param}"
        checked = http.post("/v1/steering/validate", json={"vllm_xargs": xargs})
        assert checked.json()["error"]["param"] == f"vllm_xargs.{param}"


def test_fields_alone_are_validated_with_their_preset(http: httpx.Client) -> None:
    ask = {"model": "base@calm", "dry_base": 2}
    assert ok(http.post("/v1/steering/validate", json=ask))["plan"]["preset"]["id"] == "calm"
    assert_refused(http.post("/v1/steering/validate", json=ask | {"repetition_penalty": 2}), 400, "repetition_penalty")
    assert_refused(http.post("/v1/steering/validate", json=ask | {"model": "base@nope"}), 404, "model")
