"""Presets: what an operator lets clients choose as a model name, `base@preset`.

A preset fills in fields of a request: steering and decoding, sampling, and what comes before the user's own words.
Under `default` a request's own value wins; what is `forced` a request may not send.
"""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from whipstaff.server import names
from whipstaff.server.errors import BadRequest, WhipstaffError, WrongSetup, bad_field
from whipstaff.server.names import ALIASES, FIELDS, TEXTS, thing
from whipstaff.server.registry.folder import Stamp, stamp_of

MAX_BYTES = 1 << 20
PROMPT = "{prompt}"  # where a template has the request's own prompt
_TEXT = ("system", "examples", "prompt")  # of a part, beside fields of requests


class BadPreset(WrongSetup):
    """A file given at start-up that is not a sound preset; the server does not start with it."""


class Example(BaseModel):
    """One message of a conversation to learn from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: Literal["user", "assistant"]
    content: str


class Part(BaseModel):
    """Fields of a request, and text around it. Its further fields are those that Whipstaff adds to requests."""

    model_config = ConfigDict(extra="allow", frozen=True)

    system: str | None = Field(None, description="chat: the first message, unless the request has its own")
    examples: list[Example] | None = Field(None, description="chat: messages before the request's")
    prompt: str | None = Field(None, description=f"completions: a text that has {PROMPT} where the request's goes")
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: list[str] | None = None
    stop_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logit_bias: dict[str, float] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _renames(cls, said: Any) -> Any:
        for theirs, name in ALIASES.items() if isinstance(said, dict) else ():
            if theirs in said and name in said:
                raise ValueError(f"{theirs} and {name} are one thing")
            said = {name if key == theirs else key: value for key, value in said.items()}
        return said

    @field_validator("prompt")
    @classmethod
    def _has_room(cls, text: str | None) -> str | None:
        if text is not None and text.count(PROMPT) != 1:
            raise ValueError(f"must say {PROMPT} once, where the request's own prompt goes")
        return text

    @property
    def stated(self) -> dict[str, Any]:
        """What it says, by name."""
        names = [*type(self).model_fields, *(self.model_extra or {})]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def fields(self) -> dict[str, Any]:
        """The same, of the fields that a request has."""
        return {name: value for name, value in self.stated.items() if name not in _TEXT}


class Body(BaseModel):
    """A preset as people write it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    description: str = Field("", max_length=4096)
    default: Part = Field(Part(), description="where the request says nothing")
    forced: Part = Field(Part(), description="and the request may say nothing")

    @model_validator(mode="after")
    def _says_once(self) -> "Body":
        forced = set(map(thing, self.forced.stated))
        if both := [name for name in self.default.stated if thing(name) in forced]:
            raise ValueError(f"{min(both)} is both default and forced")
        return self


@dataclass(frozen=True)
class Preset:
    """One preset by name."""

    name: str
    body: Body
    is_fixed: bool = True  # a file given at start-up, so that no request changes it

    @staticmethod
    def of(name: str, body: Any, is_fixed: bool = True) -> "Preset":
        """Raises: BadRequest naming the field."""
        try:
            return Preset(name, Body.model_validate(body), is_fixed)
        except ValidationError as error:
            raise bad_field(error, body, "") from None

    @property
    def stated(self) -> dict[str, Any]:
        """Everything that it says."""
        return self.body.default.stated | self.body.forced.stated

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.wire, sort_keys=True).encode()).hexdigest()

    @property
    def wire(self) -> dict[str, Any]:
        """As JSON."""
        return self.body.model_dump(exclude_unset=True)

    @property
    def is_for_chat(self) -> bool:
        return not self.stated.keys() & {"prompt"} or bool(self.stated.keys() & {"system", "examples"})

    @property
    def is_for_text(self) -> bool:
        return not self.stated.keys() & {"system", "examples"} or "prompt" in self.stated

    def fill(self, request: Any, body: Mapping[str, Any]) -> frozenset[str]:
        """Put what the preset says into a parsed request of chat or text; the names of the fields that are now its own.

        Args:
            body: the request as it was sent, before anything was filled up with defaults.

        Raises: BadRequest naming a field that it forces and the request sends, or a prompt that it has no place for.
        """
        sent, paths = _sent(body)
        if clash := names.clash(self.body.forced.fields, sent):
            raise BadRequest(f"the preset {self.name!r} sets {clash[0]}; leave it out", paths[clash[1]])
        for name in names.all_names(self.body.forced.fields):  # what is left of these changes nothing
            _unsay(request, name)
        chosen = names.unsaid_defaults(self.body.default.fields, sent) | self.body.forced.fields
        for name, value in chosen.items():
            setattr(request, name, value)
        if hasattr(request, "messages"):
            self._converse(request)
        else:
            self._write(request)
        return frozenset(chosen)

    def gives(self, filled: Container[str], name: str) -> bool:
        """Whether a field that was filled in is a default of this preset."""
        return name in filled and name in self.body.default.fields

    def _converse(self, request: Any) -> None:
        if not self.is_for_chat:
            raise BadRequest(f"the preset {self.name!r} writes a prompt; it is for /v1/completions", "model")
        said = request.messages
        if said and isinstance(said[0], list):  # several conversations
            request.messages = [self._led(one, f"messages[{index}]") for index, one in enumerate(said)]
        else:
            request.messages = self._led(said, "messages")

    def _led(self, messages: Sequence[Any], path: str) -> list[Any]:
        """A conversation with what comes before the request's own words. Raises: BadRequest."""
        messages = list(messages)
        own = messages[:1] if messages and _role(messages[0]) in ("system", "developer") else []
        if own and self.body.forced.system is not None:
            raise BadRequest(f"the preset {self.name!r} sets the system prompt; leave it out", f"{path}[0]")
        system = self.stated.get("system")
        first = own or ([] if system is None else [{"role": "system", "content": system}])
        examples = [example.model_dump() for example in self.stated.get("examples", ())]
        return [*first, *examples, *messages[len(own) :]]

    def _write(self, request: Any) -> None:
        if not self.is_for_text:
            raise BadRequest(
                f"the preset {self.name!r} speaks before the user does; it is for /v1/chat/completions", "model"
            )
        template = self.stated.get("prompt")
        if template is None:
            return
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        if not texts or not all(isinstance(text, str) for text in texts) or getattr(request, "prompt_embeds", None):
            raise BadRequest(f"the preset {self.name!r} writes the prompt as text; send text", "prompt")
        written = [template.replace(PROMPT, text) for text in texts]
        request.prompt = written[0] if isinstance(request.prompt, str) else written


def _sent(body: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """What a client sent, by field, and each field's path."""
    paths = {name: name for name, value in body.items() if value is not None}
    values = {name: body[name] for name in paths}
    if isinstance(xargs := body.get("vllm_xargs"), Mapping):
        paths = {name: f"vllm_xargs.{name}" for name in xargs} | paths
        values = {**xargs, **values}
    return {name: _unpacked(name, value) for name, value in values.items()}, paths


def _unpacked(name: str, value: Any) -> Any:
    """A value, or what a string of JSON holds."""
    try:
        return json.loads(value) if isinstance(value, str) and name in FIELDS and name not in TEXTS else value
    except (ValueError, RecursionError):
        return value


def _unsay(request: Any, name: str) -> None:
    if getattr(request, name, None) is not None:
        setattr(request, name, None)
    if isinstance(xargs := getattr(request, "vllm_xargs", None), dict):
        xargs.pop(name, None)


def _role(message: Any) -> Any:
    return message.get("role") if isinstance(message, Mapping) else getattr(message, "role", None)


# ---- files


def preset_files(paths: Iterable[Path]) -> list[Path]:
    """The files under `paths`, each a `.json` file or a folder of them."""
    return [file for path in paths for file in (sorted(path.glob("*.json")) if path.is_dir() else [path])]


def stamp_of_files(paths: Iterable[Path]) -> tuple[tuple[str, Stamp], ...]:
    return tuple((str(path), stamp_of(path)) for path in preset_files(paths))


def read_preset(path: Path) -> Preset:
    """A preset named after its file. Raises: BadPreset."""
    try:
        return Preset.of(path.stem, json.loads(path.read_bytes()))
    except WhipstaffError as error:
        raise BadPreset(f"{path}: {error.param or 'preset'}: {error.message}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise BadPreset(f"{path}: {error}") from error
