"""Learned heads: files of the registry that methods of `decoding` read. They edit nothing."""

from whipstaff.steering.kinds.kind import ReadKind
from whipstaff.steering.method import Method, P
from whipstaff.steering.vector_file import Vector


class HeadKind(ReadKind):
    name = "head"
    named_in = "decoding"

    def why_no_entry(self, name: str, vector: Vector) -> str:
        return f"{name!r} is a {vector.method.name}: methods of `decoding` read it"


HEAD = HeadKind()


class HeadMethod(Method[P]):
    """A method that reads nothing but the last hidden state. Shapes use `hidden`, and free names that the served model
    must agree with."""

    kind = HEAD
