"""Edits of expert routers: behind each layer's own selection, experts are switched off or forced on."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from whipstaff.steering.edits import settings_of
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fed import Fed
from whipstaff.steering.kinds.kind import (
    NO_EXPERTS,
    OF_ACTIVATIONS,
    Entry,
    EntryKind,
    UncheckedEntry,
    describe_module_edit,
    unhooked,
)
from whipstaff.steering.method import HookPoint, Method, P, Tensors
from whipstaff.steering.plan import ModuleEdit, SteeringPlan
from whipstaff.steering.planner import Planner
from whipstaff.steering.routing_scheme import Routing, RoutingError
from whipstaff.steering.served import Served
from whipstaff.steering.vector_file import Vector


class RouterKind(EntryKind):
    name = "router"
    meaningless = OF_ACTIVATIONS

    def why_not(self, served: Served) -> str | None:
        if not served.model.num_experts:
            return "the served model has no experts"
        return None if served.routing else "start the server with --steering-sites router"

    def lacking(self, vector: Vector, layers: Sequence[int] | None, served: Served) -> str | None:
        if served.routing:
            return unhooked(vector, layers, served)
        has_experts = bool(served.model.num_experts)
        return "experts are left alone; start the server with --steering-sites router" if has_experts else NO_EXPERTS

    def admit(self, unchecked: UncheckedEntry, planner: Planner, others: Sequence[Entry], served: Served) -> Entry:
        planner.add_module_edit(unchecked.params, unchecked.own, unchecked.vector)
        entry = Entry(unchecked.params, unchecked.vector, module_edit=len(planner.module_edits) - 1)
        together = [one for one in others if one.vector.method.kind is self]
        self._check([entry, *together], planner, served)
        return entry

    def _check(self, entries: Sequence[Entry], planner: Planner, served: Served) -> None:
        """Check what routers are asked for by the first entry, and by all together. Raises: SteeringError."""
        together: dict[int, list[Routing]] = {}
        for entry in entries:
            assert entry.module_edit is not None
            for layer, routing in self.routing(entry.vector, planner.module_edits[entry.module_edit].edit).items():
                together.setdefault(layer, []).append(routing)
        for layer, routings in together.items():
            scheme = served.routing.get(layer)
            if scheme is None:
                having = [*served.routing]
                raise SteeringError(f"layer {layer} has no routed experts; layers that have: {having}", "experts")
            try:
                scheme.check(routings[0])
                never = [expert for routing in routings if routing.mode == "pre" for expert in routing.off]
                scheme.check_sum(never, len({expert for routing in routings for expert in routing.on}))
            except RoutingError as error:
                raise SteeringError(str(error), f"experts.{layer}") from None

    def routing(self, vector: Vector, edit: ModuleEdit) -> Mapping[int, Routing]:
        """What an edit asks of each layer's router."""
        method = vector.method
        assert isinstance(method, RouterMethod)
        return method.routing(settings_of(vector, edit), vector.tensors)

    def describe(self, entry: Entry, plan: SteeringPlan, fed: Sequence[Fed], served: Served) -> dict[str, Any]:
        return describe_module_edit(entry, plan, fed)


ROUTER = RouterKind()


class RouterMethod(Method[P]):
    """A method that changes which experts are selected."""

    kind = ROUTER

    @abstractmethod
    def routing(self, params: P, tensors: Mapping[HookPoint, Tensors]) -> Mapping[int, Routing]:
        """What each layer's router does; layers that are left alone are left out."""
