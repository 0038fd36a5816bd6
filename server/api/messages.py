"""Anthropic's API: the route, and where its answers have what ours say."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from whipstaff.server.admission.explanations import ChoiceExplanations
from whipstaff.server.api.descriptions import Message, answers
from whipstaff.server.api.generate import JSON, Form, exchange, generate
from whipstaff.server.api.sse import event_of, read_event
from whipstaff.server.engine.frontend import messages, openai
from whipstaff.server.engine.frontend.messages import NAMES, MessageRequest
from whipstaff.server.errors import MESSAGES, calling

router = APIRouter()
_TEXT, _END = "content_block_delta", "message_delta"  # events: of a piece, and the last that says more than that it is


@router.post(MESSAGES, dependencies=JSON, responses=answers(Message, streams=True))
@openai.cancellable
async def create_message(
    request: MessageRequest, raw_request: Request, at_end: AsyncExitStack = Depends(exchange)
) -> Response:
    """Anthropic's messages, with `steering` and `decoding`."""
    with calling(NAMES):
        chat = await messages.as_chat(request, raw_request.app)
        return await generate(chat, raw_request, at_end, FORM)


def add_records(body: dict[str, Any], explained: ChoiceExplanations) -> None:
    """Put what is to be said of tokens into an answer, or an event of one."""
    body |= explained.take()


async def with_extras(
    events: AsyncGenerator[str, None],
    finish: Callable[[dict[str, Any]], Awaitable[None]],
    explained: ChoiceExplanations | None,
    _: Any,
) -> AsyncGenerator[str, None]:
    """Events with explanations in those of pieces, and with the receipt in the one that has the usage. Closing this
    closes `events`."""
    async with aclosing(events):
        async for event in events:
            name, read = read_event(event)
            if name == _END or (name == _TEXT and explained is not None):
                body = read()
                if name == _END:
                    await finish(body)
                if explained is not None:
                    add_records(body, explained)
                event = event_of(name, body)
            yield event


FORM = Form(messages.answer, add_records, with_extras, takes_back=False)
