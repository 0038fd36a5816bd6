"""One short function per endpoint: the two OpenAI routes with the extra fields, and what a server can say of itself."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Body, Depends, Request
from fastapi.responses import JSONResponse, Response

from whipstaff.server import metrics
from whipstaff.server.admission.companions import Scoring
from whipstaff.server.admission.explanations import Explained
from whipstaff.server.admission.request import Compiled, compile_extras, loose, on_unknown
from whipstaff.server.admission.steering import Fed, doses
from whipstaff.server.api.method_table import method_table
from whipstaff.server.api.sse import FIELD, Tally, with_extras
from whipstaff.server.api.text import check_text
from whipstaff.server.engine.frontend import openai
from whipstaff.server.engine.frontend.launch import PlanDict
from whipstaff.server.errors import BadRequest, NotFound, TooLarge, Unavailable, WhipstaffError
from whipstaff.server.names import FIELDS, TEXTS, header_of, that_change, unknown_reasons
from whipstaff.server.plan import RequestPlan, take_draw
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.live import LiveRegistry
from whipstaff.server.registry.presets import Preset, blaming
from whipstaff.server.registry.vectors import Entry

router = APIRouter()
NOTHING: Mapping[str, Any] = {"steering": [], "decoding": [], "warnings": []}  # the receipt of a plain request
OURS = "/v1/chat/completions and /v1/completions"  # the routes that take presets and extras
WARNINGS = "X-Whipstaff-Warnings"  # a header of responses


@dataclass
class PreparedRequest:
    """What one request's extras and its preset came to, handed to the engine's front end."""

    compiled: Compiled
    num_choices: int = 1  # of each prompt
    tally: Tally = field(default_factory=Tally)
    preset: Preset | None = None
    filled: frozenset[str] = frozenset()  # fields that the preset filled in
    xargs: frozenset[str] = frozenset()  # fields that came in vllm_xargs
    explained: Explained | None = None
    num_placed: int = 0  # prompts

    @property
    def scores_prompts(self) -> bool:
        return self.compiled.scores_prompts

    def check_sampling(self, params: Any) -> None:
        with blaming(self.preset, self.filled, self.xargs):
            self.compiled.check_grammar(params.structured_outputs is not None)

    def wanted_scores(self, prompt: Prompt) -> dict[str, Scoring]:
        with blaming(self.preset, self.filled, self.xargs):
            return self.compiled.wanted_scores(prompt)

    def place(self, prompt: Prompt) -> "PlacedRequest":
        with blaming(self.preset, self.filled, self.xargs):
            ids = self.compiled.place(prompt)
        if self.compiled.plan.steering is not None and self.compiled.plan.steering.token_ids:
            self.tally.keeps_tokens = True
        num_tokens = prompt.num_tokens if ids is None else len(ids)
        first, self.num_placed = self.num_placed * self.num_choices, self.num_placed + 1
        return PlacedRequest(ids, self, self.compiled.plan, first, num_tokens, self.compiled.stream_names)

    async def receipt(self, readings: Callable[[str], Awaitable[list[dict[str, Any]]]]) -> dict[str, Any]:
        """What was done. `readings` finds what a request's conditions read, by its ticket."""
        fed, readings_id = self.tally.fed(), self.compiled.plan.readings_id
        if readings_id:
            found = await readings(readings_id)
            fed = [one._replace(columns=_taken(found, one.num_fed)) for one in fed]
        said = self.said(fed)
        metrics.note_steering(said["steering"])
        return said

    def said(self, fed: list[Fed]) -> dict[str, Any]:
        """The receipt; `fed` are the finished sequences."""
        named = {} if self.preset is None else {"preset": {"id": self.preset.name, "digest": self.preset.digest}}
        return {**named, **self.compiled.receipt(fed)}


def _taken(found: list[dict[str, Any]], num_fed: int) -> list[Any]:
    """The readings of a sequence of that length, which no other sequence then gets; none if they are gone."""
    for index, one in enumerate(found):
        if one["positions"] >= num_fed:
            columns: list[Any] = found.pop(index)["columns"]
            return columns
    return []


@dataclass(frozen=True)
class PlacedRequest:
    """The same for one of its prompts."""

    ids: list[int] | None
    prepared: PreparedRequest
    plan: RequestPlan
    first_choice: int
    num_tokens: int
    stream_names: Mapping[str, str]  # as explanations call streams -> as the client knows them

    def wire(self, params: Any) -> PlanDict:
        compiled, plan = self.prepared.compiled, self.plan
        if compiled.draws_itself:
            assert plan.decoding is not None
            draw = take_draw(params, compiled.is_temperature_last)
            plan = replace(plan, decoding=replace(plan.decoding, draw=draw))
        explain = None if self.prepared.explained is None else self._explain
        return PlanDict(plan.to_wire(), compiled.label, self.prepared.tally.note, explain, compiled.vectors)

    def _explain(self, index: int, record: dict[str, Any]) -> None:
        assert self.prepared.explained is not None
        record["streams"] = {self.stream_names.get(name, name): seen for name, seen in record["streams"].items()}
        self.prepared.explained.note(self.first_choice + index, record)

    def check(self, max_tokens: int, is_explicit: bool) -> int:
        with blaming(self.prepared.preset, self.prepared.filled, self.prepared.xargs):
            return self.prepared.compiled.check(self.num_tokens, max_tokens, is_explicit)


async def catalogue(request: Request) -> Capabilities:
    """What there is now."""
    library: LiveRegistry = request.app.state.whipstaff
    return await library.current()


async def prepared(request: openai.ChatRequest | openai.TextRequest, raw: Request) -> PreparedRequest | None:
    """Compile a request's extras, wherever they came in, and those of the preset in its model's name, and attach them
    to it; None for a plain request of which there is nothing to say."""
    base, name = openai.split_model(request.model, raw.app)
    if name is None and not _asks(request) and not unknown_names(request):
        return None
    caps = await catalogue(raw)
    preset = None if name is None else caps.preset(name, "model")
    if preset is None:
        return prepare(request, caps)
    metrics.PRESETS.labels(preset.name).inc()
    request.model = base
    return prepare(request, caps, preset, await raw.json())


def _asks(request: openai.ChatRequest | openai.TextRequest) -> bool:
    """Whether a request may have extras."""
    named = any(getattr(request, name, None) is not None for name in FIELDS)
    return named or bool(request.vllm_xargs) or openai.is_hot(request)


def unknown_names(request: openai.ChatRequest | openai.TextRequest) -> list[str]:
    """The fields of a request that neither OpenAI's protocol, vLLM nor Whipstaff knows."""
    return [name for name in openai.unknown_names(request) if name not in FIELDS]


def prepare(
    request: openai.ChatRequest | openai.TextRequest,
    caps: Capabilities,
    preset: Preset | None = None,
    body: Mapping[str, Any] | None = None,
) -> PreparedRequest | None:
    """The same, for a preset that is known, and the request as it was sent."""
    filled = preset.fill(request, body or {}) if preset else frozenset()
    xargs = _ours_in(request.vllm_xargs)
    with blaming(preset, filled, xargs):
        fields = _extras(request)
        unknown = warn_of(unknown_names(request), fields, openai.known_names(type(request)))
        compiled = compile_request(request, caps, fields, preset is not None and preset.gives(filled, "decoding"))
    if compiled is None and preset is None and not unknown:
        return None
    ready = PreparedRequest(
        compiled or Compiled(RequestPlan(), {}, caps), request.n or 1, preset=preset, filled=filled, xargs=xargs
    )
    ready.compiled.warnings[:0] = unknown
    ready.compiled.caps = caps.facts
    if ready.compiled.explain is not None:
        ready.explained = Explained(caps.words)
    if not ready.compiled.is_plain:
        request.attach(ready)
    return ready


def warn_of(names: Sequence[str], fields: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """What to say of names that nobody knows. Raises: BadRequest where the request wants them refused."""
    refuses, reasons = on_unknown(fields) == "error", unknown_reasons(names, known.union(FIELDS))
    for name, reason in reasons.items() if refuses else ():
        raise BadRequest(reason, name)
    more = [f"{len(names) - len(reasons)} more fields did nothing"] if len(names) > len(reasons) else []
    return [*(f"{name} did nothing: {reason}" for name, reason in reasons.items()), *more]


def compile_request(
    request: openai.ChatRequest | openai.TextRequest,
    caps: Capabilities,
    fields: Mapping[str, Any] | None = None,
    merges: bool = False,
) -> Compiled | None:
    """Compile a request's extras, or those of its `fields` that were taken out of it; see `compile_extras`.

    Raises: WhipstaffError.
    """
    compiled = compile_extras(_extras(request) if fields is None else fields, caps, merges)
    if openai.is_hot(request):
        assert request.temperature is not None
        compiled = compiled or Compiled(RequestPlan(), {}, caps)
        compiled.take_heat(request.temperature, openai.truncates(request))
    if compiled is None:
        return None
    if request.use_beam_search and not compiled.is_plain:
        raise BadRequest("beam search is not supported together with steering or decoding methods", "use_beam_search")
    compiled.check_draw(request.temperature)
    compiled.check_grammar(openai.has_grammar(request))
    compiled.check_logprobs(request.scores_prompt)
    if isinstance(request, openai.ChatRequest) and request.echo and request.logprobs and not compiled.scores_prompts:
        compiled.warnings.append(f"prompt_logprobs are left out: {compiled.silence_on_prompts}")
    return compiled


def _extras(request: openai.ChatRequest | openai.TextRequest) -> dict[str, Any]:
    """The fields of a request that vLLM does not know, taken out of its vllm_xargs."""
    present = {name: getattr(request, name, None) for name in FIELDS} | (request.model_extra or {})
    return _with_xargs(present, request.vllm_xargs)


def _ours_in(xargs: Any) -> frozenset[str]:
    """Our fields that came in a request's vllm_xargs."""
    return frozenset(xargs).intersection(FIELDS) if isinstance(xargs, dict) else frozenset()


def _with_xargs(fields: dict[str, Any], xargs: Any) -> dict[str, Any]:
    """The extra fields, from the top level of a request and, as JSON strings, out of its vllm_xargs."""
    if not isinstance(xargs, dict):
        return fields
    if FIELD in xargs:
        raise BadRequest("reserved: send `steering` and `decoding` instead", f"vllm_xargs.{FIELD}")
    for name in FIELDS:
        if name in xargs and fields.get(name) is not None:
            raise BadRequest(f"{name} is given twice, at the top level and in vllm_xargs", f"vllm_xargs.{name}")
    return fields | {name: _scalar(name, xargs.pop(name)) for name in FIELDS if name in xargs}


def _unpacked(name: str, value: Any) -> Any:
    return value if name in TEXTS else loose(value)


def _scalar(name: str, value: Any) -> Any:
    """A value of vllm_xargs, where lists are JSON strings; of a field that takes texts, a string is one that holds a
    list."""
    return loose(value) if name in TEXTS and isinstance(value, str) and value.startswith("[") else value


@router.post("/v1/chat/completions", dependencies=[Depends(openai.validate_json_request), Depends(check_text)])
@openai.cancellable
async def create_chat_completion(request: openai.ChatRequest, raw_request: Request) -> Response:
    """OpenAI's chat completions, with `steering` and `decoding`."""
    return await _generate(request, raw_request)


@router.post("/v1/completions", dependencies=[Depends(openai.validate_json_request), Depends(check_text)])
@openai.cancellable
async def create_completion(request: openai.TextRequest, raw_request: Request) -> Response:
    """OpenAI's completions, with `steering` and `decoding`."""
    return await _generate(request, raw_request)


async def _generate(request: openai.ChatRequest | openai.TextRequest, raw: Request) -> Response:
    with openai.answering_as(request.model):
        ready = await prepared(request, raw)
        result = await openai.answer(request, raw)
    if isinstance(result, Response):
        return result
    headers = {WARNINGS: header_of(ready.compiled.warnings)} if ready is not None and ready.compiled.warnings else {}
    if hasattr(result, "__aiter__"):
        if ready is not None:
            result = with_extras(result, partial(ready.receipt, openai.readings(raw)), ready.explained)
        return openai.event_stream(result, raw, headers)
    body = result.model_dump()
    if ready is not None:
        body[FIELD] = await ready.receipt(openai.readings(raw))
        if ready.explained is not None:
            ready.explained.add_to(body)
    return JSONResponse(body, headers={**(openai.load_headers(raw) or {}), **headers})


@router.get("/v1/models/{name:path}")
async def show_model(name: str, raw: Request) -> dict[str, Any]:
    """A model, an adapter or a preset of one, as the list of all shows it."""
    shown = await openai.models(raw.app)
    if name not in shown:
        raise NotFound(f"The model `{name}` does not exist.", "model")
    return shown[name]


@router.get("/v1/steering/methods")
async def methods(caps: Capabilities = Depends(catalogue)) -> dict[str, Any]:
    """Every method: kind, JSON schema, defaults, paper, and whether this server can run it."""
    return {"object": "list", "data": method_table(caps)}


@router.get("/v1/steering/vectors")
async def vectors(caps: Capabilities = Depends(catalogue)) -> dict[str, Any]:
    """Every vector that was loaded."""
    return {"object": "list", "data": [said_vector(entry) for entry in caps.registry]}


@router.get("/v1/steering/vectors/{name}")
async def vector(name: str, caps: Capabilities = Depends(catalogue)) -> dict[str, Any]:
    """One vector, with the norm of each of its tensors, and how large its edits are beside the model's activations."""
    entry = caps.registry.entry(name)
    return {
        **said_vector(entry),
        "norms": entry.vector.norms(),
        "doses": doses(entry.vector, caps) if entry.problem is None else [],
    }


@router.post("/v1/steering/validate", dependencies=[Depends(check_text)])
async def validate(raw: Request, body: dict[str, Any] = Body(...)) -> Response:
    """Compile a request without running it: its plan, or the error that the request would get.

    With `messages` or `prompt` the body is a whole request, and what depends on the prompt is checked too.
    """
    started = time.perf_counter()
    if "messages" not in body and "prompt" not in body:
        caps, (_, name) = await catalogue(raw), openai.split_model(_model(body), raw.app)
        if name is None:
            plan = _validated(body, caps)
        else:
            ready = await prepared(_with_some_prompt(body, caps.preset(name, "model")), raw)
            plan = ready.said([]) if ready else None
    else:
        model = openai.ChatRequest if "messages" in body else openai.TextRequest
        request = openai.parse(model, body)
        ready = await prepared(request, raw)
        if ready is not None:
            ready.compiled.is_dry = True
        refused = await openai.render(request, raw.app)
        if refused is not None:
            return refused
        plan = ready.said([]) if ready else None
    took = (time.perf_counter() - started) * 1e3
    return JSONResponse({"valid": True, "plan": plan or NOTHING, "milliseconds": took})


def _with_some_prompt(body: dict[str, Any], preset: Preset) -> openai.ChatRequest | openai.TextRequest:
    """Fields without a prompt as a request that the preset can fill in. Raises: what a route would."""
    if preset.is_for_text:
        return openai.parse(openai.TextRequest, {**body, "prompt": "Hello"})
    return openai.parse(openai.ChatRequest, {**body, "messages": [{"role": "user", "content": "Hello"}]})


def _validated(body: dict[str, Any], caps: Capabilities) -> dict[str, Any] | None:
    """The plan of fields without a prompt. Raises: WhipstaffError."""
    with blaming(None, (), _ours_in(body.get("vllm_xargs"))):
        return _compiled(body, caps)


def _compiled(body: dict[str, Any], caps: Capabilities) -> dict[str, Any] | None:
    fields = _with_xargs(body, body.get("vllm_xargs"))
    known = openai.known_names(openai.ChatRequest) | openai.known_names(openai.TextRequest)
    names = [name for name, value in body.items() if value is not None and name not in known and name not in FIELDS]
    unknown = warn_of(names, fields, known)
    compiled = compile_extras(fields, caps)
    if compiled is None:
        return {**NOTHING, "warnings": unknown} if unknown else None
    compiled.warnings[:0] = unknown
    return compiled.receipt([])


@router.get("/v1/steering/presets")
async def presets(caps: Capabilities = Depends(catalogue)) -> dict[str, Any]:
    """Every preset: what it says, and the digest that receipts name."""
    return {"object": "list", "data": [said_preset(preset) for preset in caps.presets.values()]}


@router.get("/v1/steering/presets/{name}")
async def preset(name: str, caps: Capabilities = Depends(catalogue)) -> dict[str, Any]:
    """One preset."""
    return said_preset(caps.preset(name))


def said_preset(preset: Preset) -> dict[str, Any]:
    """A preset, for its owner."""
    return {
        "id": preset.name,
        "object": "steering.preset",
        "digest": preset.digest,
        "read_only": preset.is_fixed,
        **preset.wire,
    }


def said_vector(entry: Entry) -> dict[str, Any]:
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
    if preset is not None and preset in (await catalogue(raw)).presets:
        raise Unavailable(f"presets work on {OURS}; here, name the model without @{preset}", "model")
    xargs = body.get("vllm_xargs")
    fields = {**(xargs if isinstance(xargs, dict) else {}), **body}
    said = {name: _unpacked(name, fields[name]) for name in FIELDS if fields.get(name) is not None}
    if present := [*that_change(said), *(name for name in (FIELD,) if fields.get(name) is not None)]:
        raise Unavailable(f"{present[0]} works on {OURS}", present[0])


async def drop_preset(raw: Request) -> None:
    """A dependency of vLLM's routes that generate nothing: to them, a preset of a model is that model."""
    body = await _sent(raw)
    base, preset = openai.split_model(_model(body), raw.app)
    if preset is not None:
        (await catalogue(raw)).preset(preset, "model")
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


async def read_worker(raw: Request) -> None:
    """A dependency of vLLM's /metrics: what only the worker knows."""
    if (counters := await openai.counters(raw)) is not None:
        metrics.note_worker(counters)


async def answer_refusal(raw: Request, error: Exception) -> Response:
    """The exception handler for our own errors."""
    assert isinstance(error, WhipstaffError)
    metrics.REFUSALS.labels(error.status).inc()
    headers = {"Connection": "close"} if isinstance(error, TooLarge) else None  # what was not read yet stays unread
    return JSONResponse(error.body(), status_code=error.status, headers=headers)
