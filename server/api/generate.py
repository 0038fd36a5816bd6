"""One short function per endpoint: the two OpenAI routes with the extra fields, and what a server can say of itself."""

import asyncio
import json
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import Any, NamedTuple

from fastapi import APIRouter, Body, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from whipstaff.server import metrics
from whipstaff.server.access.capture_files import Download
from whipstaff.server.access.keys import HOLDER, Holder
from whipstaff.server.access.ledger import Spending
from whipstaff.server.access.policy import Policy
from whipstaff.server.admission.explanations import ChoiceExplanations
from whipstaff.server.admission.fields import check_characters, ours_in, unpacked, with_xargs
from whipstaff.server.admission.prepare import compile_extras, prepare, unknown_warnings
from whipstaff.server.admission.receipt import RECEIPT_FIELD, Tally, final_receipt, receipt, warnings_of
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.admission.search import effort
from whipstaff.server.api.access import headers_of
from whipstaff.server.api.descriptions import Answer, Links, Methods, Model, Presets, Valid, Vector, Vectors, answers
from whipstaff.server.api.descriptions import Preset as PresetAnswer
from whipstaff.server.api.method_table import method_table
from whipstaff.server.api.sse import JsonAnswer, Retractions, header_of, with_extras
from whipstaff.server.engine.frontend import openai, responses
from whipstaff.server.engine.frontend.batch import BatchRequest
from whipstaff.server.engine.frontend.requests import ChatRequest, Notes, OpenAIRequest, TextRequest, parse
from whipstaff.server.engine.frontend.responses import ResponseRequest
from whipstaff.server.errors import (
    BadRequest,
    FieldOrigins,
    Forbidden,
    NotFound,
    TooLarge,
    Unavailable,
    WhipstaffError,
    calling,
)
from whipstaff.server.names import FIELDS, that_change
from whipstaff.server.plan import PLAN_KEY, PlacedRequest
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.live import LiveRegistry
from whipstaff.server.registry.presets import Preset
from whipstaff.server.registry.vectors import Entry
from whipstaff.steering.algebra import cosine

AnyRequest = OpenAIRequest | BatchRequest | ResponseRequest
router = APIRouter()
NOTHING: Mapping[str, Any] = {"steering": [], "decoding": [], "warnings": []}  # the receipt of a plain request
# the routes that take presets and extras
OURS = "/v1/chat/completions, its batches, /v1/completions, /v1/messages and /v1/responses"
MAX_ANSWERS, MAX_PROMPTS = 128, 1024  # of one request; how many run at once is --max-num-seqs's to say
_WHOLE: Mapping[str, type[OpenAIRequest | ResponseRequest]] = {  # by the field of a body that makes it a whole request
    "messages": ChatRequest,
    "prompt": TextRequest,
    "input": ResponseRequest,
}
WARNINGS = "X-Whipstaff-Warnings"  # a header of responses


async def capabilities(request: Request) -> Capabilities:
    """What there is now, for who asks."""
    library: LiveRegistry = request.app.state.whipstaff
    caps, holder = await library.current(), HOLDER.get()
    return caps if holder is None else holder.view.of(caps)


async def check_text(raw: Request) -> None:
    """A dependency of every route that takes JSON: half a surrogate pair is no text. Raises: BadRequest naming the
    field."""
    if "json" not in raw.headers.get("content-type", "").lower():
        return
    data = await raw.body()
    if b"\\ud" not in data.lower() and b"\xed" not in data:  # how halves are written, and other characters, too
        return
    try:
        body = await raw.json()
    except (ValueError, RecursionError):
        return  # the route's own business
    check_characters(body)


def add_records(body: dict[str, Any], explained: ChoiceExplanations) -> None:
    """Put what is to be said of tokens into the choices of an answer."""
    explained.add_to(body)


class Form(NamedTuple):
    """How an API is answered."""

    answer: Callable[[Any, Request], Awaitable[Any]]  # as `openai.answer`; a body may be JSON
    add_records: Callable[[dict[str, Any], ChoiceExplanations], None] = add_records
    with_extras: Callable[..., AsyncGenerator[str, None]] = with_extras
    takes_back: bool = True  # whether what was streamed can be


async def compiled_of(request: AnyRequest, raw: Request) -> CompiledRequest | None:
    """Compile a request's extras, wherever they came in, and those of the preset in its model's name; None for a plain
    request of which there is nothing to say."""
    base, name = openai.split_model(request.model, raw.app)
    _check_counts(request)
    holder = HOLDER.get()
    if holder is not None:
        name = _bounded(request, name, holder.policy)
    if name is None and not (request.may_have_extras or request.unknown_names or request.remarks):
        return None
    body = {} if name is None else request.sent(await raw.json())
    caps = await capabilities(raw)  # as it is now: nothing may be awaited until what it names is held
    preset, started = None if name is None else caps.preset(name, "model"), time.perf_counter()
    if preset is not None:
        request.model = base
        caps = caps if holder is None else holder.view.with_preset(await _everything(raw), preset)
    compiled = prepare(request, caps, preset, body)
    if request.remarks:
        compiled = compiled or CompiledRequest(caps)
        compiled = replace(compiled, warnings=(*request.remarks, *compiled.warnings))
    if holder is not None and compiled is not None:
        with compiled.origins.named():
            holder.policy.check_methods(compiled.asked_for)
    if compiled is not None:
        metrics.note_admission(started, bool(compiled.steering.entries), bool(compiled.decoding))
    return compiled


async def _everything(raw: Request) -> Capabilities:
    """What there is now, whoever asks."""
    library: LiveRegistry = raw.app.state.whipstaff
    return await library.current()


def _check_counts(request: AnyRequest) -> None:
    """Raises: BadRequest."""
    for said, most, param in ((request.num_answers, MAX_ANSWERS, "n"), (request.num_prompts, MAX_PROMPTS, "prompt")):
        if said > most:
            raise BadRequest(f"at most {most} are taken, not {said}", param)


def _bounded(request: AnyRequest, preset: str | None, policy: Policy) -> str | None:
    """Keep a request to what its key may ask for; the preset that holds for it. Raises: Forbidden."""
    forced = policy.forced_preset
    if forced is not None and preset not in (None, forced):
        raise Forbidden("this key has a preset of its own; name the model without one", "model")
    policy.check_counts(request.num_answers, request.num_prompts, request.explicit_max_tokens)
    if policy.max_tokens is not None and request.explicit_max_tokens is None:
        request.cap(policy.max_tokens)
    return forced if forced is not None else preset


async def exchange() -> AsyncIterator[AsyncExitStack]:
    """What ends with a request: once its response was sent, or its client is gone."""
    async with AsyncExitStack() as at_end:
        yield at_end


JSON = [Depends(openai.validate_json_request), Depends(check_text)]  # of the routes that generate


@router.post("/v1/chat/completions", dependencies=JSON, responses=answers(Answer, streams=True))
@openai.cancellable
async def create_chat_completion(
    request: ChatRequest, raw_request: Request, at_end: AsyncExitStack = Depends(exchange)
) -> Response:
    """OpenAI's chat completions, with `steering` and `decoding`."""
    return await generate(request, raw_request, at_end)


@router.post("/v1/completions", dependencies=JSON, responses=answers(Answer, streams=True))
@openai.cancellable
async def create_completion(
    request: TextRequest, raw_request: Request, at_end: AsyncExitStack = Depends(exchange)
) -> Response:
    """OpenAI's completions, with `steering` and `decoding`."""
    return await generate(request, raw_request, at_end)


async def generate(request: AnyRequest, raw: Request, at_end: AsyncExitStack, form: Form | None = None) -> Response:
    """Admit a request and have it answered; `form` None is OpenAI's own."""
    form = form or Form(openai.answer)
    with openai.answering_as(request.model):
        compiled = await compiled_of(request, raw)
        spending = None
        if (holder := HOLDER.get()) is not None and not holder.meter.is_free:
            spending = _spending(request, compiled, holder)
            at_end.callback(spending.settle)
            request.pay(spending.expect, spending.bill)
        if compiled is None:
            return _response(await form.answer(request, raw), raw, {}, at_end)
        if compiled.retracts and not form.takes_back:
            raise BadRequest("this API has no way to take back what it streamed", "stream_retractions")
        lease = at_end.enter_context(raw.app.state.whipstaff.hold(compiled.vectors))
        timed = None if compiled.preset is None else metrics.PresetTime(compiled.preset.name)
        tally, explains, retractions = Tally(), compiled.options.explain is not None, Retractions()
        explained = ChoiceExplanations(compiled.caps.words) if explains or compiled.reads_along else None
        download = None
        if compiled.downloads:
            download = Download(raw.app.state.whipstaff_captures)
            at_end.callback(download.end)
        if not compiled.is_plain:

            def note_search(prompt: int, record: dict[str, Any]) -> None:
                tally.note_search(prompt, record)
                if spending is not None and compiled.searches:
                    spending.note_search(prompt, record["counts"])

            def reserve(placed: Sequence[PlacedRequest]) -> None:
                assert download is not None
                with compiled.origins.named():
                    download.reserve(compiled.most_file_bytes(placed, request.num_answers))

            notes = Notes(
                output=tally.note,
                token=explained.note if explained and explains else None,
                search=note_search,
                retract=retractions.note if compiled.retracts else None,
                sequence=tally.name_sequence if compiled.tells_sequences else None,
                reading=partial(_note_reading, compiled, explained) if explained and compiled.reads_along else None,
                placed=None if download is None else reserve,
            )
            request.attach(compiled, notes, lease)
        result = await form.answer(request, raw)

    async def finish(body: dict[str, Any]) -> None:
        """What is said at the end, in a response or the last event of a stream."""
        engine = raw.app.state.engine_client
        told = openai.readings(engine), openai.captures(engine)
        keep = None if download is None else download.fill
        made = await final_receipt(compiled, request.placed, tally, *told, request.n or 1, keep)
        metrics.note_steering(made["steering"])
        body[RECEIPT_FIELD] = made
        num_computed = tally.num_computed([one.plan for one in request.placed])
        if body.get("usage") and num_computed is not None:
            _add_computed(body["usage"], num_computed)

    if isinstance(result, Response):
        return result
    warnings = warnings_of(compiled, request.placed)
    headers = {WARNINGS: header_of(warnings)} if warnings else {}
    if hasattr(result, "__aiter__"):
        events = form.with_extras(result, finish, explained, retractions)
        return _response(timed.over(events) if timed else events, raw, headers, at_end)
    body = result if isinstance(result, dict) else result.model_dump()
    await finish(body)
    if explained is not None:
        form.add_records(body, explained)
    if timed is not None:
        timed.end()
    return _response(body, raw, headers, at_end)


def _add_computed(usage: dict[str, Any], num_tokens: int) -> None:
    """Let `usage` say, beside the tokens of answers, how many were computed for them."""
    details = "output_tokens_details" if "output_tokens" in usage else "completion_tokens_details"
    usage[details] = (usage.get(details) or {}) | {"computed_tokens": num_tokens}


def _note_reading(
    compiled: CompiledRequest, explained: ChoiceExplanations, choice: int, told: Mapping[str, Any]
) -> None:
    explained.note_reading(choice, told["position"], compiled.readings_by_entry(told["values"]))


def _spending(request: AnyRequest, compiled: CompiledRequest | None, holder: Holder) -> Spending:
    """What a request may come to, of its key's."""
    num = request.num_answers
    if compiled is None:
        return Spending(holder.meter, num, num, 1)
    num_models, num_tried = 1 + len(compiled.limits), sum(entry.num_tried for entry in compiled.decoding)
    if compiled.search is not None:
        computed, tried, most = effort(compiled.search, num_tried)
        return Spending(holder.meter, num, computed, num_models, tried, most)
    num_drawn = compiled.num_candidates or num
    return Spending(holder.meter, num, num_drawn, num_models, num_drawn * num_tried)


def _response(result: Any, raw: Request, headers: Mapping[str, str], at_end: AsyncExitStack) -> Response:
    """What vLLM answers, as HTTP: a response already, events, or a body."""
    if isinstance(result, Response):
        return result
    if hasattr(result, "__aiter__"):
        return openai.event_stream(result, raw, headers, at_end)
    of = JsonAnswer if isinstance(result, dict) else JSONResponse
    body = result if isinstance(result, dict) else result.model_dump()
    return of(body, headers={**(openai.load_headers(raw) or {}), **headers})


@router.get("/v1/models/{name:path}", responses=answers(Model))
async def show_model(name: str, raw: Request) -> dict[str, Any]:
    """A model, an adapter or a preset of one, as the list of all shows it."""
    shown = await openai.models(raw.app)
    if name not in shown:
        raise NotFound(f"The model `{name}` does not exist.", "model")
    return shown[name]


@router.get("/v1/steering/methods", responses=answers(Methods))
async def methods(raw: Request, caps: Capabilities = Depends(capabilities)) -> dict[str, Any]:
    """Every method: kind, JSON schema, defaults, paper, whether this server can run it, and a request that shows it."""
    model = next(iter(await openai.models(raw.app)))
    return {"object": "list", "data": method_table(caps, model)}


@router.get("/v1/steering/vectors", responses=answers(Vectors))
async def vectors(caps: Capabilities = Depends(capabilities)) -> dict[str, Any]:
    """Every vector that was loaded."""
    return {"object": "list", "data": [vector_to_json(entry) for entry in caps.registry]}


@router.get("/v1/steering/vectors/{name}", responses=answers(Vector))
async def vector(name: str, caps: Capabilities = Depends(capabilities)) -> dict[str, Any]:
    """One vector, with the norm of each of its tensors, how large its edits are beside the model's activations, and its
    cosine with every other that has numbers at the same places."""
    entry = caps.registry.entry(name)
    others = [other for other in caps.registry if other.name != name]
    found = await asyncio.to_thread(lambda: [cosine(entry.vector, other.vector) for other in others])
    return {
        **vector_to_json(entry),
        "norms": entry.vector.norms(),
        "doses": entry.vector.method.kind.doses(entry.vector, caps) if entry.problem is None else [],
        "cosines": {other.name: value for other, value in zip(others, found, strict=True) if value is not None},
    }


@router.post("/v1/steering/validate", dependencies=[Depends(check_text)], responses=answers(Valid))
async def validate(raw: Request, body: dict[str, Any] = Body(...)) -> Response:
    """Compile a request without running it: its plan, or the error that the request would get.

    With `messages`, `prompt` or `input` the body is a whole request, and what depends on the prompt is checked too.
    """
    started = time.perf_counter()
    request: OpenAIRequest | ResponseRequest | None = None
    if model := next((model for field, model in _WHOLE.items() if field in body), None):
        request = parse(model, body)
        with calling(request.names):
            compiled = await compiled_of(request, raw)
            if compiled is not None and not compiled.is_plain:
                request.attach(compiled.dry())
            if (refused := await _render(request, raw.app)) is not None:
                return refused
    else:
        compiled = await _compiled_without_prompt(body, raw)
    placed = () if request is None else request.placed
    plan = NOTHING if compiled is None else receipt(compiled, placed)
    took = (time.perf_counter() - started) * 1e3
    return JSONResponse({"valid": True, "plan": plan, "milliseconds": took})


async def _render(request: OpenAIRequest | ResponseRequest, app: FastAPI) -> Response | None:
    if isinstance(request, ResponseRequest):
        return await responses.render(request, app)
    return await openai.render(request, app)


async def _compiled_without_prompt(body: dict[str, Any], raw: Request) -> CompiledRequest | None:
    """Fields alone, or with a preset. Raises: WhipstaffError."""
    caps, (_, name) = await capabilities(raw), openai.split_model(_model(body), raw.app)
    if (holder := HOLDER.get()) is not None:
        name = holder.policy.forced_preset or name
    if name is not None:
        return await compiled_of(_with_some_prompt(body, caps.preset(name, "model")), raw)
    with FieldOrigins(xargs=ours_in(body.get("vllm_xargs"))).named():
        fields = with_xargs(body, body.get("vllm_xargs"))
        known = ChatRequest.known_names() | TextRequest.known_names()
        names = [name for name, value in body.items() if value is not None and name not in known]
        unknown = unknown_warnings(names, fields, known)
        compiled = compile_extras(fields, caps)
    if compiled is None and not unknown:
        return None
    compiled = compiled or CompiledRequest(caps)
    return replace(compiled, warnings=(*unknown, *compiled.warnings))


def _with_some_prompt(body: dict[str, Any], preset: Preset) -> OpenAIRequest:
    """Fields without a prompt as a request that the preset can fill in. Raises: what a route would."""
    if preset.is_for_text:
        return parse(TextRequest, {**body, "prompt": "Hello"})
    return parse(ChatRequest, {**body, "messages": [{"role": "user", "content": "Hello"}]})


@router.get("/v1/steering/presets", responses=answers(Presets))
async def presets(caps: Capabilities = Depends(capabilities)) -> dict[str, Any]:
    """Every preset: what it says, and the digest that receipts name."""
    return {"object": "list", "data": [preset_to_json(preset) for preset in caps.presets.values()]}


@router.get("/v1/steering/presets/{name}", responses=answers(PresetAnswer))
async def preset(name: str, caps: Capabilities = Depends(capabilities)) -> dict[str, Any]:
    """One preset."""
    return preset_to_json(caps.preset(name))


@router.get("/v1/steering/links", responses=answers(Links))
async def links(raw: Request) -> dict[str, str | None]:
    """Where else this server is shown: `grafana`, as --grafana-url says, or null."""
    found: dict[str, str | None] = raw.app.state.whipstaff_links
    return found


def preset_to_json(preset: Preset) -> dict[str, Any]:
    """A preset, for its owner."""
    return {
        "id": preset.name,
        "object": "steering.preset",
        "digest": preset.digest,
        "read_only": preset.is_fixed,
        **preset.wire,
    }


def vector_to_json(entry: Entry) -> dict[str, Any]:
    """A vector, for its owner."""
    header, vector = entry.vector.header, entry.vector
    return {
        "id": entry.name,
        "object": "steering.vector",
        "fits": entry.problem is None,
        "problem": entry.problem,
        "read_only": entry.is_fixed,
        "digest": vector.digest,
        "layers": vector.layers,
        "sites": vector.sites,
        "warnings": vector.warnings,
        **header.model_dump(exclude={"format"}),
    }


async def refuse_extras(raw: Request) -> None:
    """A dependency of vLLM's other routes: they would silently ignore the extra fields, and know no preset."""
    body = await _sent(raw)
    _, preset = openai.split_model(_model(body), raw.app)
    if preset is not None and preset in (await capabilities(raw)).presets:
        raise Unavailable(f"presets work on {OURS}; here, name the model without @{preset}", "model")
    xargs = body.get("vllm_xargs")
    fields = {**(xargs if isinstance(xargs, dict) else {}), **body}
    said = {name: unpacked(name, fields[name]) for name in FIELDS if fields.get(name) is not None}
    if present := [*that_change(said), *(name for name in (PLAN_KEY,) if fields.get(name) is not None)]:
        raise Unavailable(f"{present[0]} works on {OURS}", present[0])


async def drop_preset(raw: Request) -> None:
    """A dependency of vLLM's routes that generate nothing: to them, a preset of a model is that model."""
    body = await _sent(raw)
    base, preset = openai.split_model(_model(body), raw.app)
    if preset is not None:
        (await capabilities(raw)).preset(preset, "model")
        body["model"] = base  # in what the route is about to parse


async def _sent(raw: Request) -> dict[str, Any]:
    """A request's JSON; empty where it is no object, which is its route's own business."""
    try:
        body = await raw.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}


def _model(body: Mapping[str, Any]) -> str | None:
    return model if isinstance(model := body.get("model"), str) else None


async def answer_http_error(raw: Request, error: Exception) -> Response:
    """The exception handler for what no route was asked for, and for JSON that Python does not read."""
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    refused = {"message": error.detail, "type": f"{status.phrase.title().replace(' ', '')}Error", "param": None}
    if isinstance(error.__cause__, ValueError):
        refused |= {"message": f"{error.detail}: {error.__cause__}", "param": _long_number(await raw.body())}
    return JSONResponse({"error": refused | {"code": status}}, status, error.headers)


def _long_number(data: bytes) -> str | None:
    """The top-level field in which JSON has a number of more digits than Python reads."""
    marked = json.loads(data, parse_int=lambda digits: _LONG if len(digits) > sys.get_int_max_str_digits() else 0)
    fields = marked.items() if isinstance(marked, dict) else ()
    return next((name for name, value in fields if _holds(value, _LONG)), None)


_LONG = object()


def _holds(value: Any, wanted: object) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is wanted or any(_holds(one, wanted) for one in inner)


async def answer_refusal(raw: Request, error: Exception) -> Response:
    """The exception handler for our own errors."""
    assert isinstance(error, WhipstaffError)
    raw.scope[metrics.REFUSED] = error
    headers = {"Connection": "close"} if isinstance(error, TooLarge) else headers_of(error)  # the rest stays unread
    return JSONResponse(error.body(raw.url.path), status_code=error.status, headers=headers)
