"""The extra request fields and their compilation: JSON in, a plan and its receipt out, or the error with its path."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from whipstaff.decoding.method import DecodingError, Method, Mix, Params
from whipstaff.decoding.methods import METHODS
from whipstaff.server.chat import Prompt
from whipstaff.server.engine.request import PlacedPlan, RequestPlan
from whipstaff.server.errors import BadRequest, NotFound, Unavailable, WhipstaffError, bad_field
from whipstaff.server.placing import SoftPrompt, place_plan
from whipstaff.server.registry import Registry
from whipstaff.steering.artifacts import Vector
from whipstaff.steering.dose import Dose
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.experts import RoutingError, Scheme
from whipstaff.steering.growth import MAX_GROWTH, growth
from whipstaff.steering.method import Place
from whipstaff.steering.methods.attention import OverrideParams, PastaParams
from whipstaff.steering.methods.mote import MoTE, MoTEParams, Routing
from whipstaff.steering.methods.virtual_tokens import InsertParams, PrefixKV
from whipstaff.steering.methods.virtual_tokens import SoftPrompt as SoftPromptMethod
from whipstaff.steering.plan import (
    MAX_EDITS,
    OWN_FIELDS,
    Lengths,
    PlannedEdit,
    PlannedSpecial,
    Planner,
    RowEdit,
    SteeringParams,
    SteeringPlan,
    num_slots,
    strongest,
    weigh,
)
from whipstaff.steering.programs import OPEN
from whipstaff.steering.sites import canonical
from whipstaff.steering.where import Interval

PLAIN = "plain"
VECTOR = "vector"
FIELDS = ("steering", "decoding", "on_unavailable")
MAX_DECODING = 8

# Names that this ecosystem uses for methods that this version lacks. vLLM ignores unknown fields; these must not be.
NOT_BUILT = (
    *("explain", "guidance_scale", "negative_prompt", "dola_layers", "top_n_sigma", "typical_p"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers", "xtc_probability", "xtc_threshold"),
    *("mirostat", "mirostat_tau", "mirostat_eta", "dynatemp_range", "dynatemp_exponent"),
)

OnUnavailable = Literal["error", "ignore"]
P = TypeVar("P", bound=BaseModel)


class Fed(NamedTuple):
    """A finished sequence: what was fed to the model, which is all but the last token generated."""

    prompt_len: int
    num_fed: int
    ids: list[int]  # of prompt and generation; empty unless the plan tells tokens apart


@dataclass(frozen=True)
class Limit:
    """What an operator allows: edits beyond a relative dose are refused, or weakened until they keep to it."""

    max_dose: float
    policy: Literal["refuse", "clamp"] = "refuse"


@dataclass(frozen=True)
class Catalogue:
    """What this server has for requests to name."""

    registry: Registry
    auxiliaries: Mapping[str, int]  # name -> longest sequence it can follow
    dtype: str = "float32"  # of the served model's activations
    num_slots: int = 256  # rows of edits in use at once
    num_layers: int = 1
    places: frozenset[Place] = frozenset()  # where edits can be made
    lengths: Lengths = field(default_factory=lambda: Lengths({}))
    limit: Limit | None = None
    tensor_parallel: int = 1
    takes_soft_prompts: bool = True
    attention: Mapping[str, Any] | None = None  # what the attention layers obey; None: they were left alone
    routing: Mapping[int, Scheme] = field(default_factory=dict)  # how each layer with experts selects them


@dataclass
class Steered:
    """One entry of a request's `steering`, resolved."""

    path: str
    vector: Vector
    params: SteeringParams
    edits: range  # which of the plan's edits it became
    soft: SoftPrompt | None = None
    special: PlannedSpecial | None = None

    @property
    def label(self) -> str:
        """Its method's name: one of ours, or the general one for files of other methods."""
        return self.vector.method.name


@dataclass
class Compiled:
    """A request's extras, ready to run."""

    plan: RequestPlan
    decoding: list[dict[str, Any]]
    limits: Mapping[str, int]  # of the auxiliary models it needs
    have: Catalogue
    steering: list[Steered] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    stream_paths: dict[str, str] = field(default_factory=dict)  # auxiliary model -> the field that named it first

    @property
    def label(self) -> str:
        """The methods in use, for metrics: bounded, since it only holds names of our own."""
        names = {VECTOR} if self.steering else set()
        return "+".join(sorted(names | {entry["method"] for entry in self.decoding})) or PLAIN

    def check(self, prompt_len: int, max_tokens: int, is_explicit: bool) -> int:
        """Check the plan against a prompt; what may be generated, at most.

        Raises: BadRequest for a clause that selects nothing or a context that an auxiliary model does not have.
        """
        allowed = max_tokens
        for name, limit in sorted(self.limits.items(), key=lambda item: item[1]):  # the tightest is the one to name
            if prompt_len >= limit or (is_explicit and prompt_len + max_tokens > limit):
                wanted = f"{prompt_len} prompt tokens" + (f" and max_tokens {max_tokens}" if is_explicit else "")
                raise BadRequest(
                    f"auxiliary model {name!r} follows at most {limit} tokens, not {wanted}", self.stream_paths[name]
                )
            allowed = min(allowed, limit - prompt_len)
        if self.plan.steering is not None:
            self._check_steering(self.plan.steering, prompt_len, allowed)
        return allowed

    def place(self, prompt: Prompt) -> list[int] | None:
        """Place the plan in a prompt; the prompt with room for inserted rows, None if it stays as it is.

        Raises: BadRequest for a field that does not go with this prompt.
        """
        if self.plan.steering is None:
            return None
        paths = [entry.path for entry in self.steering for _ in entry.edits]
        soft = [entry.soft for entry in self.steering if entry.soft is not None]
        soft.sort(
            key=lambda one: not any(entry.special and entry.soft is one for entry in self.steering)
        )  # prefix first
        steering, ids = place_plan(self.plan.steering, paths, soft, prompt)
        self.plan = replace(self.plan, steering=steering)
        return ids

    def _check_steering(self, plan: SteeringPlan, prompt_len: int, allowed: int) -> None:
        for entry in self.steering:
            for index in entry.edits:
                try:
                    plan.edits[index].where.check(prompt_len, allowed)
                except SteeringError as error:
                    raise BadRequest(str(error), f"{entry.path}.{error.param}") from None
        rows = PlacedPlan(self.plan, prompt_len).rows
        wanted = sum(num_slots(row, self.have.num_layers) for row in rows)
        if wanted > self.have.num_slots:
            raise Unavailable(
                f"these vectors overlap in {len(rows)} different ways that take {wanted} slots together, and this "
                f"server has {self.have.num_slots}; start it with a larger --steering-slots",
                "steering",
            )

    def receipt(self, fed: list[Fed]) -> dict[str, Any]:
        """What was done, for the response; `fed` are the finished sequences."""
        return {
            "steering": [self._said(entry, fed) for entry in self.steering],
            "decoding": self.decoding,
            "warnings": self.warnings,
        }

    def _said(self, entry: Steered, fed: list[Fed]) -> dict[str, Any]:
        assert self.plan.steering is not None
        if entry.soft is not None and entry.special is None:
            return {
                "vector": entry.params.vector,
                "digest": entry.vector.digest,
                "method": entry.vector.header.method,
                **entry.soft.params.model_dump(exclude_none=True),
                "prompt_tokens": entry.soft.num,  # which usage counts
            }
        if entry.special is not None:
            return {
                "vector": entry.params.vector,
                "digest": entry.vector.digest,
                "method": entry.vector.header.method,
                **json.loads(entry.special.special.setting),
                "where": [entry.special.where.model_dump(exclude_none=True)],
                "edited_tokens": sum(_overlap(entry.special, sequence) for sequence in fed),
            }
        planned = [self.plan.steering.edits[index] for index in entry.edits]
        settings = json.loads(planned[0].edit.setting) if planned else {}
        largest = max((found for one in planned if (found := self._dose(entry, one.edit))), default=None)
        return {
            "vector": entry.params.vector,
            "digest": entry.vector.digest,
            "method": entry.vector.header.method,
            **settings,
            "layers": list(entry.params.layers or entry.vector.layers),
            "sites": entry.vector.sites,
            "where": [one.where.model_dump(exclude_none=True) for one in planned],
            **entry.params.model_dump(
                by_alias=True, exclude_defaults=True, include={"when", "schedule", "normalize", "renorm"}
            ),
            "dose": None
            if largest is None
            else {"relative": largest.relative, "at": f"{largest.place.site}.{largest.place.layer}"},
            "edited_tokens": sum(_overlap(one, sequence) for one in planned for sequence in fed),
        }

    def _dose(self, entry: Steered, edit: RowEdit) -> Dose | None:
        found = strongest(entry.vector, edit._replace(gate=OPEN), self.have.lengths)
        most = entry.params.schedule.largest if entry.params.schedule else 1.0
        return found and Dose(found.relative * most, found.place)


def compile_extras(fields: Mapping[str, Any], catalogue: Catalogue) -> Compiled | None:
    """Compile a request's `steering` and `decoding`; None for a plain request.

    Raises: WhipstaffError with the JSON path of the first field that cannot be honoured.
    """
    for name in NOT_BUILT:
        if fields.get(name) is not None:
            raise Unavailable(f"{name} is not built in this version of Whipstaff; remove it", name)
    if all(fields.get(name) is None for name in FIELDS):
        return None
    is_lenient = _on_unavailable(fields.get("on_unavailable")) == "ignore"
    compiled = Compiled(RequestPlan(), [], {}, catalogue)
    planner = Planner()
    for index, entry in enumerate(_entries(fields.get("steering"), "steering", MAX_EDITS)):
        _steering(entry, f"steering[{index}]", planner, compiled, is_lenient)
    mixes = [
        mix
        for index, entry in enumerate(_entries(fields.get("decoding"), "decoding", MAX_DECODING))
        if (mix := _decoding(entry, f"decoding[{index}]", catalogue, compiled, is_lenient)) is not None
    ]
    mix = _sum(mixes)
    if mix and (soft := next((entry.soft for entry in compiled.steering if entry.soft), None)):
        raise BadRequest("auxiliary models have no embeddings for the rows of a soft prompt", f"{soft.path}.vector")
    compiled.plan = RequestPlan(planner.plan if compiled.steering else None, mix)
    compiled.limits = {name: catalogue.auxiliaries[name] for name in (mix.auxiliaries if mix else [])}
    return compiled


def method_table(catalogue: Catalogue) -> list[dict[str, Any]]:
    """Every method: kind, JSON schema with this server's names, defaults, paper, availability."""
    vector_schema = SteeringParams.model_json_schema()
    vector_schema["properties"]["vector"]["enum"] = catalogue.registry.names
    vectors = catalogue.registry.names
    table = [
        _described(
            VECTOR, "edit", vector_schema, "the vector's own; see /v1/steering/vectors", vectors, "--vectors PATH"
        )
    ]
    for method in METHODS.values():
        schema = method.params.model_json_schema()
        for name in method.stream_fields:
            schema["properties"][name]["enum"] = list(catalogue.auxiliaries)
        have = len(catalogue.auxiliaries) >= len(method.stream_fields)
        table.append(_described(method.name, "mix", schema, method.paper, have, "--aux NAME=MODEL"))
    return table


def _described(name: str, kind: str, schema: dict[str, Any], paper: str, available: Any, flag: str) -> dict[str, Any]:
    defaults = {key: field["default"] for key, field in schema["properties"].items() if "default" in field}
    return {
        "name": name,
        "kind": kind,
        "schema": schema,
        "defaults": defaults,
        "paper": paper,
        "available": bool(available),
        "reason": None if available else f"start the server with {flag}",
    }


def _on_unavailable(value: Any) -> OnUnavailable:
    try:
        return TypeAdapter(OnUnavailable).validate_python("error" if value is None else value)
    except ValidationError as error:
        raise bad_field(error, value, "on_unavailable") from None


def _entries(value: Any, name: str, most: int) -> list[Any]:
    """A field's entries: a list, a single object, or either as a JSON string (which is what vllm_xargs can carry)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"not JSON: {error}", name) from None
    if value is None:
        return []
    entries = value if isinstance(value, list) else [value]
    if len(entries) > most:
        raise BadRequest(f"{len(entries)} entries; at most {most} are taken", name)
    return entries


def _steering(entry: Any, path: str, planner: Planner, compiled: Compiled, is_lenient: bool) -> None:
    """Add one entry to the plan, or leave it out if the request allows that."""
    have = compiled.have
    params = _parsed(SteeringParams, _part(entry, path, own=False), path)
    try:
        vector = _named(params, path, have)
        probe = have.registry.usable(params.when.probe, f"{path}.when.probe") if params.when else None
        _check_sites(vector, params, path, have)
    except WhipstaffError as error:
        _skip(error, compiled, is_lenient)
        return
    own = _part(entry, path, own=True)
    before, bounds_before = len(planner.edits), len(planner.bounds)
    try:
        if vector.method.name == SoftPromptMethod.name:
            soft = SoftPrompt.of(params, own, vector, path)
            compiled.steering.append(Steered(path, vector, params, range(0), soft))
            return
        if vector.method.served_by in ("router", "attention"):
            special = planner.add_special(params, own, vector)
            _check_special(vector, special, compiled.steering, have)
            prefix = _prefix(vector, params, path, compiled)
            compiled.steering.append(Steered(path, vector, params, range(0), prefix, special))
            return
        edits = planner.add(params, own, vector, probe)
        if have.limit is not None and (weaker := _kept_to(have.limit, params, vector, planner, edits, have)):
            del planner.edits[before:], planner.bounds[bounds_before:]
            compiled.warnings.append(f"{path}: weakened to scale {weaker:.4g}, the most this server allows")
            edits = planner.add(params, {**_without_scale(own), "scale": weaker}, vector, probe)
    except ValidationError as error:
        raise bad_field(error, entry, path) from None
    except SteeringError as error:
        raise BadRequest(str(error), path + (f".{error.param}" if error.param else "")) from None
    _check_growth(planner, have.dtype, path)
    _note_order(compiled, planner, vector, edits, path)
    compiled.steering.append(Steered(path, vector, params, edits))


def _named(params: SteeringParams, path: str, have: Catalogue) -> Vector:
    """The vector of an entry, or the stand-in of a method that needs none."""
    if params.vector is not None:
        return have.registry.usable(params.vector, f"{path}.vector")
    found = have.registry.without_file.get(params.method or "")
    if found is None:
        known = ", ".join(have.registry.without_file)
        raise BadRequest(f"only these methods need no vector: {known}; others come with theirs", f"{path}.method")
    return found


def _part(entry: Any, path: str, own: bool) -> dict[str, Any]:
    """The fields that every entry may have, or its method's own."""
    if not isinstance(entry, dict):
        raise BadRequest("an entry is a JSON object", path)
    return {name: value for name, value in entry.items() if (name not in OWN_FIELDS) == own}


def _check_sites(vector: Vector, params: SteeringParams, path: str, have: Catalogue) -> None:
    """Every place that the vector edits must be hooked in this server's model."""
    if vector.method.served_by == "attention":
        if have.attention is None:
            raise Unavailable(
                "edits inside attention are off; start the server with --steering-sites attention",
                f"{path}.{'vector' if params.vector else 'method'}",
            )
        return
    if vector.method.served_by == "router" and not have.routing:
        has_experts = bool(have.registry.model.num_experts)
        raise Unavailable(
            "experts are left alone; start the server with --steering-sites router"
            if has_experts
            else "the served model has no experts, so there is no router to edit",
            f"{path}.{'vector' if params.vector else 'method'}",
        )
    if vector.method.name == SoftPromptMethod.name and not have.takes_soft_prompts:
        raise Unavailable(
            "the served model's tokens are embedded where rows cannot be inserted; start it without "
            "--enable-prompt-embeds, or with a model of text only",
            f"{path}.vector",
        )
    for place in vector.tensors:
        if params.layers is not None and place.layer not in params.layers:
            continue
        if canonical(place) not in have.places:
            raise Unavailable(
                "the served model has no experts, so there is no router to edit"
                if place.site == "router" and not have.registry.model.num_experts
                else f"this vector edits {place.site}, which this server left alone; start it with --steering-sites "
                f"{place.site}",
                f"{path}.vector",
            )


def _prefix(vector: Vector, params: SteeringParams, path: str, compiled: Compiled) -> SoftPrompt | None:
    """The placeholders that a KV prefix needs in front of the prompt; None for other methods. Raises: SteeringError."""
    if not isinstance(vector.method, PrefixKV):
        return None
    if params.where is not None:
        raise SteeringError("a prefix stands before the prompt, and all that follows sees it", "where")
    if any(isinstance(entry.vector.method, PrefixKV) for entry in compiled.steering):
        raise SteeringError("a request has one prefix at most", "vector")
    if not compiled.have.takes_soft_prompts:
        raise SteeringError("this model's prompts cannot be given placeholders", "vector")
    num = len(next(iter(vector.tensors.values()))["key"])
    return SoftPrompt(path, vector.digest, InsertParams(), num)


def _check_routing(params: MoTEParams, vector: Vector, others: list[Steered], have: Catalogue) -> None:
    """Check what routers are asked for, alone and beside the request's other entries. Raises: SteeringError."""
    asked = [(vector, params)]
    for entry in others:
        if entry.special is not None and isinstance(entry.vector.method, MoTE):
            asked.append((entry.vector, MoTEParams.model_validate_json(entry.special.special.setting)))
    together: dict[int, list[Routing]] = {}
    for its_vector, its_params in asked:
        for layer, routing in MoTE().routing(its_params, its_vector.tensors).items():
            together.setdefault(layer, []).append(routing)
    for layer, routings in together.items():
        scheme = have.routing.get(layer)
        if scheme is None:
            raise SteeringError(f"layer {layer} has no routed experts; layers that have: {[*have.routing]}", "experts")
        try:
            scheme.check(routings[0])
            never = [expert for routing in routings if routing.mode == "pre" for expert in routing.off]
            scheme.check_sum(never, len({expert for routing in routings for expert in routing.on}))
        except RoutingError as error:
            raise SteeringError(str(error), f"experts.{layer}") from None


def _check_special(vector: Vector, planned: PlannedSpecial, others: list[Steered], have: Catalogue) -> None:
    """Check an edit of the router or of attention against the served model. Raises: SteeringError."""
    params = vector.method.params.model_validate_json(planned.special.setting)
    if isinstance(params, MoTEParams):
        _check_routing(params, vector, others, have)
        return
    assert have.attention is not None
    if isinstance(params, OverrideParams):
        asked = {edit.layer: f"edits.{index}.layer" for index, edit in enumerate(params.edits)}
        able = have.attention["layers"]
    elif isinstance(params, PastaParams):
        asked = {layer: f"heads.{layer}" for layer in params.heads}
        able = have.attention["bias"]
    else:
        asked, able = dict.fromkeys(vector.layers, "vector"), have.attention["layers"]
    for layer, path in asked.items():
        if layer not in able:
            reason = have.attention["lacking"].get(layer, f"layers that can be edited so: {able}")
            raise SteeringError(f"the attention of layer {layer} cannot be edited so: {reason}", path)


def _kept_to(
    limit: Limit, params: SteeringParams, vector: Vector, planner: Planner, edits: range, have: Catalogue
) -> float | None:
    """The scale that keeps an edit to the operator's limit, if it needs another. Raises: SteeringError."""
    most = params.schedule.largest if params.schedule else 1.0
    found = [strongest(vector, planner.edits[i].edit._replace(gate=OPEN), have.lengths) for i in edits]
    largest = max((dose.relative * most for dose in found if dose), default=0.0)
    if largest <= limit.max_dose:
        return None
    scale = json.loads(planner.edits[edits[0]].edit.setting).get("scale")
    if limit.policy == "refuse" or scale is None:
        raise SteeringError(
            f"the edit is {largest:.3g} times as long as what it edits; this server allows {limit.max_dose:.3g}",
            "scale" if scale is not None else "",
        )
    return float(scale) * limit.max_dose / largest


def _without_scale(own: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name not in ("scale", "strength", "coefficient")}


def _check_growth(planner: Planner, dtype: str, path: str) -> None:
    """Refuse edits that would overflow the model's activations, when the first entry takes them too far."""
    most = MAX_GROWTH[dtype]
    if not (size := growth(sorted(planner.bounds, key=lambda bound: bound[0].layer))) <= most:
        raise BadRequest(
            f"the edits can make activations grow {size:.0e} times, and {dtype} would overflow; at most {most:.0e} "
            "is taken",
            f"{path}.scale",
        )


def _note_order(compiled: Compiled, planner: Planner, vector: Vector, edits: range, path: str) -> None:
    """Say so where edits meet that do not commute."""
    adds = all(weigh(vector, planner.edits[index].edit).only_adds for index in edits)
    for other in compiled.steering:
        both = {canonical(place) for place in vector.tensors} & {canonical(place) for place in other.vector.tensors}
        others_add = all(weigh(other.vector, planner.edits[index].edit).only_adds for index in other.edits)
        if both and not (adds and others_add):
            place = min(both)
            compiled.warnings.append(
                f"{other.path} and {path} do not commute where they meet ({place.site} of layer {place.layer}, ...): "
                "they are made in the order given"
            )
            return


def _decoding(entry: Any, path: str, catalogue: Catalogue, compiled: Compiled, is_lenient: bool) -> Mix | None:
    if not isinstance(entry, dict):
        raise BadRequest("an entry is a JSON object", path)
    name = entry.get("method")
    if not isinstance(name, str):
        raise BadRequest(f"name a method: one of {', '.join(METHODS)}", f"{path}.method")
    method = METHODS.get(name)
    if method is None:
        _skip(
            Unavailable(f"there is no decoding method {name!r}; there are: {', '.join(METHODS)}", f"{path}.method"),
            compiled,
            is_lenient,
        )
        return None
    params = _parsed(method.params, entry, path)
    try:
        _check_streams(method, params, path, catalogue)
    except WhipstaffError as error:
        _skip(error, compiled, is_lenient)
        return None
    try:
        mix = method.mix(params)
    except DecodingError as error:
        raise BadRequest(str(error), f"{path}.{error.param}") from None
    for stream in method.stream_fields:
        compiled.stream_paths.setdefault(getattr(params, stream), f"{path}.{stream}")
    compiled.decoding.append(params.model_dump())
    return mix


def _check_streams(method: Method[Any], params: Params, path: str, catalogue: Catalogue) -> None:
    have = catalogue.auxiliaries
    if len(have) < len(method.stream_fields):
        raise Unavailable(
            f"{method.name} needs {len(method.stream_fields)} auxiliary models, and this server has {len(have)}; "
            "start it with --aux NAME=MODEL for each",
            f"{path}.method",
        )
    for name in method.stream_fields:
        if getattr(params, name) not in have:
            raise NotFound(
                f"there is no auxiliary model {getattr(params, name)!r}; this server has: {', '.join(have)}",
                f"{path}.{name}",
            )


def _parsed(model: type[P], entry: Any, path: str) -> P:
    if not isinstance(entry, dict):
        raise BadRequest("an entry is a JSON object", path)
    try:
        return model.model_validate(entry)
    except ValidationError as error:
        raise bad_field(error, entry, path) from None


def _skip(error: WhipstaffError, compiled: Compiled, is_lenient: bool) -> None:
    """Leave an entry out if the request allows that, and say so in the receipt."""
    if not is_lenient:
        raise error
    compiled.warnings.append(f"{error.param} was left out: {error.message}")


def _sum(mixes: list[Mix]) -> Mix | None:
    """Several mixes of one request add up: each is a displacement of the base's logits."""
    weights: dict[str, float] = {}
    for mix in mixes:
        for name, weight in mix.weights.items():
            weights[name] = weights.get(name, 0.0) + weight
    return Mix(weights) if weights else None


def _overlap(planned: PlannedEdit | PlannedSpecial, sequence: Fed) -> int:
    """How many of a sequence's tokens an edit was meant for."""
    where, num_fed = planned.where, sequence.num_fed
    if where.token_ids:
        apart = [index for index, token in enumerate(sequence.ids[:num_fed]) if token in where.token_ids]
        at_tokens = where.intervals_at_tokens(sequence.prompt_len)
        usual = where.intervals(sequence.prompt_len)
        return _covered(usual, num_fed) + sum(_has(at_tokens, position) - _has(usual, position) for position in apart)
    return _covered(where.intervals(sequence.prompt_len), num_fed)


def _covered(intervals: list[Interval], num_fed: int) -> int:
    return sum(max(0, min(num_fed, num_fed if end is None else end) - start) for start, end in intervals)


def _has(intervals: list[Interval], position: int) -> bool:
    return any(start <= position and (end is None or position < end) for start, end in intervals)
