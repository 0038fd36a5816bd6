"""OpenAI's Responses API as vLLM serves it: requests of one prompt and one answer, placed once that is rendered."""

import json
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from msgspec import structs
from openai.types.responses.response_create_params import ResponseCreateParamsBase
from pydantic import Field, PrivateAttr, model_validator
from starlette.requests import Request
from starlette.responses import Response
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses
from vllm.entrypoints.openai.responses.utils import construct_tool_dicts
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.renderers.online_renderer import OnlineRenderer
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams

from whipstaff.server.engine.frontend import openai
from whipstaff.server.engine.frontend.requests import Chats, Extras, blaming, chats_with, read_messages
from whipstaff.server.engine.patch import swap
from whipstaff.server.errors import BadRequest, Unavailable
from whipstaff.server.names import ALIASES, FIELDS

NAMES = {"max_tokens": "max_output_tokens", "messages": "input"}  # what a request calls fields of a chat, by their name
_OWN_TOOLS = frozenset(("function", "custom", "namespace"))  # which the client runs
_INSTRUCTIONS = "messages[0]"  # where they stand in the chat


class ResponseRequest(ResponsesRequest, Extras):
    """A request of the Responses API with the extra fields."""

    # Of the fields of chats, those by which tokens are drawn and that vLLM's requests of this API lack.
    n: Literal[1] | None = None  # its answer has a place for one
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = Field(default_factory=list)
    min_tokens: int = 0
    repetition_detection: RepetitionDetectionParams | None = None
    _conversation: list[Any] = PrivateAttr(default_factory=list)  # as the template got it

    @model_validator(mode="wrap")
    @classmethod
    def _blames(cls, body: Any, handler: Callable[[Any], Any]) -> Any:
        return blaming(body, handler)

    @model_validator(mode="after")
    def _reads_input(self) -> "ResponseRequest":
        if not isinstance(self.input, str):
            read_messages(self.input, "input")
        return self

    @classmethod
    def known_names(cls) -> frozenset[str]:
        return frozenset((*cls.model_fields, *ResponseCreateParamsBase.__annotations__, *ALIASES, *FIELDS))

    def sent(self, body: dict[str, Any]) -> dict[str, Any]:
        ours = {theirs: name for name, theirs in NAMES.items() if name != "messages"}
        return {ours.get(name, name): value for name, value in body.items()}

    @property
    def names(self) -> dict[str, str]:
        """What it calls what a chat calls otherwise, by the chat's name or path; not where it says that itself."""
        ours = NAMES | ({_INSTRUCTIONS: "instructions"} if self.instructions else {})
        return {name: theirs for name, theirs in ours.items() if name not in (self.model_extra or {})}

    # ---- as a chat: presets speak before the user does, and say how many tokens follow

    @property
    def is_chat(self) -> bool:
        return True

    @property
    def messages(self) -> list[Any]:
        """The chat that it stands for, each message as the request has it."""
        said = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else list(self.input)
        return [{"role": "system", "content": self.instructions}, *said] if self.instructions else said

    @messages.setter
    def messages(self, value: list[Any]) -> None:
        """Its own instructions, if it has any, are the first of them."""
        self.input = value[1:] if self.instructions else value

    @property
    def max_tokens(self) -> int | None:
        found: int | None = self.max_output_tokens
        return found

    @max_tokens.setter
    def max_tokens(self, value: int | None) -> None:
        self.max_output_tokens = value

    # ---- what admission asks of a request

    @property
    def use_beam_search(self) -> bool:
        """vLLM has no search of its own here."""
        return False

    @property
    def length_penalty(self) -> float:
        """Of that."""
        return 1.0

    @property
    def has_grammar(self) -> bool:
        shape = None if self.text is None else self.text.format
        return self.structured_outputs is not None or (shape is not None and shape.type != "text")

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted: its answer has no place for them."""
        return False

    @property
    def echoes_scores(self) -> bool:
        """Whether vLLM scores its prompt though nobody asked."""
        return False

    @property
    def logprobs_field(self) -> str:
        """The field by which it asks for log-probabilities; "" if none does."""
        return "include" if self.is_include_output_logprobs() else ""

    @property
    def explicit_max_tokens(self) -> int | None:
        """How many tokens the client itself wants at most."""
        return self.max_tokens

    def cap(self, most: int) -> None:
        """Where the client does not say how many: at most so many tokens."""
        self.max_tokens = most

    @property
    def num_prompts(self) -> int:
        return 1

    # ---- from tokens to the engine

    def note_conversation(self, conversation: list[Any]) -> None:
        """The messages as its template got them."""
        self._conversation = conversation

    def chats(self, serving: Any) -> Chats | None:
        """How its messages are found."""
        excludes = serving.online_renderer.exclude_tools_when_tool_choice_none
        tools = construct_tool_dicts(self.tools, self.tool_choice, exclude_tools_when_tool_choice_none=excludes)
        return chats_with(tools, self, self._conversation, serving, adds_special_tokens=True)

    def check_one_turn(self, serving: Any) -> None:
        """What is admitted is placed in one prompt, and paid for as one: vLLM may not go on by itself with another, as
        it does where it runs a tool. Raises: BadRequest, Unavailable."""
        if not self.is_plain and serving.use_harmony:
            raise Unavailable("answers of this model are several turns here; ask /v1/chat/completions", "model")
        if self.is_plain and self._bill is None:
            return
        for index, tool in enumerate(self.tools):
            if tool.type not in _OWN_TOOLS:
                raise BadRequest(
                    f"the server itself would go on after a tool of type {tool.type!r}, which nothing of ours follows; "
                    "send functions, and run them yourself",
                    f"tools[{index}].type",
                )

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        return self.planned(partial(self._drawn_by, super().to_sampling_params, *args, **kwargs))

    def _drawn_by(self, make: Callable[..., SamplingParams], *args: Any, **kwargs: Any) -> SamplingParams:
        """vLLM's parameters, with what its requests of this API lack."""
        return structs.replace(
            make(*args, **kwargs),
            n=self.n or 1,
            allowed_token_ids=self.allowed_token_ids,
            bad_words=self.bad_words,
            min_tokens=self.min_tokens or 0,
            repetition_detection=self.repetition_detection,
        )


class NotingRenderer(OnlineRenderer):
    """Tells a request its conversation."""

    async def preprocess_chat(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = await super().preprocess_chat(request, *args, **kwargs)
        if isinstance(request, ResponseRequest):
            request.note_conversation(result[0])
        return result


class ServingResponses(OpenAIServingResponses):
    """Places requests between tokenising and scheduling."""

    async def _render_resolved_response_inputs(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        result = await super()._render_resolved_response_inputs(request, *args, **kwargs)
        if not isinstance(request, ResponseRequest) or isinstance(result, ErrorResponse):
            return result
        request.check_one_turn(self)
        inputs = [result.engine_input]
        if (refused := self._validate_generator_input(inputs[0])) is not None:
            return refused
        most = await openai.place(request, inputs, self, request.explicit_max_tokens, lambda: [request.chats(self)])
        if most is not None:
            request.max_output_tokens = most
        return replace(result, engine_input=inputs[0])

    def _convert_generation_error_to_streaming_response(self, error: Exception) -> str:
        """vLLM would look for it among the events of this API, and break. Raises: the error, for `_as_events`."""
        raise error


def serve_responses(app: FastAPI) -> None:
    """Have vLLM's application place requests of the Responses API."""
    serving = app.state.openai_serving_responses
    swap(serving, ServingResponses)
    swap(serving.online_renderer, NotingRenderer)


async def render(request: ResponseRequest, app: FastAPI) -> Response | None:
    """As `openai.render`."""
    serving = app.state.openai_serving_responses
    result = await openai.naming(request, serving._render_resolved_response_inputs(request, None))
    return JSONResponse(result.model_dump(), result.error.code) if isinstance(result, ErrorResponse) else None


def keeps_answers(app: FastAPI) -> bool:
    """Whether vLLM keeps answers that it is to store: with VLLM_ENABLE_RESPONSES_API_STORE."""
    return bool(app.state.openai_serving_responses.enable_store)


async def answer(request: ResponseRequest, raw: Request) -> Any:
    """vLLM's answer: an error Response, a body, or server-sent events."""
    serving = raw.app.state.openai_serving_responses
    result = await openai.naming(request, serving.create_responses(request, raw))
    if isinstance(result, ErrorResponse):
        return JSONResponse(result.model_dump(), result.error.code)
    if isinstance(result, AsyncGenerator):
        return _as_events(result, serving)
    return result.model_dump(mode="json", by_alias=True)


async def _as_events(said: AsyncGenerator[Any, None], serving: Any) -> AsyncGenerator[str, None]:
    """As server-sent events, the last of which says what broke, if anything did. Closing this closes `said`."""
    number = 0
    async with aclosing(said):
        try:
            async for event in said:
                number += 1
                yield f"event: {event.type}\ndata: {event.model_dump_json(indent=None, by_alias=True)}\n\n"
        except Exception as error:  # as in vLLM's streams of chats
            yield _error_event(serving.create_error_response(error).error, number)


def _error_event(error: Any, number: int) -> str:
    told = {"type": "error", "code": str(error.code), "message": error.message, "param": error.param}
    return f"event: error\ndata: {json.dumps(told | {'sequence_number': number})}\n\n"
