"""What answers look like, for the API's description. Routes say what they say by hand; tests hold them to this."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from whipstaff.server.errors import WhipstaffError


class Refused(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    param: str | None
    code: int


class Refusal(BaseModel):
    """OpenAI's error: `param` is the path of the field that is wrong."""

    error: Refused


class Described(BaseModel):
    """Fields that are always there; there are others."""

    model_config = ConfigDict(extra="allow")


class Vector(Described):
    id: str
    object: Literal["steering.vector"]
    method: str
    fits: bool
    problem: str | None
    read_only: bool
    digest: str
    layers: list[int]
    sites: list[str]
    warnings: list[str]


class Preset(Described):
    id: str
    object: Literal["steering.preset"]
    digest: str
    read_only: bool


class Method(Described):
    name: str


class Vectors(BaseModel):
    object: Literal["list"]
    data: list[Vector]


class Presets(BaseModel):
    object: Literal["list"]
    data: list[Preset]


class Methods(BaseModel):
    object: Literal["list"]
    data: list[Method]


class Links(BaseModel):
    grafana: str | None


class Deleted(BaseModel):
    id: str
    object: Literal["steering.vector", "steering.preset"]
    deleted: Literal[True]


class CaptureDeleted(BaseModel):
    id: str
    object: Literal["steering.capture"]
    deleted: Literal[True]


class Fit(Described):
    """A job that makes a vector."""

    id: str
    object: Literal["steering.fit"]
    state: Literal["queued", "running", "cancelling", "done", "failed", "cancelled"]
    method: str
    name: str
    created: int
    ended: int | None
    rows: dict[str, int]
    warnings: list[str]
    progress: dict[str, Any] | None
    evaluation: dict[str, Any] | None
    error: dict[str, Any] | None
    digest: str | None
    replaced: str | None
    provenance: dict[str, Any] | None
    promoted: dict[str, Any] | None


class FitEnded(Fit):
    deleted: bool


class FitList(BaseModel):
    object: Literal["list"]
    data: list[Fit]


class Plan(Described):
    """What is done to a request: as its receipt says it."""

    steering: list[dict[str, Any]]
    decoding: list[dict[str, Any]]
    warnings: list[str]


class Answer(Described):
    """OpenAI's and vLLM's, with a receipt where something was asked of us."""

    id: str
    object: Literal["chat.completion", "text_completion"]
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
    whipstaff: Plan | None = None


class Message(Described):
    """Anthropic's, with the same."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    content: list[dict[str, Any]]
    model: str
    stop_reason: str | None = None
    usage: dict[str, Any]
    whipstaff: Plan | None = None


class ResponseAnswer(Described):
    """The Responses API's, with the same."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None
    whipstaff: Plan | None = None


class Valid(BaseModel):
    valid: Literal[True]
    plan: Plan
    milliseconds: float


class Ready(BaseModel):
    ready: bool
    reason: str | None


class Model(Described):
    """A model, an adapter or a preset, as vLLM lists them."""

    id: str
    object: Literal["model"]


Responses = dict[int | str, dict[str, Any]]
REFUSALS: Responses = {
    kind.status: {"model": Refusal, "description": kind.type}
    for kind in sorted(WhipstaffError.__subclasses__(), key=lambda kind: kind.status)
}


def answers(model: type[BaseModel], *statuses: int, streams: bool = False) -> Responses:
    """What a route answers where it refuses nothing, and that it may refuse."""
    events = {"text/event-stream": {"schema": {"type": "string", "description": "the same in pieces, with stream"}}}
    said: dict[str, Any] = {"model": model, **({"content": events} if streams else {})}
    return {**{status: said for status in statuses or (200,)}, **REFUSALS}
