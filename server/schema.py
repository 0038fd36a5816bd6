"""The extra request fields and their compilation: JSON in, a plan and its receipt out, or the error with its path."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, TypeAdapter, ValidationError

from whipstaff.decoding.method import DecodingError, Method, Mix, Params
from whipstaff.decoding.methods import METHODS
from whipstaff.server.engine.request import PlacedPlan, RequestPlan
from whipstaff.server.errors import BadRequest, NotFound, Unavailable, WhipstaffError, bad_field
from whipstaff.server.registry import Registry
from whipstaff.steering.edits import MAX_GROWTH, Edit, growth
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.plan import MAX_EDITS, PlannedEdit, SteeringParams, SteeringPlan, plan_edit

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


@dataclass(frozen=True)
class Catalogue:
    """What this server has for requests to name."""

    registry: Registry
    auxiliaries: Mapping[str, int]  # name -> longest sequence it can follow
    dtype: str = "float32"  # of the served model's activations
    num_slots: int = 256  # distinct rows of edits in use at once


@dataclass
class Compiled:
    """A request's extras, ready to run."""

    plan: RequestPlan
    steering: list[dict[str, Any]]  # resolved entries, as the receipt shows them
    decoding: list[dict[str, Any]]
    limits: Mapping[str, int]  # of the auxiliary models it needs
    edit_paths: list[str]  # where each planned edit stands in the request
    warnings: list[str] = field(default_factory=list)
    edits: list[Edit] = field(default_factory=list)
    num_slots: int = 256  # what the server has; a request that needs more would wait for ever
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
        for path, planned in zip(self.edit_paths, self.plan.steering.edits if self.plan.steering else (), strict=True):
            try:
                planned.where.check(prompt_len, allowed)
            except SteeringError as error:
                raise BadRequest(str(error), f"{path}.{error.param}") from None
        num_rows = len(PlacedPlan(self.plan, prompt_len).rows)
        if num_rows > self.num_slots:
            raise Unavailable(
                f"the windows of these vectors overlap in {num_rows} different ways, each needs a slot, and this "
                f"server has {self.num_slots}; start it with a larger --steering-slots",
                "steering",
            )
        return allowed

    def receipt(self, fed: list[tuple[int, int]]) -> dict[str, Any]:
        """What was done, for the response.

        Args:
            fed: (prompt length, positions fed to the model) of every finished sequence.
        """
        edited = [0] * len(self.steering)
        for prompt_len, num_fed in fed:
            for index, planned in enumerate(self.plan.steering.edits if self.plan.steering else ()):
                edited[index] += _overlap(planned, prompt_len, num_fed)
        return {
            "steering": [{**entry, "edited_tokens": count} for entry, count in zip(self.steering, edited, strict=True)],
            "decoding": self.decoding,
            "warnings": self.warnings,
        }


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
    compiled = Compiled(RequestPlan(), [], [], {}, [], num_slots=catalogue.num_slots)
    edits = [
        edit
        for index, entry in enumerate(_entries(fields.get("steering"), "steering", MAX_EDITS))
        if (edit := _steering(entry, f"steering[{index}]", catalogue, compiled, is_lenient)) is not None
    ]
    mixes = [
        mix
        for index, entry in enumerate(_entries(fields.get("decoding"), "decoding", MAX_DECODING))
        if (mix := _decoding(entry, f"decoding[{index}]", catalogue, compiled, is_lenient)) is not None
    ]
    _check_growth(compiled, catalogue.dtype)
    mix = _sum(mixes)
    compiled.plan = RequestPlan(SteeringPlan(tuple(edits)) if edits else None, mix)
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


def _steering(entry: Any, path: str, catalogue: Catalogue, compiled: Compiled, is_lenient: bool) -> PlannedEdit | None:
    params = _parsed(SteeringParams, entry, path)
    try:
        vector = catalogue.registry.usable(params.vector, f"{path}.vector")
    except WhipstaffError as error:
        _skip(error, compiled, is_lenient)
        return None
    try:
        planned = plan_edit(params, vector)
    except SteeringError as error:
        raise BadRequest(str(error), f"{path}.{error.param}") from None
    compiled.edit_paths.append(path)
    compiled.edits.append((vector, planned.edit.scale, planned.edit.layers))
    compiled.steering.append(
        {
            "vector": params.vector,
            "digest": vector.digest,
            "method": vector.header.method,
            "scale": planned.edit.scale,
            "layers": list(planned.edit.layers or vector.layers),
            "sites": vector.sites,
            "where": planned.where.model_dump(),
        }
    )
    return planned


def _check_growth(compiled: Compiled, dtype: str) -> None:
    """Refuse edits that would overflow the model's activations, naming the first entry that takes them too far."""
    most = MAX_GROWTH[dtype]
    for num in range(1, len(compiled.edits) + 1):
        if not (size := growth(compiled.edits[:num])) <= most:
            raise BadRequest(
                f"the edits can make activations grow {size:.0e} times, and {dtype} would overflow; at most {most:.0e} "
                "is taken",
                f"{compiled.edit_paths[num - 1]}.scale",
            )


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


def _overlap(planned: PlannedEdit, prompt_len: int, num_fed: int) -> int:
    """How many of the first `num_fed` positions an edit touched."""
    return sum(
        max(0, min(num_fed, num_fed if end is None else end) - start)
        for start, end in planned.where.intervals(prompt_len)
    )
