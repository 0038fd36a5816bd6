"""Answers on their way out: server-sent events with explanations and a receipt, and warnings as a header."""

import json
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator
from contextlib import aclosing
from functools import partial
from typing import Any

from fastapi.responses import JSONResponse

from whipstaff.server.admission.explanations import ChoiceExplanations
from whipstaff.server.admission.receipt import RECEIPT_FIELD

_MAX_HEADER = 1000  # characters


def header_of(warnings: Iterable[str]) -> str:
    """Warnings as the value of a header: printable ASCII, and not long."""
    text = "; ".join(warnings).encode("ascii", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= _MAX_HEADER else f"{text[: _MAX_HEADER - 4]} ..."


class Retractions:
    """What is taken back of choices, until a stream says so."""

    def __init__(self) -> None:
        self._new: list[dict[str, int]] = []

    def note(self, choice: int, num_characters: int) -> None:
        self._new.append({"index": choice, "characters": num_characters})

    def before(self, chunk: str) -> Iterator[str]:
        """The event that has to come before a chunk, if any, with what all chunks of the stream say."""
        if self._new and not chunk.startswith("data: [DONE]"):
            said, self._new = self._new, []
            more = {"choices": [], RECEIPT_FIELD: {"retracted": said}}
            body = _body(chunk)
            yield _event({name: body[name] for name in ("id", "object", "created", "model") if name in body} | more)


async def with_extras(
    chunks: AsyncGenerator[str, None],
    finish: Callable[[dict[str, Any]], Awaitable[None]],
    explained: ChoiceExplanations | None,
    retractions: Retractions,
) -> AsyncGenerator[str, None]:
    """Server-sent events with explanations in every choice, what is taken back of them between these, and the receipt
    that `finish` puts into the last data event before [DONE]. Closing this closes `chunks`."""
    held: str | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.startswith("data: [DONE]") and held is not None:
                last = _body(held)
                await finish(last)
                held = _event(last)
            if held is not None:
                yield held
            for event in retractions.before(chunk):
                yield event
            held = chunk if explained is None or chunk.startswith("data: [DONE]") else _explained(chunk, explained)
    if held is not None:
        yield held


def _explained(event: str, explained: ChoiceExplanations) -> str:
    body = _body(event)
    explained.add_to(body)
    return _event(body)


def _body(event: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(event.removeprefix("data: "))
    return said


def _event(body: dict[str, Any]) -> str:
    return f"data: {to_json(body)}\n\n"


def read_event(event: str) -> tuple[str, Callable[[], dict[str, Any]]]:
    """The name of an event that has one, and what reads its data."""
    head, _, data = event.partition("\ndata: ")
    return head.removeprefix("event: "), partial(json.loads, data)


def event_of(name: str, body: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {to_json(body)}\n\n"


def to_json(body: Any) -> str:
    """JSON has neither NaN nor infinities: null stands for those, as in vLLM's own chunks. They come of a model that
    computes them, and of divergences from what gives a token no chance. Halves of characters are escaped."""
    dump = partial(json.dumps, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    try:
        text = dump(body)
    except ValueError:
        text = dump(_finite(body))
    return text.encode("utf-8", "backslashreplace").decode()


def _finite(value: Any) -> Any:
    match value:
        case float():
            return value if math.isfinite(value) else None
        case dict():
            return {name: _finite(one) for name, one in value.items()}
        case list() | tuple():
            return [_finite(one) for one in value]
    return value


class JsonAnswer(JSONResponse):
    """A whole answer, which is sent whatever the model computed."""

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()
