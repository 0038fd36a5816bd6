"""The first step of admission: the fields of a request as values, wherever in its JSON, or in a JSON string, they came.

vLLM's `vllm_xargs` takes scalars and lists of them only, so there an object or a list is a string that holds JSON.
"""

import json
import re
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

from pydantic import TypeAdapter, ValidationError

from whipstaff.server import plan as plans
from whipstaff.server.errors import BadRequest, bad_field, no_entry
from whipstaff.server.names import FIELDS, TEXTS

OnUnavailable = Literal["error", "ignore"]
OnUnknown = Literal["warn", "error"]
_HALF = re.compile("[\ud800-\udfff]")


@runtime_checkable
class AskedRequest(Protocol):
    """What admission reads of a parsed request, whichever API it came by. vLLM's fields have vLLM's names; the others
    are what a request says of itself, since APIs write it differently."""

    # vLLM's
    @property
    def model_extra(self) -> dict[str, Any] | None: ...
    @property
    def vllm_xargs(self) -> Any: ...
    @property
    def n(self) -> int | None: ...
    @property
    def temperature(self) -> float | None: ...
    @property
    def use_beam_search(self) -> bool: ...
    @property
    def length_penalty(self) -> float: ...
    @property
    def stream(self) -> bool | None: ...
    @property
    def repetition_detection(self) -> Any: ...

    # its own
    @property
    def is_hot(self) -> bool: ...
    @property
    def truncates(self) -> bool: ...
    @property
    def has_grammar(self) -> bool: ...
    @property
    def stops_at_text(self) -> bool: ...
    @property
    def scores_prompt(self) -> bool: ...
    @property
    def echoes_scores(self) -> bool: ...
    @property
    def logprobs_field(self) -> str: ...
    @property
    def draw_fields(self) -> list[str]: ...
    @property
    def unknown_names(self) -> list[str]: ...
    @classmethod
    def known_names(cls) -> frozenset[str]: ...
    def said(self, names: Iterable[str]) -> dict[str, Any]: ...


def ours_in(xargs: Any) -> frozenset[str]:
    """Our fields that came in a request's vllm_xargs."""
    return frozenset(xargs).intersection(FIELDS) if isinstance(xargs, dict) else frozenset()


def fields_of(request: AskedRequest) -> dict[str, Any]:
    """The fields of a parsed request that vLLM does not know, taken out of its vllm_xargs. Raises: BadRequest."""
    present = {name: getattr(request, name, None) for name in FIELDS} | (request.model_extra or {})
    return with_xargs(present, request.vllm_xargs)


def with_xargs(fields: dict[str, Any], xargs: Any) -> dict[str, Any]:
    """The extra fields, from the top level of a request and out of its vllm_xargs. Raises: BadRequest."""
    if not isinstance(xargs, dict):
        return fields
    if plans.PLAN_KEY in xargs:
        raise BadRequest("reserved: send `steering` and `decoding` instead", f"vllm_xargs.{plans.PLAN_KEY}")
    for name in FIELDS:
        if name in xargs and fields.get(name) is not None:
            raise BadRequest(f"{name} is given twice, at the top level and in vllm_xargs", f"vllm_xargs.{name}")
    return fields | {name: _scalar(name, xargs.pop(name)) for name in FIELDS if name in xargs}


def _scalar(name: str, value: Any) -> Any:
    """A value of vllm_xargs; of a field that takes texts, a string is one that holds a list."""
    return loose(value) if name in TEXTS and isinstance(value, str) and value.startswith("[") else value


def unpacked(name: str, value: Any) -> Any:
    """A field's value, or what its string of JSON holds, unless the field takes texts."""
    return value if name in TEXTS else loose(value)


def loose(value: Any) -> Any:
    """What a JSON string holds, or the string if it is none, such as `low`."""
    try:
        return from_json(value, "")
    except BadRequest:
        return value


def from_json(value: Any, name: str) -> Any:
    """A value, or what a JSON string holds. Raises: BadRequest."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"not JSON: {error}", name) from None
    check_characters(found, name)
    return found


def one_of(choices: Any, fields: Mapping[str, Any], name: str, default: str) -> Any:
    """A field that says one of a Literal's words. Raises: BadRequest."""
    value = fields.get(name)
    try:
        return TypeAdapter(choices).validate_python(default if value is None else value)
    except ValidationError as error:
        raise bad_field(error, value, name) from None


def flag(fields: Mapping[str, Any], name: str) -> bool:
    """Raises: BadRequest."""
    value = loose(fields.get(name))
    if value not in (None, False, True):  # 0 and 1 too: what vLLM's xargs make of the two
        raise BadRequest("true or false", name)
    return bool(value)


def entries_in(value: Any, name: str, most: int) -> list[tuple[str, Any]]:
    """A field's entries by their paths: a list's, a single object, or either in a JSON string. Raises: BadRequest."""
    if isinstance(value, str) and value.strip()[:1] not in ("{", "[", '"'):
        raise no_entry(value, name, "method" if name == "decoding" else "vector")
    return entries_at(from_json(value, name), name, most)


def entries_at(value: Any, path: str, most: int) -> list[tuple[str, Any]]:
    """Entries by their paths: a list's, or a single object. Raises: BadRequest."""
    if value is None:
        return []
    if not isinstance(value, list):
        return [(path, value)]
    if len(value) > most:
        raise BadRequest(f"{len(value)} entries; at most {most} are taken", path)
    return [(f"{path}[{index}]", entry) for index, entry in enumerate(value)]


def check_characters(value: Any, path: str = "") -> None:
    """Half of a surrogate pair is no character: JSON can write one, and nothing that handles text could answer it.

    Raises: BadRequest naming the first field, below `path`, whose text or name holds one.
    """
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
