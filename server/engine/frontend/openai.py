"""vLLM's OpenAI server with the extra fields: its request models and serving classes, extended, and its launcher.

A request model carries what `prepare` made of its extras. Serving then does two things more than vLLM's: once the
prompt is tokenised and before anything is scheduled it places the plan in it, which may insert tokens and checks what
depends on the prompt; and its sampling parameters carry the placed plan.
"""

import asyncio
import json
import signal
from argparse import Namespace
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, TypeVar, cast
from uuid import uuid4

import vllm.envs as envs
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from openai.types.chat.completion_create_params import CompletionCreateParamsBase as ChatParams
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParams
from pydantic import BaseModel, Field, PrivateAttr, TypeAdapter, ValidationError, model_validator
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.launcher import serve_http, setup_server
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.entrypoints.serve.utils import api_utils as vllm_routes
from vllm.entrypoints.serve.utils.orca_metrics import metrics_header
from vllm.entrypoints.serve.utils.sse_keep_alive import with_sse_keep_alive
from vllm.exceptions import VLLMClientError
from vllm.renderers.hf import HfRenderer, safe_apply_chat_template
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineDeadError

from whipstaff.server import plan as plans
from whipstaff.server.admission.companions import Scoring
from whipstaff.server.engine.compat import chat_params
from whipstaff.server.engine.frontend.launch import Engine, PlanDict
from whipstaff.server.errors import BadRequest, WhipstaffError
from whipstaff.server.names import ALIASES
from whipstaff.server.prompt.message_spans import Chat, Prompt
from whipstaff.server.prompt.prompt_source import PlaceChat, PromptSource

COUNTERS_PATIENCE = 2.0  # seconds
Render = Callable[[Sequence[Any], bool], str]  # of messages, as a prompt or as they stand in one
Handler = TypeVar("Handler", bound=Callable[..., Any])

validate_json_request = vllm_routes.validate_json_request  # a dependency: the content type is JSON


def cancellable(handler: Handler) -> Handler:
    """Cancel a route's work when its client disconnects, and count it in vLLM's server load."""
    return cast(Handler, vllm_routes.with_cancellation(vllm_routes.load_aware_call(handler)))


OPENAI = frozenset((*ChatParams.__annotations__, *TextParams.__annotations__, "stream")) - {
    "best_of"
}  # which vLLM ignores, and which changes the answer
_HOTTEST = 2.0  # temperature that vLLM takes


class Placed(Protocol):
    """What a request's extras came to for one of its prompts."""

    @property
    def ids(self) -> list[int] | None:
        """The prompt with tokens inserted; None if it is as it was."""

    def wire(self, params: SamplingParams) -> PlanDict:
        """What the engine gets, beside these sampling parameters, which it may change."""

    def check(self, max_tokens: int, is_explicit: bool) -> int:
        """What may be generated at most, or an exception that answers the client."""


class Prepared(Protocol):
    """What a request's extras came to."""

    @property
    def scores_prompts(self) -> bool:
        """Whether log-probabilities of a prompt's tokens can be told."""

    def check_sampling(self, params: SamplingParams) -> None:
        """Check the extras beside what vLLM will sample by, or an exception that answers the client."""

    def wanted_scores(self, prompt: Prompt) -> dict[str, Scoring]:
        """Texts to score before placing, or an exception that answers the client."""

    def place(self, prompt: Prompt) -> Placed:
        """Find the plan's places in a prompt, or an exception that answers the client."""


class Extras(BaseModel):
    """The fields that Whipstaff adds. They are checked by `prepare`, which knows what this server has."""

    model: str | None = None  # as vLLM has it
    steering: Any = Field(None, description="vectors to add: GET /v1/steering/methods has the schema")
    decoding: Any = Field(None, description="decoding methods: GET /v1/steering/methods has the schema")
    explain: Any = Field(None, description='{"top": k}: say what decoding did to each token')
    logprobs_source: Any = Field(None, description='"final" (default), "base": before decoding methods, or "both"')
    temperature_last: Any = Field(None, description="whether truncation comes before temperature, as in llama.cpp")
    on_unavailable: Any = Field(None, description='"error" (default) or "ignore": leave out what this server lacks')
    on_unknown: Any = Field(None, description='"warn" (default) of fields that nobody knows, or "error"')
    _prepared: Prepared | None = PrivateAttr(None)
    _placed: deque[Placed] = PrivateAttr(default_factory=deque)  # of the prompts not yet scheduled, in order

    @model_validator(mode="before")
    @classmethod
    def _renames(cls, body: Any) -> Any:
        return renamed(body, cls.model_fields) if isinstance(body, dict) else body

    def attach(self, prepared: Prepared | None) -> None:
        self._prepared = prepared

    @property
    def is_plain(self) -> bool:
        return self._prepared is None

    @property
    def _served(self) -> str | None:
        """The model that the request names, whichever kind it is."""
        return cast("str | None", getattr(self, "model"))  # noqa: B009 - a field of the other base class

    def prompts(self, inputs: list[Any], serving: Any, max_tokens: int | None, chat: "Chats | None") -> list[Prompt]:
        """The request's prompts, as far as placing the plan needs them."""
        room = serving.model_config.max_model_len - max(max_tokens or 1, 1)
        adapters = {name: (name, it.lora_int_id, it.lora_path) for name, it in serving.models.lora_requests.items()}
        found = []
        for index, one in enumerate(inputs):
            ids = one["prompt_token_ids"] if one["type"] == "token" else None
            source = _source(self, one, serving, chat) if ids else None
            placed_chat = chat.place(chat.messages, ids) if chat and ids else None
            num_tokens, tokenizer = serving._extract_prompt_len(one), serving.renderer.tokenizer
            own = adapters.get(self._served or "")
            where = index, len(inputs)
            found.append(Prompt(num_tokens, ids, room, tokenizer, placed_chat, source, adapters, own, *where))
        return found

    async def check(self, inputs: list[Any], serving: Any, max_tokens: int | None) -> None:
        """Everything that vLLM checks when it schedules the request, before anything of ours. Raises: whatever it does;
        BadRequest."""
        tasks = await serving.engine_client.get_supported_tasks()
        for number, one in enumerate(inputs):
            params = self.sampling(serving._extract_prompt_len(one), serving, max_tokens)
            processor = serving.engine_client.input_processor
            made = await processor.process_inputs_async(f"check-{uuid4()}", one, params, tasks)
            check_something_is_left(made.sampling_params)
            if self._prepared is not None:
                with naming_prompt(number, len(inputs)):
                    self._prepared.check_sampling(made.sampling_params)

    @property
    def lists_tokens(self) -> bool:
        """Whether it says which tokens are allowed, of which nothing may be left."""
        return getattr(self, "allowed_token_ids") is not None and not getattr(self, "use_beam_search")  # noqa: B009

    def sampling(self, num_tokens: int, serving: Any, max_tokens: int | None) -> SamplingParams:
        """What vLLM will sample a prompt of that length by."""
        most = _most_tokens(num_tokens, serving, max_tokens)
        params: SamplingParams = getattr(self, "to_sampling_params")(most, serving.default_sampling_params)  # noqa: B009
        return params

    async def score(self, prompts: list[Prompt], serving: Any) -> None:
        """Let the engine score the texts that further prompts depend on."""
        assert self._prepared is not None
        for prompt in prompts:
            for name, wanted in self._prepared.wanted_scores(prompt).items():
                prompt.scores[name] = await _log_probabilities(serving, wanted, self._served)

    def place(
        self,
        inputs: list[Any],
        prompts: list[Prompt],
        serving: Any,
        max_tokens: int | None,
        cap: Callable[[int], None],
    ) -> None:
        """Place the plan in every prompt of the request; `cap` lowers the request's own limit if need be."""
        assert self._prepared is not None
        allowed = []
        for number, (one, prompt) in enumerate(zip(inputs, prompts, strict=True)):
            with naming_prompt(number, len(inputs)):
                placed, num_tokens = self._prepared.place(prompt), prompt.num_tokens
                if placed.ids is not None:
                    one["prompt_token_ids"], num_tokens = placed.ids, len(placed.ids)
                most = max(_most_tokens(num_tokens, serving, max_tokens), 1)  # to echo alone, vLLM generates one, too
                allowed.append((most, placed.check(most, max_tokens is not None)))
            self._placed.append(placed)
        if any(capped < most for most, capped in allowed):
            cap(min(capped for _, capped in allowed))

    def planned(self, make: Callable[[], SamplingParams]) -> SamplingParams:
        """vLLM asks for the sampling parameters of each prompt once, in order. A temperature that it does not take is
        one that our own stages apply."""
        params = self.cooled(make) if not self.is_plain and is_hot(self) else make()
        if self._placed:
            params.extra_args = {**(params.extra_args or {}), plans.KEY: self._placed.popleft().wire(params)}
        return params

    def cooled(self, make: Callable[[], SamplingParams]) -> SamplingParams:
        """With a temperature that vLLM does not take."""
        own = getattr(self, "temperature")  # noqa: B009 - a field of the other base class
        self.temperature = 1.0
        try:
            params = make()
        finally:
            self.temperature = own
        params.temperature = own
        return params


class ChatRequest(ChatCompletionRequest, Extras):
    """A chat completion with the extra fields."""

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted. `echo` repeats the text of the last message."""
        return self.prompt_logprobs is not None

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        params = self.planned(partial(super().to_sampling_params, *args, **kwargs))
        if self._prepared is not None and not self.scores_prompt and not self._prepared.scores_prompts:
            # vLLM scores the prompt of every chat that echoes, asked or not: here it would be without the method
            params.prompt_logprobs, params.skip_reading_prefix_cache = None, False
        return params


class TextRequest(CompletionRequest, Extras):
    """A text completion with the extra fields."""

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted."""
        return self.prompt_logprobs is not None or (bool(self.echo) and self.logprobs is not None)

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        return self.planned(partial(super().to_sampling_params, *args, **kwargs))


class ServingChat(OpenAIServingChat):
    """Places plans between tokenising and scheduling."""

    async def render_chat_request(self, request: Any) -> Any:
        result = await super().render_chat_request(request)
        if not isinstance(request, ChatRequest) or isinstance(result, ErrorResponse):
            return result
        conversation, inputs = result
        explicit = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        if not request.is_plain or request.lists_tokens:
            await request.check(inputs, self, explicit)
        if not request.is_plain:

            def cap(limit: int) -> None:
                request.max_completion_tokens = limit

            prompts = request.prompts(inputs, self, explicit, _chats(request, conversation, self))
            await request.score(prompts, self)
            # a long chat takes a while to be told apart
            await asyncio.to_thread(request.place, inputs, prompts, self, explicit, cap)
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
    """Places plans between tokenising and scheduling."""

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
        result = await super().render_completion_request(request)
        if not isinstance(request, TextRequest) or isinstance(result, ErrorResponse):
            return result
        if not request.is_plain or request.lists_tokens:
            await request.check(result, self, request.max_tokens)
        if not request.is_plain:

            def cap(limit: int) -> None:
                request.max_tokens = limit

            prompts = request.prompts(result, self, request.max_tokens, None)
            await request.score(prompts, self)
            request.place(result, prompts, self, request.max_tokens, cap)
        return result


def _most_tokens(num_tokens: int, serving: Any, max_tokens: int | None) -> int:
    """How many tokens vLLM lets follow a prompt of that length."""
    most: int = vllm_routes.get_max_tokens(
        serving.model_config.max_model_len,
        max_tokens,
        num_tokens,
        serving.default_sampling_params,
        serving.override_max_tokens,
    )
    return most


def check_something_is_left(params: SamplingParams) -> None:
    """Refuse bans that leave none of the allowed tokens: vLLM would generate padding. Raises: BadRequest.

    Args:
        params: with the tokens of words and the ones that stop, as vLLM's input processor leaves them.
    """
    if params.allowed_token_ids is None:
        return
    left = set(params.allowed_token_ids) - {word[0] for word in params.bad_words_token_ids or () if len(word) == 1}
    if not left:
        raise BadRequest("these are all of allowed_token_ids: no token is left to generate", "bad_words")
    if params.min_tokens and params.structured_outputs is None and not left - params.all_stop_token_ids:
        raise BadRequest(
            "no token is left to generate before so many: those of allowed_token_ids all end the answer", "min_tokens"
        )


@contextmanager
def naming_prompt(number: int, num_prompts: int) -> Iterator[None]:
    """Errors of one of several prompts say which."""
    try:
        yield
    except WhipstaffError as error:
        if num_prompts == 1:
            raise
        raise type(error)(f"prompt[{number}]: {error.message}", error.param) from None


class Chats(NamedTuple):
    """A chat request's messages, and what its template makes of messages."""

    messages: Sequence[Any]
    text_of: Render
    place: PlaceChat
    adds_special_tokens: bool


def _chats(request: ChatRequest, conversation: list[Any], serving: ServingChat) -> Chats | None:
    """How the messages of a prompt are found; None where something else than a Hugging Face template made it."""
    renderer, tokenizer = serving.online_renderer, serving.renderer.tokenizer
    if not isinstance(serving.renderer, HfRenderer) or renderer.use_harmony or not tokenizer.is_fast:
        return None
    tools = None
    if request.tools and not (request.tool_choice == "none" and renderer.exclude_tools_when_tool_choice_none):
        tools = [tool.model_dump() for tool in request.tools]
    params = chat_params(request, renderer)
    defaults = {**renderer.default_chat_template_kwargs, "tools": tools, "tokenize": False}
    settings = params.with_defaults(defaults).get_apply_chat_template_kwargs()

    def text_of(messages: Sequence[Any], is_prompt: bool) -> str:
        ends_here = {} if is_prompt else {"add_generation_prompt": False, "continue_final_message": False}
        return str(
            safe_apply_chat_template(serving.model_config, tokenizer, list(messages), **{**settings, **ends_here})
        )

    def place(messages: Sequence[Any], ids: Sequence[int]) -> Chat:
        return Chat(tokenizer, messages, ids, text_of)

    return Chats(conversation, text_of, place, request.add_special_tokens)


def _source(request: Extras, prompt: Any, serving: Any, chat: Chats | None) -> PromptSource | None:
    """A prompt as a source of others; None for chats that no Hugging Face template made."""
    tokenizer, renderer = serving.renderer.tokenizer, serving.online_renderer
    if tokenizer is None or (chat is None and isinstance(request, ChatRequest)):
        return None

    def ids_of(messages: Sequence[Any]) -> list[int]:
        if chat is not None:
            text, adds = chat.text_of(messages, True), chat.adds_special_tokens
        else:
            template = {"chat_template": renderer.chat_template, "add_generation_prompt": True, "tokenize": False}
            text = str(safe_apply_chat_template(serving.model_config, tokenizer, list(messages), **template))
            adds = False
        found: list[int] = tokenizer.encode(text, add_special_tokens=adds)
        return found

    adds_special_tokens = bool(getattr(request, "add_special_tokens", True))
    messages, written = chat.messages if chat else None, prompt.get("prompt")
    place = None if chat is None else chat.place
    return PromptSource(prompt["prompt_token_ids"], tokenizer, adds_special_tokens, ids_of, messages, written, place)


async def _log_probabilities(serving: Any, wanted: Scoring, model: str | None) -> list[float]:
    """Of every token of a text but the first, under the served model, or an adapter of it, steered as asked."""
    plan = PlanDict(plans.RequestPlan(wanted.steering).to_wire(), keeps=wanted) if wanted.steering else None
    extra = {plans.KEY: plan} if plan else None
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, extra_args=extra)
    ids = list(wanted.ids)
    prompt, adapter, said = {"prompt_token_ids": ids}, serving.models.lora_requests.get(model), None
    async for output in serving.engine_client.generate(prompt, params, f"score-{uuid4()}", lora_request=adapter):
        said = output.prompt_logprobs or said
    return [said[position][ids[position]].logprob for position in wanted.positions[1:]] if said else []


def renamed(body: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A request with other servers' names of vLLM's fields replaced. Raises: BadRequest."""
    for theirs, name in ALIASES.items() if ALIASES.keys() & body.keys() else ():
        if (value := body.get(theirs)) is None:
            continue
        try:
            checked = TypeAdapter(fields[name].annotation).validate_python(value)
        except ValidationError as error:
            raise BadRequest(str(error.errors()[0]["msg"]), theirs) from None
        if body.get(name) not in (None, checked):
            raise BadRequest(f"given twice: {name} is {body[name]!r}", theirs)
        body = {key: other for key, other in body.items() if key != theirs} | {name: checked}
    return body


@cache
def known_names(model: type[BaseModel]) -> frozenset[str]:
    """The fields of a request that mean something on its route, or nothing on either and OpenAI's protocol has them."""
    aliases = {field.alias for field in model.model_fields.values() if field.alias}
    of_others = {*ChatRequest.model_fields, *TextRequest.model_fields}
    return (OPENAI - of_others).union(model.model_fields, aliases, ALIASES)


def unknown_names(request: "ChatRequest | TextRequest") -> list[str]:
    """The fields of a request that are none of these, in its order."""
    more = request.model_extra or {}
    return [name for name, value in more.items() if value is not None and name not in known_names(type(request))]


def is_hot(request: Any) -> bool:
    """Whether a request's temperature is one that vLLM does not take."""
    return request.temperature is not None and request.temperature > _HOTTEST and not request.use_beam_search


def truncates(request: "ChatRequest | TextRequest") -> bool:
    """Whether the request itself leaves out what is unlikely."""
    is_nucleus = request.top_p is not None and request.top_p < 1
    return is_nucleus or (request.top_k or 0) > 0 or (request.min_p or 0) > 0


def has_grammar(request: ChatRequest | TextRequest) -> bool:
    """Whether the answer must follow a grammar."""
    shape = getattr(request.response_format, "type", "text") if request.response_format else "text"
    return shape != "text" or request.structured_outputs is not None


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


class Guard(AuthenticationMiddleware):
    """vLLM's check of the user's key, and a way past it."""

    def __init__(self, app: Any, tokens: list[str], admits: Callable[[str, Headers], bool]) -> None:
        super().__init__(app, tokens)
        self._admits = admits

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if self._admits(path, Headers(scope=scope)):
                return self.app(scope, receive, send)
        return super().__call__(scope, receive, send)


def admit(app: FastAPI, admits: Callable[[str, Headers], bool]) -> None:
    """Let requests that `admits` knows by path and headers through without the user's key."""
    for layer in app.user_middleware:
        if layer.cls is AuthenticationMiddleware:
            layer.cls = partial(Guard, admits=admits)


def check_sampling(request: ChatRequest | TextRequest, is_hot_taken: bool) -> None:
    """Check the ranges of a request's sampling parameters. Raises: BadRequest."""
    make = partial(request.to_sampling_params, max(request.max_tokens or 1, request.min_tokens), {})
    try:
        request.cooled(make) if is_hot_taken else make()
    except (ValueError, VLLMClientError) as error:
        raise BadRequest(str(error.args[0]), getattr(error, "parameter", None)) from None


def parse(model: type[ChatRequest] | type[TextRequest], body: dict[str, Any]) -> ChatRequest | TextRequest:
    """A request from its JSON. Raises: what a route with this request model would."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from None


def _serving(app: FastAPI, request: ChatRequest | TextRequest) -> Any:
    is_chat = isinstance(request, ChatRequest)
    return app.state.openai_serving_chat if is_chat else app.state.openai_serving_completion


async def answer(request: ChatRequest | TextRequest, raw: Request) -> Any:
    """vLLM's answer: an error Response, a response model, or an async generator of server-sent events."""
    serving = _serving(raw.app, request)
    if isinstance(request, ChatRequest):
        result = await serving.create_chat_completion(request, raw)
    else:
        result = await serving.create_completion(request, raw)
    if isinstance(result, ErrorResponse):
        return JSONResponse(result.model_dump(), status_code=result.error.code)
    return result


async def render(request: ChatRequest | TextRequest, app: FastAPI) -> Response | None:
    """Tokenise and check a request without scheduling it; a Response if vLLM refuses it."""
    serving = _serving(app, request)
    if isinstance(request, ChatRequest):
        result = await serving.render_chat_request(request)
    else:
        result = await serving.render_completion_request(request)
    return JSONResponse(result.model_dump(), result.error.code) if isinstance(result, ErrorResponse) else None


async def reason_against(request: ChatRequest | TextRequest, app: FastAPI) -> str | None:
    """Why vLLM would not take a request's prompt; None if it would."""
    try:
        refused = await render(request, app)
    except VLLMClientError as error:
        return str(error.args[0])
    return None if refused is None else str(json.loads(bytes(refused.body))["error"]["message"])


def readings(raw: Request) -> Callable[[str], Awaitable[list[dict[str, Any]]]]:
    """Asks the first worker what a request's conditions read, by its ticket."""

    async def of(readings_id: str) -> list[dict[str, Any]]:
        found: list[list[dict[str, Any]]] = await raw.app.state.engine_client.collective_rpc(
            "whipstaff_readings", args=(readings_id,)
        )
        return found[0]

    return of


async def counters(raw: Request) -> dict[str, Any] | None:
    """What the first worker has counted; None if it does not answer soon: it may be in a long step, or gone."""
    engine = raw.app.state.engine_client
    try:
        found = await asyncio.wait_for(engine.collective_rpc("whipstaff_counters"), COUNTERS_PATIENCE)
    except (TimeoutError, EngineDeadError):
        return None
    return cast("dict[str, Any]", found[0])


def load_headers(raw: Request) -> dict[str, str] | None:
    """The engine's load as response headers, where the client asks for them (ORCA)."""
    wanted = raw.headers.get("endpoint-load-metrics-format", "")
    return cast("dict[str, str] | None", metrics_header(wanted))


def event_stream(events: Any, raw: Request, headers: Mapping[str, str]) -> StreamingResponse:
    """Server-sent events with vLLM's keep-alive comments."""
    interval = float(getattr(raw.app.state.args, "sse_keep_alive_interval", 0))
    stream = with_sse_keep_alive(events, interval)
    return StreamingResponse(stream, media_type="text/event-stream", headers=dict(headers))


async def build(engine: Engine, args: Namespace) -> FastAPI:
    """vLLM's application around `engine`, its serving classes replaced by ours."""
    tasks = await engine.get_supported_tasks()
    app: FastAPI = build_app(args, tasks, engine.model_config)
    await init_app_state(engine, app.state, args, tasks)
    app.state.openai_serving_chat.__class__ = ServingChat
    app.state.openai_serving_completion.__class__ = ServingCompletion
    app.state.openai_serving_models.__class__ = ServingModels
    return app


def listen(args: Namespace) -> tuple[str, Any]:
    """Bind the port before the engine loads, as vLLM does, so that a port in use is known at once."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt("terminated")

    signal.signal(signal.SIGTERM, interrupt)  # until uvicorn runs and takes over
    return cast("tuple[str, Any]", setup_server(args, reuse_port=False))


async def serve(
    app: FastAPI, args: Namespace, sock: Any, peer_loads: tuple[Any, int] | None = None
) -> asyncio.Task[None]:
    """Serve until told to stop; await the returned task after shutting the engine down.

    Args:
        peer_loads: the loads of all API servers that share the socket, and which of them is this one's.
    """
    log_config = get_uvicorn_log_config(args)
    task: asyncio.Task[None] = await serve_http(
        app,
        sock=sock,
        peer_loads=peer_loads,
        enable_ssl_refresh=args.enable_ssl_refresh,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        h11_max_incomplete_event_size=args.h11_max_incomplete_event_size,
        h11_max_header_count=args.h11_max_header_count,
        **({} if log_config is None else {"log_config": log_config}),
    )
    return task
