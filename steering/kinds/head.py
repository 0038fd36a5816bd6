"""Learned heads: files of the registry that methods of `decoding` read. They edit nothing."""

from collections.abc import Sequence
from typing import Any

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fed import Fed
from whipstaff.steering.kinds.kind import Asked, Entry, Kind
from whipstaff.steering.method import Method, P
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.planner import Planner
from whipstaff.steering.served import Served


class HeadKind(Kind):
    name = "head"
    is_entry = False

    def admit(self, asked: Asked, planner: Planner, others: Sequence[Entry], served: Served) -> Entry:
        raise SteeringError(f"{asked.params.vector!r} is no vector that edits", "vector")

    def describe(self, entry: Entry, plan: SteeringPlan, fed: Sequence[Fed], served: Served) -> dict[str, Any]:
        raise NotImplementedError


HEAD = HeadKind()


class HeadMethod(Method[P]):
    """A method that reads nothing but the last hidden state. Shapes use `hidden`, and free names that the served model
    must agree with."""

    kind = HEAD
