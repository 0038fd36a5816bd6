"""Admission, in the order in which a request passes its checks; what depends on a prompt comes after, in `request`.

prepare             what a preset fills in, then `fields` (JSON), `names` (unknown ones), and the two below
 compile_request    beside the request's own sampling parameters: temperature, beam search, grammar, log-probabilities;
                    a search beside those that it stands in for, and answers (`search`)
  compile_extras    options, then every entry (`entries`, `decoding`), then one plan of them

Every refusal is a WhipstaffError with the path of the first field that cannot be honoured; `FieldOrigins.named` makes
it say so where a preset or vllm_xargs brought that field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import uuid4

from whipstaff.decoding.search.search import SearchMethod
from whipstaff.server.admission.captures import (
    FORMAT_FIELD,
    Admitted,
    Format,
    admit_captures,
    check_attention,
    check_beside,
    check_download,
)
from whipstaff.server.admission.decoding import (
    MAX_DECODING,
    NOTHING,
    DecodingEntry,
    GivenEntry,
    admit_decoding,
    entries_of,
    reads,
    search_of,
)
from whipstaff.server.admission.explanations import ExplainParams, LogprobsSource
from whipstaff.server.admission.fields import (
    AskedRequest,
    OnUnavailable,
    OnUnknown,
    entries_in,
    fields_of,
    flag,
    from_json,
    loose,
    one_of,
    ours_in,
)
from whipstaff.server.admission.request import CompiledRequest, Options
from whipstaff.server.admission.search import check_explained, check_retractions, check_room, vllm_beam_search
from whipstaff.server.admission.steering import STOP_FIELD, SequenceSteering, SteeringEntry, admit_steering, admit_stop
from whipstaff.server.errors import (
    BadRequest,
    FieldOrigins,
    NotFound,
    Unavailable,
    VectorUnfit,
    WhipstaffError,
    parsed,
)
from whipstaff.server.names import FIELDS, GATES, SHARED, SHORTHANDS, TEXTS, unknown_reasons
from whipstaff.server.plan import RequestPlan
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.planner import MAX_EDITS, Planner


def prepare(
    request: AskedRequest, caps: Capabilities, preset: Preset | None = None, body: Mapping[str, Any] | None = None
) -> CompiledRequest | None:
    """Compile a parsed request of chat or text; None if it is plain and there is nothing to say of it.

    Args:
        preset: what the request's model names beside a model; it fills the request in.
        body: the request as it was sent.

    Raises: WhipstaffError.
    """
    filled = preset.fill(request, body or {}) if preset else frozenset[str]()
    origins = FieldOrigins(preset.name if preset else "", filled, ours_in(request.vllm_xargs))
    with origins.named():
        fields = fields_of(request)
        unknown = unknown_warnings(request.unknown_names, fields, request.known_names())
        compiled = compile_request(request, caps, fields, preset is not None and preset.gives(filled, "decoding"))
    if compiled is None and preset is None and not unknown:
        return None
    compiled = compiled or CompiledRequest(caps)
    warnings = (*unknown, *compiled.warnings)
    return replace(compiled, warnings=warnings, origins=origins, preset=preset)


def unknown_warnings(names: Sequence[str], fields: Mapping[str, Any], known: frozenset[str]) -> list[str]:
    """What to say of names that nobody knows. Raises: BadRequest where the request wants them refused."""
    refuses = one_of(OnUnknown, fields, "on_unknown", "warn") == "error"
    if not names:
        return []
    reasons = unknown_reasons(names, known)
    for name, reason in reasons.items() if refuses else ():
        raise BadRequest(reason, name)
    more = [f"{len(names) - len(reasons)} more fields did nothing"] if len(names) > len(reasons) else []
    return [*(f"{name} did nothing: {reason}" for name, reason in reasons.items()), *more]


def compile_request(
    request: AskedRequest, caps: Capabilities, fields: Mapping[str, Any], merges: bool = False
) -> CompiledRequest | None:
    """Compile a request's extras, its `fields`, beside what else it says; see `compile_extras`.

    Raises: WhipstaffError.
    """
    shared = request.said(SHARED)
    compiled = compile_extras(fields, caps, merges, shared)
    if request.use_beam_search:
        search = vllm_beam_search(request.n or 1, request.length_penalty)
        compiled = compile_extras(fields, caps, merges, shared, [search])
    if compiled is not None and compiled.search is not None:
        return compiled.beside(request)
    if compiled is not None and compiled.options.streams_retractions:
        check_retractions(request)
        warning = "stream_retractions did nothing: without a search nothing is taken back"
        compiled = replace(compiled, warnings=(*compiled.warnings, warning))
    if request.is_hot and request.temperature is not None:
        compiled = (compiled or CompiledRequest(caps)).heated(request.temperature, request.truncates)
    if compiled is None:
        return None
    compiled.check_draw(request.temperature)
    compiled.check_candidates(request.n or 1)
    compiled.check_grammar(request.has_grammar)
    compiled.check_logprobs(request.scores_prompt)
    if request.echoes_scores and not compiled.scores_prompts:
        warning = f"prompt_logprobs are left out: {compiled.silence_on_prompts}"
        return replace(compiled, warnings=(*compiled.warnings, warning))
    return compiled


def compile_extras(
    fields: Mapping[str, Any],
    caps: Capabilities,
    merges: bool = False,
    shared: Mapping[str, Any] = NOTHING,
    more: Sequence[GivenEntry] = (),
) -> CompiledRequest | None:
    """Compile a request's `steering` and `decoding`; None for a plain request.

    Args:
        merges: whether `decoding` is a preset's default, which the request's other fields overrule.
        shared: fields of vLLM's that methods share, as far as the request says them.
        more: entries of decoding that other fields stand for.

    Raises: WhipstaffError with the JSON path of the first field that cannot be honoured.
    """
    if not more and all(fields.get(name) is None for name in FIELDS):
        return None
    left_out = LeftOut(one_of(OnUnavailable, fields, "on_unavailable", "error") == "ignore")
    options = _options(fields)
    steering = _steering(fields, caps, left_out)
    entries = _decoding(fields, caps, left_out, merges, shared, more)
    decoding = options.decoding_plan(entries)
    if decoding is not None and (search := search_of(entries)) is not None:
        check_room(search, decoding.mix.num_companions if decoding.mix else 0, caps)
        if steering.stop is not None:
            raise BadRequest(f"{search.method.name} has several sequences at once, and ends them itself", STOP_FIELD)
        if options.explain is not None:
            check_explained(search, options.explain, "logprobs_source" if fields.get("explain") is None else "explain")
    models = decoding.models if decoding else []
    _check_soft_prompts(models, steering, entries)
    _check_lookahead(steering.entries, entries)
    _check_attention(steering, entries, caps.num_layers - 1)
    plan = steering.plan if steering.entries or steering.stop else None
    if decoding and decoding.early_layers:
        plan = replace(plan or SteeringPlan(()), keeps=decoding.early_layers)
    captures, plan = Admitted((), plan) if fields.get("capture") is None else admit_captures(fields, plan, caps)
    if options.capture_format == "download":
        check_download(captures, caps)
    if captures:
        check_beside(captures, decoding, entries)
        check_attention(captures, _redirected(steering))
    return CompiledRequest(
        caps,
        RequestPlan(
            plan,
            decoding,
            uuid4().hex if plan and plan.num_columns else "",
            captures_id=uuid4().hex if plan and (plan.captures or plan.attention) else "",
        ),
        steering,
        captures,
        tuple(entries),
        options,
        {name: caps.auxiliaries[name] for name in models},
        tuple(left_out.warnings),
    )


class LeftOut:
    """What of a request was left out, and why, for its receipt."""

    def __init__(self, is_lenient: bool) -> None:
        """`is_lenient` is whether what this server lacks may be."""
        self._is_lenient = is_lenient
        self.warnings: list[str] = []

    def note(self, what: str, why: str, is_several: bool = False) -> None:
        """Something that changes nothing."""
        self.warnings.append(f"{what} {'were' if is_several else 'was'} left out: {why}")

    def skip(self, error: WhipstaffError) -> None:
        """Something that this server lacks. Raises: the error, if the request does not allow that."""
        if not self._is_lenient:
            raise error
        self.warnings.append(f"{error.param} was left out: {error.message}")


def _options(fields: Mapping[str, Any]) -> Options:
    is_temperature_last = flag(fields, "temperature_last")
    source = one_of(LogprobsSource, fields, "logprobs_source", "final")
    told, explain = None, fields.get("explain")
    if explain is not None or source == "both":
        told = parsed(ExplainParams, {} if explain is None else from_json(explain, "explain"), "explain").plan
    streams_retractions = flag(fields, "stream_retractions")
    capture_format = one_of(Format, fields, FORMAT_FIELD, "base64")
    return Options(is_temperature_last, False, told, source, streams_retractions, capture_format=capture_format)


def _steering(fields: Mapping[str, Any], caps: Capabilities, left_out: LeftOut) -> SequenceSteering:
    if fields.get("steering") is None and fields.get(STOP_FIELD) is None:
        return SequenceSteering()
    planner, found, stop = Planner(), list[SteeringEntry](), None
    for path, entry in entries_in(fields.get("steering"), "steering", MAX_EDITS):
        try:
            steered = admit_steering(entry, path, planner, found, caps, left_out.warnings)
            left_out.note(path, "it is off") if steered.is_off else found.append(steered)
        except (NotFound, VectorUnfit, Unavailable) as error:
            left_out.skip(error)
    if (value := from_json(fields.get(STOP_FIELD), STOP_FIELD)) is not None:
        try:
            stop = admit_stop(value, planner, caps)
        except (NotFound, VectorUnfit, Unavailable) as error:
            left_out.skip(error)
    return SequenceSteering(found, planner.plan, stop=stop)


def _decoding(
    fields: Mapping[str, Any],
    caps: Capabilities,
    left_out: LeftOut,
    merges: bool,
    shared: Mapping[str, Any],
    more: Sequence[GivenEntry],
) -> list[DecodingEntry]:
    found: list[DecodingEntry] = []
    if not more and all(fields.get(name) is None for name in ("decoding", *SHORTHANDS, *GATES)):
        return found
    named = entries_in(fields.get("decoding"), "decoding", MAX_DECODING)
    short = {name: fields.get(name) if name in TEXTS else loose(fields.get(name)) for name in (*SHORTHANDS, *GATES)}
    for given in (*entries_of(short, named, merges, shared), *more):
        try:
            entry = admit_decoding(given, caps)
            if entry.why_off:
                left_out.note(given.where, entry.why_off, given.is_several)
            else:
                found.append(entry)
                left_out.warnings += [warning for own in entry.steered.values() for warning in own.warnings]
        except (NotFound, VectorUnfit, Unavailable) as error:
            left_out.skip(error)
    return found


def _check_soft_prompts(models: Sequence[str], steering: SequenceSteering, decoding: Sequence[DecodingEntry]) -> None:
    """Raises: BadRequest."""
    everybodys = [steering, *(own for entry in decoding for own in entry.steered.values())]
    for entry in (entry for one in everybodys for entry in one.entries) if models else ():
        if entry.soft:
            raise BadRequest(
                "auxiliary models have no embeddings for the rows of a soft prompt", f"{entry.soft.path}.vector"
            )


def _check_lookahead(steering: Sequence[SteeringEntry], decoding: Sequence[DecodingEntry]) -> None:
    """A token that is tried is steered as if it were chosen, which nothing may depend on. Raises: BadRequest."""
    trying = [entry.path_of(entry.ahead) for entry in decoding if entry.ahead]
    trying += [
        e.path_of("method") for e in decoding if isinstance(e.method, SearchMethod) and "tries" in e.method.needs
    ]
    for entry in steering if trying else ():
        if entry.params.schedule is not None and entry.params.schedule.shape == "entropy":
            raise BadRequest(
                f"the entropy of what a token is drawn from is not known while {trying[0]} lets it be tried",
                f"{entry.path}.schedule",
            )


def _redirected(steering: SequenceSteering) -> dict[int, str]:
    """Layers in which heads look elsewhere than the model's own scores say, each with the path of the field."""
    return {
        layer: f"{entry.path}.{param.partition('.')[0]}"
        for entry in steering.entries
        for layer, param in entry.kind.redirected(entry, steering.plan).items()
    }


def _check_attention(steering: SequenceSteering, decoding: Sequence[DecodingEntry], last: int) -> None:
    """What the last layer attends to is computed from the model's own scores. Raises: BadRequest."""
    reading = [entry.method.name for entry in decoding if "attention" in reads(entry.method)]
    if reading and (param := _redirected(steering).get(last)) is not None:
        raise BadRequest(
            f"this changes what the last layer attends to, and {reading[0]} reads that; leave one out", param
        )
