"""Anthropic's API as vLLM serves it: its requests are chats, whose answers are written as messages. Here those chats
are ours, so that they take what other chats take."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import ConfigDict, PrivateAttr, ValidationError
from starlette.requests import Request
from starlette.responses import Response
from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import VLLMClientError

from whipstaff.server.engine.compat import effort_of
from whipstaff.server.engine.frontend import openai
from whipstaff.server.engine.frontend.requests import ChatRequest
from whipstaff.server.engine.patch import swap
from whipstaff.server.errors import MESSAGES, BadRequest, WhipstaffError, bad_field
from whipstaff.server.names import ALIASES, FIELDS

NAMES = {"stop": "stop_sequences"}  # what a message request calls fields of a chat, by the chat's name
# What a chat says and a message request may say, too, beside what Anthropic's has: how tokens are drawn.
SAMPLING = frozenset((
    *("allowed_token_ids", "bad_words", "frequency_penalty", "ignore_eos", "logit_bias", "min_p", "min_tokens"),
    *("presence_penalty", "repetition_penalty", "seed", "stop_token_ids", "structured_outputs"),
))  # fmt: skip
_OTHERS = frozenset(ChatRequest.model_fields) - SAMPLING - frozenset(FIELDS)  # of a chat


class MessageRequest(AnthropicMessagesRequest):
    """A message request with the extra fields, which are those of chats."""

    model_config = ConfigDict(extra="allow")


class MessageChat(ChatRequest):
    """The chat that a message request stands for."""

    _unused: list[str] = PrivateAttr(default_factory=list)  # fields of chats that a message request has not

    @classmethod
    def of(cls, base: Any, messages: list[Any], extra: dict[str, Any]) -> "MessageChat":
        """Raises: BadRequest.

        Args:
            base: vLLM's chat.
            extra: what the request says beside Anthropic's fields.
        """
        own = {name: getattr(base, name) for name in base.model_fields_set - {"messages", "max_tokens"}}
        said = {name: value for name, value in own.items() if value is not None}
        further = {name: value for name, value in extra.items() if name not in _OTHERS}
        try:
            made = cls.model_validate(further | said | {"messages": messages})
        except ValidationError as error:
            found = bad_field(error, further, "")
            raise BadRequest(found.message, (found.param or "").lstrip(".") or None) from None
        made._unused = [name for name, value in extra.items() if name in _OTHERS and value is not None]
        return made

    @property
    def unknown_names(self) -> list[str]:
        return [*super().unknown_names, *self._unused]

    @classmethod
    def known_names(cls) -> frozenset[str]:
        return SAMPLING.union(AnthropicMessagesRequest.model_fields, ALIASES, FIELDS)

    def sent(self, body: dict[str, Any]) -> dict[str, Any]:
        ours = {theirs: name for name, theirs in NAMES.items()}
        return {ours.get(name, name): value for name, value in body.items()}


class ServingMessages(openai.ServingChat):
    """Makes our chats of message requests."""

    @classmethod
    def _build_base_request(cls, anthropic_request: Any, openai_messages: list[dict[str, Any]]) -> Any:
        base = super()._build_base_request(anthropic_request, openai_messages)
        if not isinstance(anthropic_request, MessageRequest):
            return base
        return MessageChat.of(base, openai_messages, anthropic_request.model_extra or {})


def serve_messages(app: FastAPI) -> None:
    """Have vLLM's application make our chats of message requests."""
    swap(app.state.anthropic_serving_messages, ServingMessages)


async def as_chat(request: MessageRequest, app: FastAPI) -> MessageChat:
    """Raises: BadRequest."""
    serving = app.state.anthropic_serving_messages
    effort, merges = await effort_of(serving, request), serving._merge_inline_system
    chat: MessageChat = serving.to_chat_completion_request(
        request, merge_inline_system=merges, disabled_thinking_effort=effort
    )
    return chat


async def answer(request: MessageChat, raw: Request) -> Any:
    """vLLM's answer: an error Response, a body, or server-sent events."""
    serving = raw.app.state.anthropic_serving_messages
    try:
        result = await openai.naming(request, serving.create_chat_completion(request, raw))
    except (ValueError, TypeError, OverflowError, VLLMClientError) as error:
        return _refused(create_error_response(error))
    if isinstance(result, ErrorResponse):
        return _refused(result)
    if isinstance(result, AsyncGenerator):
        return _converted(result, serving)
    return serving.messages_full_converter(result).model_dump(exclude_none=True)


def _refused(refused: ErrorResponse) -> Response:
    class Refused(WhipstaffError):
        status, type = refused.error.code, refused.error.type

    param = NAMES.get(refused.error.param or "", refused.error.param)
    return JSONResponse(Refused(refused.error.message, param).body(MESSAGES), refused.error.code)


async def _converted(chunks: AsyncGenerator[str, None], serving: Any) -> AsyncGenerator[str, None]:
    """The events of a message. Closing this closes `chunks`."""
    async with aclosing(chunks), aclosing(serving.message_stream_converter(chunks)) as events:
        async for event in events:
            yield event
