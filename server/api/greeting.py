"""What a server says once it takes requests: where it is, what it has, and one request to try."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.api.method_table import method_table
from whipstaff.server.errors import WhipstaffError
from whipstaff.server.registry.capabilities import Capabilities

_PREFERRED = "caa"  # of methods whose vectors do something by themselves, the plainest


@dataclass(frozen=True)
class Place:
    """Where a server listens, and how it is asked."""

    url: str
    model: str
    has_key: bool  # whether requests need the user's
    num_servers: int = 1
    uncompiled: str | None = None  # why nothing is compiled, where nobody asked for that


def greeting(place: Place, caps: Capabilities, has_chat: bool) -> list[str]:
    """The lines."""
    table = method_table(caps, place.model)
    available = [method for method in table if method["available"]]
    fitting = len(caps.registry.names)
    servers = "" if place.num_servers == 1 else f" ({place.num_servers} API servers)"
    slow = f"whipstaff: {place.uncompiled}: nothing is compiled, and tokens take longer"
    return [
        *([slow] if place.uncompiled else []),
        f"whipstaff: listening on {place.url}{servers}; model {place.model!r}",
        f"whipstaff: {len(available)} of {len(table)} methods available, {fitting} vectors, "
        f"{len(caps.presets)} presets; {place.url}/v1/steering/methods says what the others need",
        f"whipstaff: try  {_curl(place, _body(place.model, caps, has_chat))}",
    ]


def _curl(place: Place, body: dict[str, Any]) -> str:
    path = "chat/completions" if "messages" in body else "completions"
    key = ' -H "Authorization: Bearer $VLLM_API_KEY"' if place.has_key else ""
    said = shlex.quote(json.dumps(body))
    return f"curl -s {place.url}/v1/{path} -H 'Content-Type: application/json'{key} -d {said}"


def _body(model: str, caps: Capabilities, has_chat: bool) -> dict[str, Any]:
    """A request that this server takes, which shows something where it can."""
    said = {"messages": [{"role": "user", "content": "Hello!"}]} if has_chat else {"prompt": "Hello"}
    extras = next((fields for fields in _extras(caps) if _is_taken(fields, caps)), {})
    return {"model": model, **said, "max_tokens": 32, **extras}


def _extras(caps: Capabilities) -> Iterator[dict[str, Any]]:
    usable = [entry for entry in caps.registry if entry.problem is None]
    for entry in sorted(usable, key=lambda entry: entry.vector.header.method != _PREFERRED):
        yield {"steering": {"vector": entry.name}}
    yield {"top_n_sigma": 1.0}


def _is_taken(fields: dict[str, Any], caps: Capabilities) -> bool:
    try:
        return compile_extras(fields, caps) is not None
    except WhipstaffError:
        return False
