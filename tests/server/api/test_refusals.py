"""What is wrong with a request is told with its field, also where vLLM breaks over it or does not say where."""

from collections.abc import Iterator
from typing import Any, cast

import httpx
import pytest
from asking import assert_refused
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.exceptions import HTTPException

from whipstaff.server.api import generate
from whipstaff.server.engine.frontend.blame import field_meant
from whipstaff.server.engine.frontend.requests import ChatRequest, TextRequest, parse
from whipstaff.server.errors import BadRequest

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Why?"}]}
TEXT: dict[str, Any] = {"model": "m", "prompt": "def"}
PART = {"type": "text", "text": "Why?"}


def said(content: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content, **more}]


@pytest.mark.parametrize("odd", [[1], 3, "x", 0.5, True])
def test_what_breaks_vllms_validators_is_told_by_field(odd: Any) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(ChatRequest, CHAT | {"temperature": 0.5, "structured_outputs": odd})
    assert refused.value.param == "structured_outputs"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        (True, "messages"),
        (None, "messages"),
        (3, "messages"),
        (said(["Why?"]), "messages[1].content[0]"),
        (said([PART, 3]), "messages[1].content[1]"),
        ([{"role": "assistant", "content": "x", "tool_calls": [1]}], "messages"),
    ],
)
def test_messages_are_looked_at_before_anything_is_done(messages: Any, param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        parse(ChatRequest, CHAT | {"messages": messages})
    assert refused.value.param == param


def test_what_is_blamed_is_the_field_alone_without_which_all_is_well() -> None:
    wrong = {"structured_outputs": {"0": {"regex": "a+"}}}  # and the prompt has to be there
    with pytest.raises(BadRequest) as refused:
        parse(TextRequest, TEXT | wrong)
    assert refused.value.param == "structured_outputs"
    assert parse(ChatRequest, CHAT | {"messages": said([PART])}).messages[1]["content"] == [PART]


@pytest.mark.parametrize(
    ("fields", "message", "param"),
    [
        ({"n": 2}, "n must be 1 when using greedy sampling, got 2.", "n"),
        ({}, "n must be 1 when using greedy sampling, got 2.", None),
        (
            {"structured_outputs": {"regex": "a"}},
            "Failed to transform json schema into a grammar: no",
            "structured_outputs",
        ),
        (
            {"response_format": {"type": "text"}},
            "Failed to transform json schema into a grammar: no",
            "response_format",
        ),
        ({"min_tokens": 3}, "at most 2 min tokens are taken", "min_tokens"),
        ({"stop": "a", "user": "b"}, "the user is to stop", None),
        ({"prompt": [1 << 70]}, f"Token id {1 << 70} is out of vocabulary", "prompt"),
    ],
)
def test_vllms_sentences_are_about_fields(fields: dict[str, Any], message: str, param: str | None) -> None:
    assert field_meant(message, parse(TextRequest, TEXT | fields)) == param


@pytest.fixture
def http() -> Iterator[httpx.Client]:
    app = FastAPI()

    @app.post("/v1/completions")
    async def take(body: dict[str, Any], raw: Request) -> dict[str, Any]:
        return body

    app.add_exception_handler(HTTPException, generate.answer_http_error)
    with TestClient(app) as client:
        yield cast(httpx.Client, client)


def test_what_no_route_is_for_is_refused_in_openais_shape(http: httpx.Client) -> None:
    assert_refused(http.get("/v1/nothing"), 404, None)
    assert_refused(http.get("/v1/completions"), 405, None)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ('{"a": 1, "seed": %s}', "seed"),
        ('{"a": 1, "steering": [{"scale": %s}]}', "steering"),
        ("[%s]", None),
    ],
)
def test_numbers_without_end_are_told_by_field(http: httpx.Client, body: str, param: str | None) -> None:
    sent = {"content": body % ("1" * 5000), "headers": {"content-type": "application/json"}}
    assert_refused(http.post("/v1/completions", **sent), 400, param)  # type: ignore[arg-type]
