"""What a kind of serving is: how methods of one sort are asked for, checked, planned and told of."""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fed import Fed, num_edited
from whipstaff.steering.inserts import Inserted
from whipstaff.steering.needs import Needs
from whipstaff.steering.plan import PlannedEdit, PlannedModuleEdit, SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.served import Served
from whipstaff.steering.sites import CORE
from whipstaff.steering.vector_file import Vector

NO_EXPERTS = "the served model has no experts, so there is no router to edit"
OF_ACTIVATIONS = ("layers", "when", "schedule", "normalize", "renorm")  # fields that speak of edits of activations


@dataclass(frozen=True)
class UncheckedEntry:
    """One entry of a request's `steering`, whose names are known."""

    params: SteeringParams
    own: Mapping[str, Any]  # its method's parameters, unchecked
    vector: Vector
    probe: Vector | None  # that its condition reads


@dataclass(frozen=True)
class Entry:
    """One entry, checked, and what it became in the request's plan."""

    params: SteeringParams
    vector: Vector
    probe: Vector | None = None
    edits: range = range(0)  # which of the plan's edits
    module_edit: int | None = None  # which of the plan's edits of the router or of attention
    inserted: Inserted | None = None  # placeholders that the prompt is given
    warnings: tuple[str, ...] = ()  # for the receipt

    def planned(self, plan: SteeringPlan) -> Sequence[PlannedEdit | PlannedModuleEdit]:
        """What the entry became in its plan."""
        return (
            [plan.edits[i] for i in self.edits] if self.module_edit is None else [plan.module_edits[self.module_edit]]
        )


class Kind(ABC):
    """One way in which methods are made to happen. Its methods say `kind`; nobody else tells methods apart.

    It is an `EntryKind` or a `ReadKind`. What workers make of a plan is in `server.engine.worker.edits`.
    """

    name: ClassVar[str]
    named_in: ClassVar[Literal["steering", "when", "decoding"]]
    """Where a request names its methods' vectors: in entries of `steering`, in their conditions, or in `decoding`."""
    meaningless: ClassVar[tuple[str, ...]] = ()  # fields that every entry has and these cannot honour

    def needs(self, vector: Vector) -> Needs:
        """What the engine must be started with for a vector."""
        return Needs.of_hook_points(vector)

    def why_not(self, served: Served) -> str | None:
        """Why this server can run none of its methods, and what would help; None when it can."""
        return None

    def lacking(self, vector: Vector, layers: Sequence[int] | None, served: Served) -> str | None:
        """What this server would have to be started with for these layers of a vector (None: all); None if it was."""
        return None

    def doses(self, vector: Vector, served: Served) -> list[dict[str, Any]]:
        """What a vector comes to at its own strength and at 1, beside the served model's activations, as far as
        known."""
        return []


class ReadKind(Kind):
    """Of methods that edit nothing: something else reads their vectors."""

    @abstractmethod
    def why_no_entry(self, name: str, vector: Vector) -> str:
        """Why an entry of `steering` cannot be a vector of this kind, by its name."""


class EntryKind(Kind):
    """Of methods that an entry of `steering` names."""

    named_in = "steering"

    def is_off(self, unchecked: UncheckedEntry) -> bool:
        """Whether an entry leaves the model alone, bit for bit. Raises: SteeringError, pydantic.ValidationError."""
        return unchecked.vector.method.is_off(Planner.checked(unchecked.vector, unchecked.own))

    @abstractmethod
    def admit(self, unchecked: UncheckedEntry, planner: Planner, others: Sequence[Entry], served: Served) -> Entry:
        """Check an entry and add it to the plan.

        Args:
            others: the request's entries before this one.

        Raises:
            SteeringError: naming the field; NotServed where another server could.
            pydantic.ValidationError: of the method's own parameters.
        """

    def check_prompt(self, entry: Entry, plan: SteeringPlan, prompt_len: int, served: Served) -> None:
        """Checks that need the prompt's length. Raises: SteeringError naming the field."""
        return None

    def redirected(self, entry: Entry, plan: SteeringPlan) -> Mapping[int, str]:
        """Layers in which heads look elsewhere than the model's own scores say, each with the field that names it."""
        return {}

    @abstractmethod
    def describe(self, entry: Entry, plan: SteeringPlan, fed: Sequence[Fed], served: Served) -> dict[str, Any]:
        """The entry as the receipt shows it; `fed` are the finished sequences."""


def entry_kind(vector: Vector, name: str) -> EntryKind:
    """What makes an entry of `steering` happen that names this vector. Raises: SteeringError where none can."""
    kind = vector.method.kind
    if isinstance(kind, ReadKind):
        raise SteeringError(kind.why_no_entry(name, vector), "vector")
    assert isinstance(kind, EntryKind)
    return kind


def unhooked(vector: Vector, layers: Sequence[int] | None, served: Served) -> str | None:
    """Which site of a vector the model lacks, or the server left alone, and how to start it otherwise; None where all
    are hooked."""
    hooked = {*CORE, *(point.site for point in served.hook_points)}
    for point in vector.tensors:
        if (layers is None or point.layer in layers) and point.canonical not in served.hook_points:
            if point.site == "router" and not served.model.num_experts:
                return NO_EXPERTS
            if point.canonical.site in hooked:
                return f"this vector edits {point.site}; layer {point.layer} of the served model has none"
            return (
                f"this vector edits {point.site}, which this server left alone; start it with --steering-sites "
                f"{point.site}"
            )
    return None


def describe_module_edit(entry: Entry, plan: SteeringPlan, fed: Sequence[Fed]) -> dict[str, Any]:
    """An edit of the router or of attention, as the receipt shows it."""
    (planned,) = entry.planned(plan)
    assert isinstance(planned, PlannedModuleEdit)
    return {
        **json.loads(planned.edit.setting),
        "where": [planned.where.model_dump(exclude_none=True)],
        "edited_tokens": num_edited([planned], fed),
    }
