"""What can be wrong with a request, and the HTTP answer to each; and what a server cannot be started with.

WhipstaffError
 |- BadRequest      400  a value that no server would take
 |- Unauthorized    401  no admin key, or a wrong one
 |- Forbidden       403  a route that this server was started without
 |- NotFound        404  a name that this server does not have
 |- TimedOut        408  a body that does not come to its end
 |- VectorUnfit     409  a vector made for another model
 |- Fixed           409  a name that the operator gave, which no request changes
 |- NameTaken       409  a new name that another vector has
 |- Conflict        409  what cannot be done as things stand now
 |- TooLarge        413  a body beyond the server's limit
 |- Unavailable     422  a method that this server could run, were it started otherwise
 |- RateLimited     429  more than the key may have now; the answer says when to come back
 |- NotReady        503  a server that is about to end takes nothing new
 |- StorageFull     507  no room under the registry; it is as it was
"""

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import AliasChoices, BaseModel, ValidationError
from pydantic.fields import FieldInfo

P = TypeVar("P", bound=BaseModel)
MESSAGES = "/v1/messages"  # Anthropic's, the one API among those served that is not OpenAI's
_NEAR = 0.75  # of difflib's ratio
_OF_TYPE = ("_type", "_parsing", "literal_error")  # complaints that another alternative of a union was meant
_OTHER_NAMES = {"scale": ("strength", "coefficient")}


class WrongSetup(RuntimeError):
    """What a server is started with is wrong: a flag, or a file that one names."""


class WhipstaffError(Exception):
    """A refusal. `param` is the exact JSON path of the field, such as "steering[0].vector"."""

    status: ClassVar[int]
    type: ClassVar[str]

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param = message, param

    def body(self, path: str = "") -> dict[str, Any]:
        """The JSON that clients of a path understand: OpenAI's, or Anthropic's, who have no place for `param`."""
        if path.endswith(MESSAGES):
            message = f"{self.param}: {self.message}" if self.param else self.message
            return {"type": "error", "error": {"type": self.type, "message": message}}
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.status}}


class BadRequest(WhipstaffError):
    status, type = 400, "BadRequestError"


class Unauthorized(WhipstaffError):
    status, type = 401, "AuthenticationError"


class Forbidden(WhipstaffError):
    status, type = 403, "PermissionDeniedError"


class NotFound(WhipstaffError):
    status, type = 404, "NotFoundError"


class TimedOut(WhipstaffError):
    status, type = 408, "RequestTimeoutError"


class VectorUnfit(WhipstaffError):
    status, type = 409, "ConflictError"


class Fixed(WhipstaffError):
    status, type = 409, "ConflictError"


class NameTaken(WhipstaffError):
    status, type = 409, "ConflictError"


class Conflict(WhipstaffError):
    status, type = 409, "ConflictError"


class TooLarge(WhipstaffError):
    status, type = 413, "PayloadTooLargeError"


class Unavailable(WhipstaffError):
    status, type = 422, "UnprocessableEntityError"


class RateLimited(WhipstaffError):
    """`reason` names the limit, `wait` is in seconds."""

    status, type = 429, "RateLimitError"

    def __init__(self, message: str, reason: str = "rate_requests", wait: float = 1.0) -> None:
        super().__init__(message)
        self.reason, self.seconds = reason, max(math.ceil(wait), 1)


class NotReady(WhipstaffError):
    status, type = 503, "ServiceUnavailableError"


class StorageFull(WhipstaffError):
    status, type = 507, "InsufficientStorageError"


@dataclass(frozen=True)
class FieldOrigins:
    """Where those fields of a request came from that the client did not write at its top level."""

    preset: str = ""  # its name
    filled: frozenset[str] = frozenset()  # fields that the preset filled in
    xargs: frozenset[str] = frozenset()  # fields that came in the request's vllm_xargs

    def is_filled(self, path: str) -> bool:
        """Whether the preset said what is at a path."""
        return _top(path) in self.filled

    @contextmanager
    def named(self) -> Iterator[None]:
        """Let errors say where their field came from: a client knows a preset by `model` only."""
        try:
            yield
        except WhipstaffError as error:
            name = _top(error.param or "")
            if name in self.xargs:
                raise type(error)(error.message, f"vllm_xargs.{error.param}") from None
            if name not in self.filled:
                raise
            raise type(error)(f"preset {self.preset!r}, {error.param}: {error.message}", "model") from None


def _top(path: str) -> str:
    """The field that a path begins with."""
    return re.split(r"[.\[]", path)[0]


@contextmanager
def calling(names: Mapping[str, str]) -> Iterator[None]:
    """Let errors call fields what another API calls them: `names` has its name by ours, or by a whole path."""
    try:
        yield
    except WhipstaffError as error:
        param = error.param or ""
        if param in names:
            raise type(error)(error.message, names[param]) from None
        top = _top(param)
        if top not in names:
            raise
        raise type(error)(error.message, names[top] + param[len(top) :]) from None


@contextmanager
def naming_prompt(index: int, num_prompts: int) -> Iterator[None]:
    """Let errors of one of several prompts say which."""
    try:
        yield
    except WhipstaffError as error:
        if num_prompts == 1:
            raise
        raise type(error)(f"prompt[{index}]: {error.message}", error.param) from None


def bad_field(error: ValidationError, data: Any, prefix: str, known: Collection[str] = ()) -> BadRequest:
    """The first of pydantic's complaints about `data`, as a path below `prefix` and a sentence; `known` are the keys
    that `data` may have.

    A union complains once per alternative; the complaint that got furthest into the data is the one meant, and one of a
    value's range more than one of its type.
    """
    complaints = error.errors(include_url=False)
    same_field = [one for one in complaints if one["loc"][:1] == complaints[0]["loc"][:1]]
    first = max(same_field, key=lambda one: (len(json_path(one["loc"], data)), not one["type"].endswith(_OF_TYPE)))
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown key" + (did_you_mean(str(first["loc"][0]), known) if len(first["loc"]) == 1 else "")
    elif first["type"] == "model_type":
        message = "a JSON object is wanted here"
    return BadRequest(message, (prefix + json_path(first["loc"], data)).removeprefix(".") or None)


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The nearest name that exists, as the end of a sentence; "" where none is near. Only letters and digits count."""
    folded = {_folded(one): one for one in sorted(known)}
    found = difflib.get_close_matches(_folded(name), folded, 1, _NEAR)
    return f"; did you mean {folded[found[0]]}?" if found else ""


def _folded(name: str) -> str:
    return "".join(filter(str.isalnum, name)).lower()


def json_path(loc: tuple[int | str, ...], data: Any) -> str:
    """Pydantic's location as a JSON path: only the steps that exist in `data`, and a last one that it lacks."""
    path = ""
    for step in loc:
        if isinstance(step, int) and isinstance(data, list) and step < len(data):
            path, data = f"{path}[{step}]", data[step]
        elif isinstance(step, str) and isinstance(data, dict) and step in data:
            path, data = f"{path}.{step}", data[step]
        elif isinstance(step, str) and isinstance(data, dict) and step == loc[-1] and step.isidentifier():
            path, data = f"{path}.{step}", None
    return path


def field_path(prefix: str, param: str, data: Any) -> str:
    """The path of a field, its indices after dots or in brackets, as a JSON path below `prefix`: as far as `data` goes
    and one step beyond."""
    path = prefix
    for step in filter(None, re.split(r"[.\[\]]", param)):
        if isinstance(data, dict):
            name = next((name for name in (step, *_OTHER_NAMES.get(step, ())) if name in data), step)
            path, data = f"{path}.{name}", data.get(name)
        elif isinstance(data, list) and step.isdecimal() and int(step) < len(data):
            path, data = f"{path}[{step}]", data[int(step)]
    return path


def no_entry(entry: Any, path: str, key: str) -> BadRequest:
    """For what is no JSON object where one is wanted: what to write instead."""
    name = entry if isinstance(entry, str) and entry else "NAME"
    return BadRequest(f"an entry is a JSON object: write {json.dumps({key: name}, ensure_ascii=False)}", path)


def keys_of(model: type[BaseModel]) -> set[str]:
    """The names by which a model's fields may come."""
    return {name for field_name, field in model.model_fields.items() for name in _names_of(field_name, field)}


def _names_of(name: str, field: FieldInfo) -> list[str]:
    """A field's names, its own first."""
    aliases = field.validation_alias.choices if isinstance(field.validation_alias, AliasChoices) else [field.alias]
    return list(dict.fromkeys(one for one in (name, *aliases) if isinstance(one, str)))


def check_given_once(model: type[BaseModel], entry: Any, path: str) -> None:
    """A field that has several names may come by one of them. Raises: BadRequest naming the second."""
    for name, field in model.model_fields.items() if isinstance(entry, dict) else ():
        first, *more = [one for one in _names_of(name, field) if one in entry] or [""]
        if more:
            raise BadRequest(f"given twice, here and as {first!r}", f"{path}.{more[0]}" if path else more[0])
        for inner in get_args(field.annotation) or (field.annotation,):
            if isinstance(inner, type) and issubclass(inner, BaseModel) and first:
                check_given_once(inner, entry[first], f"{path}.{first}")


def parsed(model: type[P], entry: Any, path: str) -> P:
    """An entry of a request as its model. Raises: BadRequest with the path of what is wrong."""
    if not isinstance(entry, dict):
        raise BadRequest("a JSON object is wanted here", path or None)
    check_given_once(model, entry, path)
    try:
        return model.model_validate(entry)
    except ValidationError as error:
        raise bad_field(error, entry, path, keys_of(model)) from None


def reason_in(text: str) -> str:
    """Why a server refused, for its client: the field and the sentence in the body of its answer."""
    try:
        error = json.loads(text)["error"]
    except (ValueError, KeyError, TypeError):
        return text[:300]
    if not isinstance(error, dict):
        return f"{error}; the user's key is --api-key or VLLM_API_KEY"
    return f"{error['param']}: {error['message']}" if error.get("param") else str(error["message"])
