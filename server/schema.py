"""The extra request fields and their compilation: JSON in, a plan and its receipt out, or the error with its path."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError

from whipstaff.decoding.method import DecodingError, Method, Mix, Params
from whipstaff.decoding.methods import METHODS
from whipstaff.server.admission import admit
from whipstaff.server.catalogue import Catalogue
from whipstaff.server.chat import Prompt
from whipstaff.server.engine.request import PlacedPlan, RequestPlan
from whipstaff.server.errors import BadRequest, NotFound, Unavailable, VectorUnfit, WhipstaffError, bad_field, parsed
from whipstaff.server.placing import place_plan
from whipstaff.server.steered import Fed, Steered
from whipstaff.steering.artifacts import Vector
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.plan import SteeringPlan, num_slots
from whipstaff.steering.planner import MAX_EDITS, Planner

PLAIN = "plain"
SEVERAL = "several"
FIELDS = ("steering", "decoding", "on_unavailable")
MAX_DECODING = 8

# Names that this ecosystem uses for methods that this version lacks. vLLM ignores unknown fields; these must not be.
NOT_BUILT = (
    *("explain", "guidance_scale", "negative_prompt", "dola_layers", "top_n_sigma", "typical_p"),
    *("dry_multiplier", "dry_base", "dry_allowed_length", "dry_sequence_breakers", "xtc_probability", "xtc_threshold"),
    *("mirostat", "mirostat_tau", "mirostat_eta", "dynatemp_range", "dynatemp_exponent"),
)

OnUnavailable = Literal["error", "ignore"]


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
        """The methods in use, for metrics: few, since it holds names of our own only, and one of each side."""
        sides = {entry.label for entry in self.steering}, {str(entry["method"]) for entry in self.decoding}
        names = [SEVERAL if len(side) > 1 else side.pop() for side in sides if side]
        return "+".join(sorted(names)) or PLAIN

    @property
    def vectors(self) -> list[Vector]:
        """Those of the registry that the engine will look up: kept until it is done with them."""
        return [vector for entry in self.steering for vector in (entry.vector, entry.probe) if vector is not None]

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
        paths += [entry.path for entry in self.steering if entry.special is not None]
        prefix_first = sorted(self.steering, key=lambda entry: entry.special is None)
        soft = [entry.soft for entry in prefix_first if entry.soft is not None]
        steering, ids = place_plan(self.plan.steering, paths, soft, prompt)
        self.plan = replace(self.plan, steering=steering)
        return ids

    def _check_steering(self, plan: SteeringPlan, prompt_len: int, allowed: int) -> None:
        self._check_tokens(plan)
        for entry in self.steering:
            entry.check_keys(plan, prompt_len, self.have)
            for planned in entry.planned(plan):
                try:
                    planned.where.check(prompt_len, allowed)
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

    def _check_tokens(self, plan: SteeringPlan) -> None:
        """The engine tells apart one set of tokens per request."""
        first: frozenset[int] = frozenset()
        for entry in self.steering:
            for planned in entry.planned(plan):
                where = planned.where
                for name, region in (("tokens", where), ("exclude.tokens", where.exclude)):
                    ids = region.ids if region else frozenset()
                    first = first or ids
                    if ids and ids != first:
                        raise BadRequest(
                            f"a request may tell one set of tokens apart; these are {sorted(ids)}, and before them "
                            f"came {sorted(first)}",
                            f"{entry.path}.where.{name}",
                        )

    def receipt(self, fed: list[Fed]) -> dict[str, Any]:
        """What was done, for the response; `fed` are the finished sequences."""
        plan = self.plan.steering or SteeringPlan(())
        return {
            "steering": [entry.said(plan, fed, self.have) for entry in self.steering],
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
    compiled = Compiled(RequestPlan(), [], {}, catalogue)
    planner = Planner()
    for path, entry in _entries(fields.get("steering"), "steering", MAX_EDITS):
        try:
            compiled.steering.append(admit(entry, path, planner, compiled.steering, catalogue, compiled.warnings))
        except (NotFound, VectorUnfit, Unavailable) as error:
            _skip(error, compiled, is_lenient)
    mixes = [
        mix
        for path, entry in _entries(fields.get("decoding"), "decoding", MAX_DECODING)
        if (mix := _decoding(entry, path, catalogue, compiled, is_lenient)) is not None
    ]
    mix = _sum(mixes)
    if mix and (soft := next((entry.soft for entry in compiled.steering if entry.soft), None)):
        raise BadRequest("auxiliary models have no embeddings for the rows of a soft prompt", f"{soft.path}.vector")
    steering = planner.plan if compiled.steering else None
    compiled.plan = RequestPlan(steering, mix, uuid4().hex if steering and steering.num_columns else "")
    compiled.limits = {name: catalogue.auxiliaries[name] for name in (mix.auxiliaries if mix else [])}
    return compiled


def _on_unavailable(value: Any) -> OnUnavailable:
    try:
        return TypeAdapter(OnUnavailable).validate_python("error" if value is None else value)
    except ValidationError as error:
        raise bad_field(error, value, "on_unavailable") from None


def _entries(value: Any, name: str, most: int) -> list[tuple[str, Any]]:
    """A field's entries by their paths: a list's, a single object, or either in a JSON string (vllm_xargs' way)."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise BadRequest(f"not JSON: {error}", name) from None
    if value is None:
        return []
    if not isinstance(value, list):
        return [(name, value)]
    if len(value) > most:
        raise BadRequest(f"{len(value)} entries; at most {most} are taken", name)
    return [(f"{name}[{index}]", entry) for index, entry in enumerate(value)]


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
    params = parsed(method.params, entry, path)
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
