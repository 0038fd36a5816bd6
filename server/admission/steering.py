"""The entries of a request's `steering`: every check that needs no prompt, and what the receipt says of them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from whipstaff.server.admission.positions import SoftPrompt
from whipstaff.server.errors import (
    BadRequest,
    Unavailable,
    bad_field,
    check_given_once,
    did_you_mean,
    field_path,
    keys_of,
    no_entry,
    parsed,
)
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.conditions import Threshold
from whipstaff.steering.edits import weigh
from whipstaff.steering.errors import NotServed, SteeringError
from whipstaff.steering.fed import Fed
from whipstaff.steering.kinds.kind import Entry, EntryKind, UncheckedEntry, entry_kind
from whipstaff.steering.method import HookPoint
from whipstaff.steering.methods import METHODS
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.planner import OWN_FIELDS, Planner, SteeringParams
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Where

STOP_FIELD = "stop_when"


@dataclass(frozen=True, kw_only=True)
class SteeringEntry(Entry):
    """One entry of a request's `steering`, resolved."""

    path: str
    is_off: bool = False  # whether it changes nothing and is left out

    @staticmethod
    def at(path: str, entry: Entry, is_off: bool = False) -> "SteeringEntry":
        """An entry, and where in the request it stands."""
        return SteeringEntry(**vars(entry), path=path, is_off=is_off)

    @property
    def kind(self) -> EntryKind:
        """What makes it happen."""
        return entry_kind(self.vector, self.path)

    @property
    def label(self) -> str:
        """Its method's name: one of ours, or the general one for files of other methods."""
        return self.vector.method.name

    @property
    def soft(self) -> SoftPrompt | None:
        """The placeholders that it asks for."""
        return self.inserted and SoftPrompt(self.path, self.vector.digest, *self.inserted)

    def check_prompt(self, plan: SteeringPlan, prompt_len: int, caps: Capabilities) -> None:
        """Checks that need the prompt's length. Raises: BadRequest naming the field."""
        try:
            self.kind.check_prompt(self, plan, prompt_len, caps)
        except SteeringError as error:
            raise BadRequest(str(error), f"{self.path}.{error.param}") from None

    def describe(self, plan: SteeringPlan, fed: list[Fed], caps: Capabilities) -> dict[str, Any]:
        """The entry as the receipt shows it; `fed` are the finished sequences."""
        return {
            "vector": self.params.vector,
            "digest": self.vector.digest,
            "method": self.vector.header.method,
            **self.kind.describe(self, plan, fed, caps),
        }


class StopEntry(NamedTuple):
    """A request's `stop_when`, resolved."""

    params: Threshold
    probe: Vector

    def describe(self, plan: SteeringPlan, fed: Sequence[Fed]) -> dict[str, Any]:
        """As the receipt shows it: with what the probe read at each token that was generated and fed to the model, the
        last of a sequence that it ended among them."""
        assert plan.stop is not None
        stop, said = plan.stop, self.params.model_dump(exclude_none=True)
        columns = [(one, one.columns[stop.condition_index] if one.columns else []) for one in fed]
        readings = [
            column[one.prompt_len : one.num_fed + stop.holds_at(column, one.num_fed)] for one, column in columns
        ]
        return {**said, "digest": self.probe.digest, "readings": readings}


class SequenceSteering(NamedTuple):
    """How a sequence is steered, whatever its prompt will be: the request's own, or a companion's."""

    entries: Sequence[SteeringEntry] = ()
    plan: SteeringPlan = SteeringPlan(())
    warnings: Sequence[str] = ()  # for the receipt
    stop: StopEntry | None = None

    @property
    def paths(self) -> list[str]:
        """Where in the request each edit of the plan stands, then each edit of a module."""
        paths = [entry.path for entry in self.entries for _ in entry.edits]
        return paths + [entry.path for entry in self.entries if entry.module_edit is not None]

    @property
    def soft(self) -> list[SoftPrompt]:
        """The rows that a prompt must have room for; a KV prefix stands first."""
        prefix_first = sorted(self.entries, key=lambda entry: entry.module_edit is None)
        return [entry.soft for entry in prefix_first if entry.soft is not None]

    @property
    def vectors(self) -> list[Vector]:
        """The files that it reads."""
        read = [vector for entry in self.entries for vector in (entry.vector, entry.probe) if vector is not None]
        return read if self.stop is None else [*read, self.stop.probe]


def admit_steering(
    entry: Any, path: str, planner: Planner, others: list[SteeringEntry], caps: Capabilities, warnings: list[str]
) -> SteeringEntry:
    """Check one entry and add it to the plan, unless it is off.

    Args:
        others: the request's entries before this one.
        warnings: for the receipt; added to.

    Raises: WhipstaffError with the JSON path of the field that cannot be honoured.
    """
    params = parsed(SteeringParams, _part(entry, path, own=False), path)
    vector = _named(params, path, caps)
    probe = caps.registry.usable(params.when.probe, f"{path}.when.probe") if params.when else None
    kind = _kind_of(vector, params, path, caps)
    _check_tokens(vector, params, path, caps.vocabulary)
    own = _part(entry, path, own=True)
    check_given_once(vector.method.params, own, path)
    unchecked = UncheckedEntry(params, own, vector, probe)
    try:
        if kind.is_off(unchecked):  # checked as if it stood alone, for its errors
            return SteeringEntry.at(path, kind.admit(unchecked, Planner(), [], caps), is_off=True)
        admitted = SteeringEntry.at(path, kind.admit(unchecked, planner, others, caps))
    except ValidationError as error:
        raise bad_field(error, entry, path, keys_of(vector.method.params) | keys_of(SteeringParams)) from None
    except SteeringError as error:
        refusal = Unavailable if isinstance(error, NotServed) else BadRequest
        raise refusal(str(error), field_path(path, error.param, entry)) from None
    warnings += [f"{path}: {said}" for said in admitted.warnings]
    _note_order(admitted, others, planner, warnings)
    return admitted


def admit_stop(value: Any, planner: Planner, caps: Capabilities) -> StopEntry:
    """Check a request's `stop_when` and add it to the plan. Raises: WhipstaffError naming the field."""
    params = parsed(Threshold, value, STOP_FIELD)
    probe = caps.registry.usable(params.probe, f"{STOP_FIELD}.probe")
    try:
        planner.end_at(params, probe)
    except SteeringError as error:
        raise BadRequest(str(error), f"{STOP_FIELD}.{error.param}") from None
    layers = None if params.layer is None else [params.layer]
    if (reason := probe.method.kind.lacking(probe, layers, caps)) is not None:
        raise Unavailable(reason, f"{STOP_FIELD}.probe")
    return StopEntry(params, probe)


def check_one_set(entries: Iterable[SteeringEntry], plan: SteeringPlan) -> None:
    """The engine tells apart one set of tokens per sequence. Raises: BadRequest."""
    first: frozenset[int] = frozenset()
    for entry in entries:
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


def _named(params: SteeringParams, path: str, caps: Capabilities) -> Vector:
    """The vector of an entry, or the stand-in of a method that needs none."""
    if params.vector is not None:
        return caps.registry.usable(params.vector, f"{path}.vector")
    name, without_file = params.method or "", caps.registry.without_file
    if name in METHODS and name not in without_file:
        raise BadRequest(f"{name} comes with a vector; name that, and not its method", f"{path}.method")
    if name not in METHODS:
        known = did_you_mean(name, METHODS) or f"; these need no vector: {', '.join(without_file)}"
        raise Unavailable(f"there is no steering method {name!r}{known}", f"{path}.method")
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


def _kind_of(vector: Vector, params: SteeringParams, path: str, caps: Capabilities) -> EntryKind:
    """What makes an entry happen: every hook point that its vector edits must be hooked in this server's model."""
    named = f"{path}.{'vector' if params.vector else 'method'}"
    try:
        kind = entry_kind(vector, params.vector or vector.method.name)
    except SteeringError as error:
        raise BadRequest(str(error), named) from None
    if (reason := kind.lacking(vector, params.layers, caps)) is not None:
        raise Unavailable(reason, named)
    return kind


def _note_order(admitted: SteeringEntry, others: list[SteeringEntry], planner: Planner, warnings: list[str]) -> None:
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


def _points(entry: SteeringEntry) -> set[HookPoint]:
    """Where an entry edits activations."""
    layers = entry.params.layers
    points = entry.vector.tensors if entry.edits else ()
    return {point.canonical for point in points if layers is None or point.layer in layers}


def _only_adds(entry: SteeringEntry, planner: Planner) -> bool:
    return all(weigh(entry.vector, planner.edits[index].edit).only_adds for index in entry.edits)
