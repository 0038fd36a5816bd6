"""Probes: they edit nothing. Other entries' conditions read them, where the model runs."""

from collections.abc import Sequence

from whipstaff.steering.kinds.kind import ReadKind, unhooked
from whipstaff.steering.method import Method, P
from whipstaff.steering.served import Served
from whipstaff.steering.vector_file import Vector


class ProbeKind(ReadKind):
    """Hooked as edits are, and never made."""

    name = "probe"
    named_in = "when"

    def lacking(self, vector: Vector, layers: Sequence[int] | None, served: Served) -> str | None:
        return unhooked(vector, layers, served)

    def why_no_entry(self, name: str, vector: Vector) -> str:
        return 'a probe edits nothing; name it in another entry\'s "when"'


PROBE = ProbeKind()


class ProbeMethod(Method[P]):
    """A method that conditions read: `direction . x + bias` at resid_post."""

    kind = PROBE
