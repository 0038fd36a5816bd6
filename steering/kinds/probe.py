"""Probes: they edit nothing. Other entries' conditions read them, where the model runs."""

from collections.abc import Sequence

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import EditsKind
from whipstaff.steering.kinds.kind import Asked, Entry
from whipstaff.steering.method import Method, P
from whipstaff.steering.planner import Planner
from whipstaff.steering.served import Served


class ProbeKind(EditsKind):
    """Hooked as edits are, and never made."""

    name = "probe"
    is_condition = True

    def admit(self, asked: Asked, planner: Planner, others: Sequence[Entry], served: Served) -> Entry:
        raise SteeringError('a probe edits nothing; name it in another entry\'s "when"', "vector")


PROBE = ProbeKind()


class ProbeMethod(Method[P]):
    """A method that conditions read: `direction . x + bias` at resid_post."""

    kind = PROBE
