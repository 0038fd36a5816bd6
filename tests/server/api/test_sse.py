"""What is added to answers on their way out."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

from whipstaff.server.api.sse import JsonAnswer, Retractions, header_of, to_json, with_extras


def test_a_header_is_ascii_and_bounded() -> None:
    value = header_of(["naïve\r\nSet-Cookie: x", "y" * 5000])
    assert value.isascii() and value.isprintable() and len(value) == 1000 and value.startswith("na\\xefve  Set")


def test_what_is_taken_back_is_said_between_what_was_and_what_is_said() -> None:
    retractions = Retractions()

    async def chunks() -> AsyncGenerator[str, None]:
        for text, taken_back in (("one", 0), ("on", 3), ("ce", 0), ("", 2)):
            if taken_back:
                retractions.note(1, taken_back)
            yield f"data: {json.dumps({'id': 'x', 'choices': [{'text': text}]})}\n\n"
        yield "data: [DONE]\n\n"

    async def finish(body: dict[str, Any]) -> None:
        body["whipstaff"] = {"done": True}

    async def everything() -> list[Any]:
        found = [event async for event in with_extras(chunks(), finish, None, retractions)]
        assert found.pop() == "data: [DONE]\n\n"
        return [json.loads(event.removeprefix("data: ")) for event in found]

    said = asyncio.run(everything())
    assert [one["choices"][0]["text"] if one["choices"] else one["whipstaff"]["retracted"] for one in said] == [
        "one",
        [{"index": 1, "characters": 3}],
        "on",
        "ce",
        [{"index": 1, "characters": 2}],
        "",
    ]
    assert said[-1]["whipstaff"] == {"done": True} and all(one["id"] == "x" for one in said)


def test_every_answer_is_json_whatever_the_model_computed() -> None:
    body = {"choices": [{"explain": [{"kl": float("nan"), "at": (1.5, float("-inf"))}], "text": "é\ud800"}], "n": 2}
    whole = {"choices": [{"explain": [{"kl": None, "at": [1.5, None]}], "text": "é\ud800"}], "n": 2}
    answer = JsonAnswer(body)
    for text in (to_json(body), bytes(answer.body).decode()):
        assert json.loads(text, parse_constant=lambda name: name) == whole and "é" in text
