"""Admission of one entry of a request's `steering`: every check that needs no prompt."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from whipstaff.server.admission.positions import SoftPrompt
from whipstaff.server.admission.steering import Steered, largest_dose
from whipstaff.server.errors import (
    BadRequest,
    Unavailable,
    bad_field,
    check_given_once,
    field_path,
    keys_of,
    no_entry,
    parsed,
)
from whipstaff.server.registry.capabilities import Capabilities, Limit
from whipstaff.steering.edits import edits_of, weigh
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.method import HookPoint
from whipstaff.steering.methods import METHODS
from whipstaff.steering.methods.attention import OverrideParams, PastaParams
from whipstaff.steering.methods.mote import MoTE, MoTEParams, Routing
from whipstaff.steering.methods.side_attention import SideAttention
from whipstaff.steering.methods.virtual_tokens import InsertParams, PrefixKV
from whipstaff.steering.methods.virtual_tokens import SoftPrompt as SoftPromptMethod
from whipstaff.steering.ops import Directions
from whipstaff.steering.overflow import MAX_GROWTH, growth
from whipstaff.steering.plan import PlannedEdit, PlannedSpecial
from whipstaff.steering.planner import OWN_FIELDS, Planner, SteeringParams
from whipstaff.steering.routing_scheme import RoutingError
from whipstaff.steering.sites import canonical
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Where

_MAX_TRIALS = 32  # of scales, until an edit keeps to the operator's limit


def admit(
    entry: Any, path: str, planner: Planner, others: list[Steered], caps: Capabilities, warnings: list[str]
) -> Steered:
    """Check one entry and add it to the plan, unless it is off.

    Args:
        others: the request's entries before this one.
        warnings: for the receipt; added to.

    Raises: WhipstaffError with the JSON path of the field that cannot be honoured.
    """
    params = parsed(SteeringParams, _part(entry, path, own=False), path)
    vector = _named(params, path, caps)
    probe = caps.registry.usable(params.when.probe, f"{path}.when.probe") if params.when else None
    _check_sites(vector, params, path, caps)
    _check_tokens(vector, params, path, caps.vocabulary)
    own = _part(entry, path, own=True)
    check_given_once(vector.method.params, own, path)
    try:
        if vector.method.served_by != "rows" and vector.method.is_off(Planner.checked(vector, own)):
            planner, others, warnings = Planner(), [], []  # as if it stood alone, for its errors
            return replace(_add(own, params, vector, probe, path, planner, others, caps, warnings), is_off=True)
        admitted = _add(own, params, vector, probe, path, planner, others, caps, warnings)
    except ValidationError as error:
        raise bad_field(error, entry, path, keys_of(vector.method.params) | keys_of(SteeringParams)) from None
    except SteeringError as error:
        raise BadRequest(str(error), field_path(path, error.param, entry)) from None
    _check_growth(planner, caps.dtype, field_path(path, "scale" if "scale" in vector.method.off else "", entry))
    _note_order(admitted, others, planner, warnings)
    return admitted


def _add(
    own: dict[str, Any],
    params: SteeringParams,
    vector: Vector,
    probe: Vector | None,
    path: str,
    planner: Planner,
    others: list[Steered],
    caps: Capabilities,
    warnings: list[str],
) -> Steered:
    """Raises: SteeringError, pydantic.ValidationError."""
    if isinstance(vector.method, SoftPromptMethod):
        return Steered(path, vector, params, range(0), SoftPrompt.of(params, own, vector, path))
    if vector.method.served_by in ("router", "attention"):
        special = planner.add_special(params, own, vector)
        _check_special(vector, special, others, planner, caps)
        soft = _prefix(vector, params, path, others, caps)
        return Steered(path, vector, params, range(0), soft, len(planner.specials) - 1)
    if vector.method.name == "probe":
        raise SteeringError('a probe edits nothing; name it in another entry\'s "when"', "vector")
    if caps.tensor_parallel > 1 and "attn_head" in vector.sites:
        _check_slices(vector, params, _tried(params, own, vector, probe), path, caps)
    if caps.limit is not None:
        own, given = _kept_to(caps.limit, params, own, vector, probe, caps), own
        if own is not given:
            warnings.append(f"{path}: weakened to scale {own['scale']:.4g}, the most this server allows")
    return Steered(path, vector, params, planner.add(params, own, vector, probe), probe=probe)


def _tried(params: SteeringParams, own: dict[str, Any], vector: Vector, probe: Vector | None) -> list[PlannedEdit]:
    """What an entry would become, in no plan yet."""
    planner = Planner()
    planner.add(params, own, vector, probe)
    return planner.edits


def _check_slices(
    vector: Vector, params: SteeringParams, planned: list[PlannedEdit], path: str, caps: Capabilities
) -> None:
    """Heads are shared out over ranks: what reads all of them at once cannot be served so."""
    for one in planned:
        for place, ops in edits_of(vector, one.edit).items():
            if place.site == "attn_head" and (params.renorm or any(isinstance(op, Directions) for op in ops)):
                raise Unavailable(
                    f"this edit reads all heads together, and they are shared out over {caps.tensor_parallel} ranks; "
                    "start the server with --tensor-parallel-size 1",
                    f"{path}.vector",
                )


def _named(params: SteeringParams, path: str, caps: Capabilities) -> Vector:
    """The vector of an entry, or the stand-in of a method that needs none."""
    if params.vector is not None:
        return caps.registry.usable(params.vector, f"{path}.vector")
    name, without_file = params.method or "", caps.registry.without_file
    if name in METHODS and name not in without_file:
        raise BadRequest(f"{name} comes with a vector; name that, and not its method", f"{path}.method")
    if name not in METHODS:
        known = ", ".join(without_file)
        raise Unavailable(f"there is no steering method {name!r}; these need no vector: {known}", f"{path}.method")
    return without_file[name]


def _part(entry: Any, path: str, own: bool) -> dict[str, Any]:
    """The fields that every entry may have, or its method's own."""
    if not isinstance(entry, dict):
        raise no_entry(entry, path, "vector")
    return {name: value for name, value in entry.items() if (name not in OWN_FIELDS) == own}


def _check_tokens(vector: Vector, params: SteeringParams, path: str, vocabulary: int) -> None:
    """The tokens that a clause tells apart must exist."""
    where = Where.of(params.where or vector.header.where or vector.method.where)
    for name, region in (("tokens", where), ("exclude.tokens", where.exclude)):
        for index, token in enumerate((region.tokens if region else None) or ()):
            if isinstance(token, int) and token >= vocabulary:
                named = f"{path}.where.{name}[{index}]" if params.where is not None else f"{path}.vector"
                raise BadRequest(f"token {token} is not in the vocabulary, which has {vocabulary}", named)


def _check_sites(vector: Vector, params: SteeringParams, path: str, caps: Capabilities) -> None:
    """Every place that the vector edits must be hooked in this server's model."""
    named = f"{path}.{'vector' if params.vector else 'method'}"
    if vector.method.served_by == "logits":
        raise BadRequest(f"{params.vector!r} is a {vector.method.name}: methods of `decoding` read it", named)
    if (reason := lacking(vector, params.layers, caps)) is not None:
        raise Unavailable(reason, named)


def lacking(vector: Vector, layers: Sequence[int] | None, caps: Capabilities) -> str | None:
    """What this server would have to be started with for these layers of a vector (None: all); None if it was."""
    if vector.method.served_by == "attention":
        is_on = caps.attention is not None
        return None if is_on else "edits inside attention are off; start the server with --steering-sites attention"
    no_experts = "the served model has no experts, so there is no router to edit"
    if vector.method.served_by == "router" and not caps.routing:
        has_experts = bool(caps.registry.model.num_experts)
        return "experts are left alone; start the server with --steering-sites router" if has_experts else no_experts
    if vector.method.name == SoftPromptMethod.name and not caps.takes_soft_prompts:
        return (
            "the served model's tokens are embedded where rows cannot be inserted; start it without "
            "--enable-prompt-embeds, or with a model of text only"
        )
    for place in vector.tensors:
        if (layers is None or place.layer in layers) and canonical(place) not in caps.hook_points:
            if place.site == "router" and not caps.registry.model.num_experts:
                return no_experts
            return (
                f"this vector edits {place.site}, which this server left alone; start it with --steering-sites "
                f"{place.site}"
            )
    return None


def _prefix(
    vector: Vector, params: SteeringParams, path: str, others: list[Steered], caps: Capabilities
) -> SoftPrompt | None:
    """The placeholders that a KV prefix needs in front of the prompt; None for other methods. Raises: SteeringError."""
    if not isinstance(vector.method, PrefixKV):
        return None
    if params.where is not None:
        raise SteeringError("a prefix stands before the prompt, and all that follows sees it", "where")
    if any(isinstance(entry.vector.method, PrefixKV) for entry in others):
        raise SteeringError("a request has one prefix at most", "vector")
    if not caps.takes_soft_prompts:
        raise SteeringError("this model's prompts cannot be given placeholders", "vector")
    num = len(next(iter(vector.tensors.values()))["key"])
    return SoftPrompt(path, vector.digest, InsertParams(), num)


def _check_routing(
    params: MoTEParams, vector: Vector, others: list[Steered], planner: Planner, caps: Capabilities
) -> None:
    """Check what routers are asked for, alone and beside the request's other entries. Raises: SteeringError."""
    asked = [(vector, params)]
    for entry in others:
        if entry.special is not None and isinstance(entry.vector.method, MoTE):
            setting = planner.specials[entry.special].special.setting
            asked.append((entry.vector, MoTEParams.model_validate_json(setting)))
    together: dict[int, list[Routing]] = {}
    for its_vector, its_params in asked:
        for layer, routing in MoTE().routing(its_params, its_vector.tensors).items():
            together.setdefault(layer, []).append(routing)
    for layer, routings in together.items():
        scheme = caps.routing.get(layer)
        if scheme is None:
            raise SteeringError(f"layer {layer} has no routed experts; layers that have: {[*caps.routing]}", "experts")
        try:
            scheme.check(routings[0])
            never = [expert for routing in routings if routing.mode == "pre" for expert in routing.off]
            scheme.check_sum(never, len({expert for routing in routings for expert in routing.on}))
        except RoutingError as error:
            raise SteeringError(str(error), f"experts.{layer}") from None


def _check_special(
    vector: Vector, planned: PlannedSpecial, others: list[Steered], planner: Planner, caps: Capabilities
) -> None:
    """Check an edit of the router or of attention against the served model. Raises: SteeringError."""
    params = vector.method.params.model_validate_json(planned.special.setting)
    if isinstance(params, MoTEParams):
        _check_routing(params, vector, others, planner, caps)
        return
    assert caps.attention is not None
    if isinstance(params, OverrideParams):
        asked = {edit.layer: f"edits.{index}.layer" for index, edit in enumerate(params.edits)}
        able = caps.attention["layers"]
    elif isinstance(params, PastaParams):
        asked = {layer: f"heads.{layer}" for layer in params.heads}
        able = caps.attention["bias"]
    else:
        able = caps.attention["side" if isinstance(vector.method, SideAttention) else "layers"]
        asked = dict.fromkeys(vector.layers, "vector")
    for layer, path in asked.items():
        if layer not in able:
            reason = caps.attention["lacking"].get(layer, f"layers that can be edited so: {able}")
            raise SteeringError(f"the attention of layer {layer} cannot be edited so: {reason}", path)


def _kept_to(
    limit: Limit,
    params: SteeringParams,
    own: dict[str, Any],
    vector: Vector,
    probe: Vector | None,
    caps: Capabilities,
) -> dict[str, Any]:
    """An entry's own parameters, weakened if the operator's limit asks for it and allows it. Raises: SteeringError."""
    kept, gain = own, params.schedule.largest if params.schedule else 1.0
    for _ in range(_MAX_TRIALS):
        planned = _tried(params, kept, vector, probe)
        found = largest_dose(vector, planned, caps.lengths, gain)
        if (dose := found.relative if found else 0.0) <= limit.max_dose:
            return kept
        scale = json.loads(planned[0].edit.setting).get("scale")
        if limit.policy == "refuse" or scale is None:
            break
        # Exact at once where the dose is proportional to the scale; rotations take a few more.
        kept = {**_without_scale(own), "scale": scale * min(limit.max_dose / dose, 0.999)}
    raise SteeringError(
        f"the edit is {dose:.3g} times as long as what it edits; this server allows {limit.max_dose:.3g}",
        "scale" if scale is not None else "",
    )


def _without_scale(own: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in own.items() if name not in ("scale", "strength", "coefficient")}


def _check_growth(planner: Planner, dtype: str, param: str) -> None:
    """Refuse edits that would overflow the model's activations, when the first entry takes them too far."""
    most = MAX_GROWTH[dtype]
    if not (size := growth(sorted(planner.bounds, key=lambda bound: bound[0].layer))) <= most:
        raise BadRequest(
            f"the edits can make activations grow {size:.0e} times, and {dtype} would overflow; at most {most:.0e} "
            "is taken",
            param,
        )


def _note_order(admitted: Steered, others: list[Steered], planner: Planner, warnings: list[str]) -> None:
    """Say so where edits meet that do not commute."""
    for other in others:
        both = _places(admitted) & _places(other)
        if both and not (_only_adds(admitted, planner) and _only_adds(other, planner)):
            place = min(both)
            warnings.append(
                f"{other.path} and {admitted.path} do not commute where they meet ({place.site} of layer "
                f"{place.layer}, ...): they are made in the order given"
            )
            return


def _places(entry: Steered) -> set[HookPoint]:
    """Where an entry edits activations."""
    layers = entry.params.layers
    return (
        set()
        if not entry.edits
        else {canonical(place) for place in entry.vector.tensors if layers is None or place.layer in layers}
    )


def _only_adds(entry: Steered, planner: Planner) -> bool:
    return all(weigh(entry.vector, planner.edits[index].edit).only_adds for index in entry.edits)
