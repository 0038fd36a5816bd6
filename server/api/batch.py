"""vLLM's API of several chats in one request."""

from contextlib import AsyncExitStack

from fastapi import APIRouter, Depends, Request
from fastapi.responses import Response

from whipstaff.server.api.descriptions import Answer, answers
from whipstaff.server.api.generate import JSON, Form, exchange, generate
from whipstaff.server.engine.frontend import batch, openai
from whipstaff.server.engine.frontend.batch import BatchRequest

router = APIRouter()


@router.post("/v1/chat/completions/batch", dependencies=JSON, responses=answers(Answer))
@openai.cancellable
async def create_batch(
    request: BatchRequest, raw_request: Request, at_end: AsyncExitStack = Depends(exchange)
) -> Response:
    """vLLM's chat completions of several conversations, with `steering` and `decoding`; a choice of each."""
    return await generate(request, raw_request, at_end, FORM)


FORM = Form(batch.answer)
