"""Half of a surrogate pair is no character: JSON can write one, and nothing that handles text could answer it."""

import re
from collections import deque
from typing import Any

from fastapi import Request

from whipstaff.server.errors import BadRequest

_HALF = re.compile("[\ud800-\udfff]")


async def check_text(raw: Request) -> None:
    """A dependency of every route that takes JSON. Raises: BadRequest naming the field."""
    if "json" not in raw.headers.get("content-type", ""):
        return
    data = await raw.body()
    if b"\\ud" not in data.lower() and b"\xed" not in data:  # how halves are written, and other characters, too
        return
    try:
        body = await raw.json()
    except (ValueError, RecursionError):
        return  # the route's own business
    check_characters(body)


def check_characters(value: Any, path: str = "") -> None:
    """Raises: BadRequest naming the first field, below `path`, whose text or name holds a lone surrogate."""
    pending = deque([(path, value)])
    while pending:
        path, value = pending.popleft()
        texts = [value] if isinstance(value, str) else value if isinstance(value, dict) else ()
        if any(_HALF.search(text) for text in texts):
            raise BadRequest("half of a surrogate pair is no character", path or None)
        if isinstance(value, dict):
            pending.extend((f"{path}.{name}" if path else name, one) for name, one in value.items())
        elif isinstance(value, list):
            pending.extend((f"{path}[{index}]", one) for index, one in enumerate(value))
