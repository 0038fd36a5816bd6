"""Answers on their way out: server-sent events with explanations and a receipt, and warnings as a header."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any

from whipstaff.server.admission.explanations import ChoiceExplanations
from whipstaff.server.admission.receipt import RECEIPT_FIELD

_MAX_HEADER = 1000  # characters


def header_of(warnings: Iterable[str]) -> str:
    """Warnings as the value of a header: printable ASCII, and not long."""
    text = "; ".join(warnings).encode("ascii", "backslashreplace").decode()
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    return text if len(text) <= _MAX_HEADER else f"{text[: _MAX_HEADER - 4]} ..."


async def with_extras(
    chunks: AsyncGenerator[str, None],
    receipt: Callable[[], Awaitable[dict[str, Any]]],
    explained: ChoiceExplanations | None,
) -> AsyncGenerator[str, None]:
    """Server-sent events with explanations in every choice, and the receipt in the last data event before [DONE].
    Closing this closes `chunks`."""
    held: str | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.startswith("data: [DONE]") and held is not None:
                held = _changed(held, {RECEIPT_FIELD: await receipt()})
            if held is not None:
                yield held
            held = chunk if explained is None or chunk.startswith("data: [DONE]") else _changed(chunk, {}, explained)
    if held is not None:
        yield held


def _changed(event: str, more: dict[str, Any], explained: ChoiceExplanations | None = None) -> str:
    body = {**json.loads(event.removeprefix("data: ")), **more}
    if explained is not None:
        explained.add_to(body)
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
