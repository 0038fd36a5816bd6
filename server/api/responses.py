"""OpenAI's Responses API: the route, and where its answers have what ours say."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import Response

from whipstaff.server.access.keys import HOLDER
from whipstaff.server.admission.explanations import ChoiceExplanations
from whipstaff.server.api.descriptions import ResponseAnswer, answers
from whipstaff.server.api.generate import JSON, Form, exchange, generate
from whipstaff.server.api.messages import add_records
from whipstaff.server.api.sse import event_of, read_event
from whipstaff.server.engine.frontend import openai, responses
from whipstaff.server.engine.frontend.responses import ResponseRequest
from whipstaff.server.errors import BadRequest, NotFound, calling

router = APIRouter()
_PIECE, _END = ".delta", "response.completed"  # how events of pieces end, and the last event


@router.post("/v1/responses", dependencies=JSON, responses=answers(ResponseAnswer, streams=True))
@openai.cancellable
async def create_response(
    request: ResponseRequest, raw_request: Request, at_end: AsyncExitStack = Depends(exchange)
) -> Response:
    """OpenAI's responses, with `steering` and `decoding`."""
    check_kept(request, raw_request.app)
    with calling(request.names):
        return await generate(request, raw_request, at_end, FORM)


def check_kept(request: ResponseRequest, app: FastAPI) -> None:
    """What vLLM keeps of answers, everybody may read who knows their names. Raises: BadRequest, NotFound."""
    if request.background:
        raise BadRequest(
            "an answer ends with its request here: nobody would hold its vectors, count it or wait for it afterwards",
            "background",
        )
    wants, keeps, has_keys = "store" in request.model_fields_set, responses.keeps_answers(app), HOLDER.get() is not None
    if wants and request.store and keeps and has_keys:
        raise BadRequest("what is kept, every key could read; send the conversation as `input`", "store")
    if wants and request.store and not keeps:
        request.remark("store did nothing: this server keeps no answers")
    if has_keys:
        request.store = False
    if request.previous_response_id is not None and (has_keys or not keeps):
        raise NotFound(
            "this server keeps no answers; send the conversation as `input`",
            "previous_response_id",
        )


async def with_extras(
    events: AsyncGenerator[str, None],
    finish: Callable[[dict[str, Any]], Awaitable[None]],
    explained: ChoiceExplanations | None,
    _: Any,
) -> AsyncGenerator[str, None]:
    """Events with explanations in those of pieces, and with the receipt and all explanations in the response that the
    last one has. Closing this closes `events`."""
    all_records: dict[str, list[Any]] = {}  # by field
    async with aclosing(events):
        async for event in events:
            name, read = read_event(event)
            if name == _END or (explained is not None and name.endswith(_PIECE)):
                body = read()
                new = {} if explained is None else explained.take()
                for field, records in new.items():
                    all_records.setdefault(field, []).extend(records)
                if name == _END:
                    await finish(body["response"])
                    body["response"] |= all_records
                else:
                    body |= new
                event = event_of(name, body)
            yield event


FORM = Form(responses.answer, add_records, with_extras, takes_back=False)
