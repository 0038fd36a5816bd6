"""vLLM's OpenAI server with our request models: its serving classes, extended, what routes ask of it, its port."""

import asyncio
import json
import signal
from argparse import Namespace
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import AsyncExitStack, aclosing, contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar, cast

from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.requests import Request
from starlette.responses import Response
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.entrypoints.serve.utils import api_utils as vllm_routes
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.exceptions import VLLMClientError

from whipstaff.server.engine.frontend.blame import field_meant
from whipstaff.server.engine.frontend.launch import Engine
from whipstaff.server.engine.frontend.requests import (
    ChatRequest,
    Chats,
    Extras,
    OpenAIRequest,
    TextRequest,
    chats_of,
)
from whipstaff.server.engine.patch import swap
from whipstaff.server.errors import BadRequest

Handler = TypeVar("Handler", bound=Callable[..., Any])

validate_json_request = vllm_routes.validate_json_request  # a dependency: the content type is JSON


def cancellable(handler: Handler) -> Handler:
    """Cancel a route's work when its client disconnects, and count it in vLLM's server load."""
    return cast(Handler, vllm_routes.with_cancellation(vllm_routes.load_aware_call(handler)))


async def place(
    request: Extras, inputs: list[Any], serving: Any, explicit: int | None, chats: Callable[[], list[Chats | None]]
) -> int | None:
    """Check a request of chats, place it in its prompts and say what it may come to. What it may generate at most,
    where vLLM would let it more. Raises: an exception that answers the client.

    Args:
        explicit: how many tokens the client itself wants at most.
        chats: the conversation of each prompt.
    """
    most = None
    if not request.is_plain or request.lists_tokens:
        await request.check(inputs, serving, explicit)
    if not request.is_plain:
        prompts = request.prompts(inputs, serving, explicit, chats() if request.reads_prompt else [None] * len(inputs))
        await request.score(prompts, serving)
        # a long chat takes a while to be told apart
        most = await asyncio.to_thread(request.place, inputs, prompts, serving, explicit)
    request.tell_price(inputs, serving, explicit)
    return most


class ServingChat(OpenAIServingChat):
    """Places requests between tokenising and scheduling."""

    async def render_chat_request(self, request: Any) -> Any:
        result = await super().render_chat_request(request)
        if not isinstance(request, ChatRequest) or isinstance(result, ErrorResponse):
            return result
        conversation, inputs = result
        explicit = request.explicit_max_tokens
        if request.retracts and self.parser_cls is not None:
            raise BadRequest(
                "this server parses answers as they come, and takes nothing of that back", "stream_retractions"
            )
        most = await place(request, inputs, self, explicit, lambda: [chats_of(request, conversation, self)])
        if most is not None:
            request.max_completion_tokens = most
        return result


class TokenName(str):
    """What a token is told as, `token_id:5`; as long as its text, by which vLLM counts on through a stream."""

    length: int

    @staticmethod
    def of(name: str, text: str) -> "TokenName":
        made = TokenName(name)
        made.length = len(text)
        return made

    def __len__(self) -> int:
        return self.length


class ServingCompletion(OpenAIServingCompletion):
    """Places requests between tokenising and scheduling."""

    def _create_completion_logprobs(self, *args: Any, return_as_token_id: bool | None = None, **kwargs: Any) -> Any:
        """vLLM counts text offsets in whatever tokens are told as; they are those of the text."""
        said = super()._create_completion_logprobs(*args, return_as_token_id=return_as_token_id, **kwargs)
        is_named = self.return_tokens_as_token_ids if return_as_token_id is None else return_as_token_id
        if is_named and self.renderer.tokenizer is not None:
            texts = super()._create_completion_logprobs(*args, return_as_token_id=False, **kwargs)
            said.text_offset = texts.text_offset
            said.tokens = list(map(TokenName.of, said.tokens, texts.tokens))
        return said

    async def render_completion_request(self, request: Any) -> Any:
        inputs = await super().render_completion_request(request)
        if not isinstance(request, TextRequest) or isinstance(inputs, ErrorResponse):
            return inputs
        if not request.is_plain or request.lists_tokens:
            await request.check(inputs, self, request.max_tokens)
        if not request.is_plain:
            prompts = request.prompts(inputs, self, request.max_tokens, [None] * len(inputs))
            await request.score(prompts, self)
            if (most := request.place(inputs, prompts, self, request.max_tokens)) is not None:
                request.max_tokens = most
        request.tell_price(inputs, self, request.max_tokens)
        return inputs


def split_model(model: str | None, app: FastAPI) -> tuple[str | None, str | None]:
    """`base@preset` as its parts, unless something is served by the whole name; no preset where there is no @."""
    models = app.state.openai_serving_models
    if model is None or "@" not in model or models.is_base_model(model) or model in models.lora_requests:
        return model, None
    base, _, preset = model.rpartition("@")
    return base, preset


_answering_as: ContextVar[str | None] = ContextVar("whipstaff_model", default=None)


@contextmanager
def answering_as(model: str | None) -> Iterator[None]:
    """Let the answers that are made here call the model what the client called it."""
    token = _answering_as.set(model)
    try:
        yield
    finally:
        _answering_as.reset(token)


class ServingModels(OpenAIServingModels):
    """Lists presets as models."""

    presets: Callable[[], Awaitable[Iterable[str]]]

    def model_name(self, lora_request: Any = None) -> str:
        asked = _answering_as.get()
        return asked if asked and "@" in asked else super().model_name(lora_request)

    async def show_available_models(self) -> Any:
        shown = await super().show_available_models()
        presets = list(await self.presets())
        shown.data += [
            base.model_copy(update={"id": f"{base.id}@{preset}", "parent": base.id})
            for base in list(shown.data)
            for preset in presets
        ]
        return shown


def list_models(app: FastAPI, presets: Callable[[], Awaitable[Iterable[str]]]) -> None:
    """Have /v1/models list every preset with every model."""
    app.state.openai_serving_models.presets = presets


async def models(app: FastAPI) -> dict[str, dict[str, Any]]:
    """Everything that /v1/models lists, by its name."""
    shown = await app.state.openai_serving_models.show_available_models()
    return {card.id: card.model_dump() for card in shown.data}


def _serving(app: FastAPI, request: OpenAIRequest) -> Any:
    is_chat = isinstance(request, ChatRequest)
    return app.state.openai_serving_chat if is_chat else app.state.openai_serving_completion


async def answer(request: OpenAIRequest, raw: Request) -> Any:
    """vLLM's answer: an error Response, a response model, or an async generator of server-sent events."""
    serving = _serving(raw.app, request)
    if isinstance(request, ChatRequest):
        result = await naming(request, serving.create_chat_completion(request, raw))
    else:
        result = await naming(request, serving.create_completion(request, raw))
    if isinstance(result, ErrorResponse):
        return JSONResponse(result.model_dump(), status_code=result.error.code)
    return _ending_truly(result) if isinstance(result, AsyncGenerator) else result


async def naming(request: Extras, answering: Awaitable[Any]) -> Any:
    """What vLLM answers; where it refuses a request without naming a field, with the one that its sentence is about.
    Raises: what vLLM does; BadRequest."""
    try:
        result = await answering
    except (ValueError, TypeError, OverflowError, VLLMClientError) as error:
        refused = create_error_response(error).error
        if refused.code != BadRequest.status or refused.param or not (name := field_meant(refused.message, request)):
            raise
        raise BadRequest(refused.message, name) from None
    if isinstance(result, ErrorResponse) and result.error.param is None:
        result.error.param = field_meant(result.error.message, request)
    return result


async def _ending_truly(events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """vLLM says [DONE] after an error, too; an answer that broke off does not end like one that is complete. Closing
    this closes `events`."""
    async with aclosing(events):
        async for event in events:
            yield event
            if event.startswith('data: {"error"'):
                return


async def render(request: OpenAIRequest, app: FastAPI) -> Response | None:
    """Tokenise and check a request without scheduling it; a Response if vLLM refuses it."""
    serving = _serving(app, request)
    if isinstance(request, ChatRequest):
        result = await naming(request, serving.render_chat_request(request))
    else:
        result = await naming(request, serving.render_completion_request(request))
    return JSONResponse(result.model_dump(), result.error.code) if isinstance(result, ErrorResponse) else None


async def reason_against(request: OpenAIRequest, app: FastAPI) -> str | None:
    """Why vLLM would not take a request's prompt; None if it would."""
    try:
        refused = await render(request, app)
    except VLLMClientError as error:
        return str(error.args[0])
    return None if refused is None else str(json.loads(bytes(refused.body))["error"]["message"])


def readings(engine: Engine) -> Callable[[str], Awaitable[list[dict[str, Any]]]]:
    """Asks the first worker what a request's conditions read, by its `readings_id`."""

    async def of(readings_id: str) -> list[dict[str, Any]]:
        found: list[list[dict[str, Any]]] = await engine.collective_rpc("whipstaff_readings", args=(readings_id,))
        return found[0]

    return of


def captures(engine: Engine) -> Callable[[str], Awaitable[list[dict[str, Any]]]]:
    """Asks every worker for the activations that a request wanted, by its `captures_id`."""

    async def of(captures_id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = await engine.collective_rpc("whipstaff_captures", args=(captures_id,))
        return found

    return of


def load_headers(raw: Request) -> dict[str, str] | None:
    """The engine's load as response headers, where the client asks for them (ORCA)."""
    wanted = raw.headers.get("endpoint-load-metrics-format", "")
    return cast("dict[str, str] | None", metrics_header(wanted))


def event_stream(events: Any, raw: Request, headers: Mapping[str, str], at_end: AsyncExitStack) -> StreamingResponse:
    """Server-sent events with vLLM's keep-alive comments. They are closed `at_end` of the request: a client that went
    away may have left them in the middle."""
    interval = float(getattr(raw.app.state.args, "sse_keep_alive_interval", 0))
    stream = with_sse_keep_alive(events, interval)
    at_end.push_async_callback(stream.aclose)
    return StreamingResponse(stream, media_type="text/event-stream", headers=dict(headers))


async def build(engine: Engine, args: Namespace) -> FastAPI:
    """vLLM's application around `engine`, its serving classes replaced by ours."""
    tasks = await engine.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    swap(app.state.openai_serving_chat, ServingChat)
    swap(app.state.openai_serving_completion, ServingCompletion)
    swap(app.state.openai_serving_models, ServingModels)
    return app


def has_chat(engine: Engine, args: Namespace) -> bool:
    """Whether the served model has a way to write a conversation."""
    if args.chat_template is not None:
        return True
    return not engine.model_config.skip_tokenizer_init and bool(getattr(engine.get_tokenizer(), "chat_template", None))


def chat_template(app: FastAPI) -> str | None:
    """How conversations are written, where that is not the tokenizer's own way."""
    found: str | None = app.state.openai_serving_chat.online_renderer.chat_template
    return found


def has_docs(app: FastAPI) -> bool:
    """Whether vLLM serves the files of a page that shows the API's description: not with `--disable-fastapi-docs`."""
    return any(getattr(route, "path", None) == "/static" for route in app.router.routes)


def listen(args: Namespace) -> tuple[str, Any]:
    """Bind the port before the engine loads, as vLLM does, so that a port in use is known at once."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, interrupt)  # until uvicorn runs and takes over
    return cast("tuple[str, Any]", setup_server(args, reuse_port=False))
