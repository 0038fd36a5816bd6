"""Admission of one entry of a request's `steering`: every check that needs no prompt."""

from typing import Any

from pydantic import ValidationError

from whipstaff.server.admission.steering import Steered
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
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.edits import weigh
from whipstaff.steering.errors import NotServed, SteeringError
from whipstaff.steering.kinds.kind import Asked
from whipstaff.steering.method import HookPoint
from whipstaff.steering.methods import METHODS
from whipstaff.steering.planner import OWN_FIELDS, Planner, SteeringParams
from whipstaff.steering.sites import canonical
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Where


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
    kind, asked = vector.method.kind, Asked(params, own, vector, probe)
    try:
        if kind.is_off(asked):  # checked as if it stood alone, for its errors
            return Steered.at(path, kind.admit(asked, Planner(), [], caps), is_off=True)
        admitted = Steered.at(path, kind.admit(asked, planner, others, caps))
    except ValidationError as error:
        raise bad_field(error, entry, path, keys_of(vector.method.params) | keys_of(SteeringParams)) from None
    except SteeringError as error:
        refusal = Unavailable if isinstance(error, NotServed) else BadRequest
        raise refusal(str(error), field_path(path, error.param, entry)) from None
    warnings += [f"{path}: {said}" for said in admitted.warnings]
    _note_order(admitted, others, planner, warnings)
    return admitted


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
    """Every hook point that the vector edits must be hooked in this server's model."""
    named, kind = f"{path}.{'vector' if params.vector else 'method'}", vector.method.kind
    if not kind.is_entry:
        raise BadRequest(f"{params.vector!r} is a {vector.method.name}: methods of `decoding` read it", named)
    if (reason := kind.lacking(vector, params.layers, caps)) is not None:
        raise Unavailable(reason, named)


def _note_order(admitted: Steered, others: list[Steered], planner: Planner, warnings: list[str]) -> None:
    """Say so where edits meet that do not commute."""
    for other in others:
        both = _points(admitted) & _points(other)
        if both and not (_only_adds(admitted, planner) and _only_adds(other, planner)):
            point = min(both)
            warnings.append(
                f"{other.path} and {admitted.path} do not commute where they meet ({point.site} of layer "
                f"{point.layer}, ...): they are made in the order given"
            )
            return


def _points(entry: Steered) -> set[HookPoint]:
    """Where an entry edits activations."""
    layers = entry.params.layers
    points = entry.vector.tensors if entry.edits else ()
    return {canonical(point) for point in points if layers is None or point.layer in layers}


def _only_adds(entry: Steered, planner: Planner) -> bool:
    return all(weigh(entry.vector, planner.edits[index].edit).only_adds for index in entry.edits)
