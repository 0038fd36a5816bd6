"""One short function per endpoint: the two OpenAI routes with the extra fields, and what a server can say of itself."""

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from fastapi import APIRouter, Body, Depends, Request
from fastapi.responses import JSONResponse, Response

from whipstaff.server import metrics, schema
from whipstaff.server.catalogue import Catalogue
from whipstaff.server.chat import Prompt
from whipstaff.server.engine import openai
from whipstaff.server.engine.launch import PlanDict
from whipstaff.server.engine.request import RequestPlan, take_draw
from whipstaff.server.errors import BadRequest, Unavailable, WhipstaffError
from whipstaff.server.explained import Explained
from whipstaff.server.methods import method_table
from whipstaff.server.receipts import FIELD, Tally, with_extras
from whipstaff.server.registry import Entry
from whipstaff.server.schema import Compiled, compile_extras
from whipstaff.server.steered import doses

router = APIRouter()


@dataclass
class PreparedRequest:
    """What one request's extras came to, handed to the engine's front end."""

    compiled: Compiled
    num_choices: int = 1  # of each prompt
    tally: Tally = field(default_factory=Tally)
    explained: Explained | None = None
    num_placed: int = 0  # prompts

    def wanted_scores(self, prompt: Prompt) -> dict[str, Sequence[int]]:
        return self.compiled.wanted_scores(prompt)

    def place(self, prompt: Prompt) -> "PlacedRequest":
        ids = self.compiled.place(prompt)
        if self.compiled.plan.steering is not None and self.compiled.plan.steering.token_ids:
            self.tally.keeps_tokens = True
        num_tokens = prompt.num_tokens if ids is None else len(ids)
        first, self.num_placed = self.num_placed * self.num_choices, self.num_placed + 1
        return PlacedRequest(ids, self, self.compiled.plan, first, num_tokens, self.compiled.stream_names)

    async def receipt(self, readings: Callable[[str], Awaitable[list[dict[str, Any]]]]) -> dict[str, Any]:
        """What was done. `readings` finds what a request's conditions read, by its ticket."""
        fed, ticket = self.tally.fed(), self.compiled.plan.ticket
        if ticket:
            found = await readings(ticket)
            fed = [one._replace(columns=_taken(found, one.num_fed)) for one in fed]
        said = self.compiled.receipt(fed)
        metrics.note_steering(said["steering"])
        return said


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
        return PlanDict(plan.to_wire(), compiled.label, self.prepared.tally.note, explain)

    def _explain(self, index: int, record: dict[str, Any]) -> None:
        assert self.prepared.explained is not None
        record["streams"] = {self.stream_names.get(name, name): seen for name, seen in record["streams"].items()}
        self.prepared.explained.note(self.first_choice + index, record)

    def check(self, max_tokens: int, is_explicit: bool) -> int:
        return self.prepared.compiled.check(self.num_tokens, max_tokens, is_explicit)


def catalogue(request: Request) -> Catalogue:
    found: Catalogue = request.app.state.whipstaff
    return found


def prepare(
    request: openai.ChatRequest | openai.TextRequest, have: Catalogue, is_dry: bool = False
) -> PreparedRequest | None:
    """Compile a request's extras, wherever they came in, and attach them to it; `is_dry` if it will not run."""
    present = {name: getattr(request, name, None) for name in schema.FIELDS} | (request.model_extra or {})
    compiled = compile_extras(_with_xargs(present, request.vllm_xargs), have)
    if compiled is None:
        return None
    if request.use_beam_search:
        raise BadRequest("beam search is not supported together with steering or decoding methods", "use_beam_search")
    compiled.is_dry = is_dry
    compiled.check_draw(request.temperature)
    compiled.check_grammar(openai.has_grammar(request))
    compiled.check_logprobs(scores_prompt(request))
    prepared = PreparedRequest(compiled, request.n or 1)
    if compiled.explain is not None:
        prepared.explained = Explained(have.words)
    request.attach(prepared)
    return prepared


def scores_prompt(request: openai.ChatRequest | openai.TextRequest) -> bool:
    """Whether log-probabilities of its prompt are wanted."""
    echoes = getattr(request, "echo", False) and getattr(request, "logprobs", None) is not None
    return request.prompt_logprobs is not None or echoes


def _with_xargs(fields: dict[str, Any], xargs: Any) -> dict[str, Any]:
    """The extra fields, from the top level of a request and, as JSON strings, out of its vllm_xargs."""
    if not isinstance(xargs, dict):
        return fields
    if FIELD in xargs:
        raise BadRequest("reserved: send `steering` and `decoding` instead", f"vllm_xargs.{FIELD}")
    for name in schema.FIELDS:
        if name in xargs and fields.get(name) is not None:
            raise BadRequest(f"{name} is given twice, at the top level and in vllm_xargs", f"vllm_xargs.{name}")
    return fields | {name: xargs.pop(name) for name in schema.FIELDS if name in xargs}


@router.post("/v1/chat/completions", dependencies=[Depends(openai.validate_json_request)])
@openai.cancellable
async def create_chat_completion(request: openai.ChatRequest, raw_request: Request) -> Response:
    """OpenAI's chat completions, with `steering` and `decoding`."""
    return await _generate(request, raw_request)


@router.post("/v1/completions", dependencies=[Depends(openai.validate_json_request)])
@openai.cancellable
async def create_completion(request: openai.TextRequest, raw_request: Request) -> Response:
    """OpenAI's completions, with `steering` and `decoding`."""
    return await _generate(request, raw_request)


async def _generate(request: openai.ChatRequest | openai.TextRequest, raw: Request) -> Response:
    prepared = prepare(request, catalogue(raw))
    result = await openai.answer(request, raw)
    if isinstance(result, Response):
        return result
    if hasattr(result, "__aiter__"):
        if prepared is not None:
            result = with_extras(result, partial(prepared.receipt, openai.readings(raw)), prepared.explained)
        return openai.event_stream(result, raw)
    body = result.model_dump()
    if prepared is not None:
        body[FIELD] = await prepared.receipt(openai.readings(raw))
        if prepared.explained is not None:
            prepared.explained.add_to(body)
    return JSONResponse(body, headers=openai.load_headers(raw))


@router.get("/v1/steering/methods")
async def methods(have: Catalogue = Depends(catalogue)) -> dict[str, Any]:
    """Every method: kind, JSON schema, defaults, paper, and whether this server can run it."""
    return {"object": "list", "data": method_table(have)}


@router.get("/v1/steering/vectors")
async def vectors(have: Catalogue = Depends(catalogue)) -> dict[str, Any]:
    """Every vector that was loaded."""
    return {"object": "list", "data": [_vector(entry) for entry in have.registry]}


@router.get("/v1/steering/vectors/{name}")
async def vector(name: str, have: Catalogue = Depends(catalogue)) -> dict[str, Any]:
    """One vector, with the norm of each of its tensors, and how large its edits are beside the model's activations."""
    entry = have.registry.entry(name)
    return {
        **_vector(entry),
        "norms": entry.vector.norms(),
        "doses": doses(entry.vector, have) if entry.problem is None else [],
    }


@router.post("/v1/steering/validate")
async def validate(raw: Request, body: dict[str, Any] = Body(...)) -> Response:
    """Compile a request without running it: its plan, or the error that the request would get.

    With `messages` or `prompt` the body is a whole request, and what depends on the prompt is checked too.
    """
    started = time.perf_counter()
    have = catalogue(raw)
    if "messages" not in body and "prompt" not in body:
        compiled = compile_extras(_with_xargs(body, body.get("vllm_xargs")), have)
    else:
        model = openai.ChatRequest if "messages" in body else openai.TextRequest
        request = openai.parse(model, body)
        prepared = prepare(request, have, is_dry=True)
        refused = await openai.render(request, raw.app)
        if refused is not None:
            return refused
        compiled = prepared.compiled if prepared else None
    plan = compiled.receipt([]) if compiled else {"steering": [], "decoding": [], "warnings": []}
    return JSONResponse({"valid": True, "plan": plan, "milliseconds": (time.perf_counter() - started) * 1e3})


def _vector(entry: Entry) -> dict[str, Any]:
    header, vector = entry.vector.header, entry.vector
    return {
        "id": entry.name,
        "object": "steering.vector",
        "fits": entry.problem is None,
        "problem": entry.problem,
        "digest": vector.digest,
        "layers": vector.layers,
        "sites": vector.sites,
        **header.model_dump(exclude={"format"}),
    }


async def refuse_extras(raw: Request) -> None:
    """A dependency of vLLM's other routes: they would silently ignore the extra fields."""
    try:
        body = await raw.json()
    except (ValueError, RecursionError):
        return  # no JSON, or none at all: the route's own business
    if not isinstance(body, dict):
        return
    xargs = body.get("vllm_xargs")
    fields = {**(xargs if isinstance(xargs, dict) else {}), **body}
    if present := [name for name in (*schema.FIELDS, FIELD) if fields.get(name) is not None]:
        raise Unavailable(f"{present[0]} works on /v1/chat/completions and /v1/completions", present[0])


async def read_worker(raw: Request) -> None:
    """A dependency of vLLM's /metrics: what only the worker knows."""
    if (counters := await openai.counters(raw)) is not None:
        metrics.WORKER.note(counters)


async def answer_refusal(raw: Request, error: Exception) -> Response:
    """The exception handler for our own errors."""
    assert isinstance(error, WhipstaffError)
    metrics.REFUSALS.labels(error.status).inc()
    return JSONResponse(error.body(), status_code=error.status)
