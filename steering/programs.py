"""Programs: a row of edits at one hook point as instructions for `cuda_ext.run_edits_`, and the lines that they use.

A row's entries are made in the order given. Neighbouring diagonal edits that are always made together become one
instruction, so that three vectors cost what one costs; everything else follows in order.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from whipstaff.cuda_ext import MAX_GROUP, Opcode
from whipstaff.steering.method import HookPoint
from whipstaff.steering.ops import PER_TOKEN_NORMS, Cross, Diagonal, Directions, EditOp
from whipstaff.steering.sites import pool_of


@dataclass(frozen=True)
class Gate:
    """How much of an edit a token gets: the product of a schedule's gain, a condition and a ramp over readings.

    `schedule_index` is one of the request's schedules, `condition_index` one of its conditions; -1 is none.
    """

    schedule_index: int = -1
    condition_index: int = -1
    is_latched: bool = False
    on: float = 0.0
    off: float = 0.0
    sign: int = 1
    ramp: tuple[int, float, float, float, float] | None = None  # column, low, high, gain at low, gain at high

    @property
    def is_open(self) -> bool:
        return self == OPEN

    @property
    def is_partial(self) -> bool:
        """Whether it can be anything but 0 and 1."""
        return self.schedule_index >= 0 or self.ramp is not None

    @property
    def outline(self) -> "Gate":
        """A gate that takes as many instructions and merges edits alike, whatever its numbers."""
        ramp = None if self.ramp is None else (0, 0.0, 0.0, 0.0, 0.0)
        return Gate(min(self.schedule_index, 0), min(self.condition_index, 0), ramp=ramp)


OPEN = Gate()


@dataclass(frozen=True, eq=False)
class Content:
    """Numbers as a name: equal where they are the same bit for bit. Few of them are hashed, for lines are long."""

    bits: np.ndarray[Any, np.dtype[np.int32]]

    def __hash__(self) -> int:
        return hash(self.bits[:: len(self.bits) // 8 + 1].tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Content) and np.array_equal(self.bits, other.bits)


@dataclass(frozen=True)
class Line:
    """A row of numbers that instructions read, and that tables hold once for each name.

    Attributes:
        numbers: (width,) float32.
    """

    name: Hashable
    numbers: Tensor = field(compare=False, repr=False)

    @staticmethod
    def own(numbers: Tensor) -> "Line":
        """A line that stands for itself alone, as those of diagonal edits: merged with others, they are new numbers."""
        return Line(object(), numbers)

    @staticmethod
    def shared(numbers: Tensor) -> "Line":
        """A line that is the same wherever its numbers are."""
        return Line(Content(numbers.contiguous().numpy().view(np.int32)), numbers)


@dataclass(frozen=True)
class Step:
    """One entry of a row at one hook point."""

    ops: tuple[EditOp, ...]
    gate: Gate = OPEN
    renorm: bool = False
    source: str = ""  # the digest of the vector, by which encoders are known


class Encoding(NamedTuple):
    """An encoder that an instruction of a program needs."""

    instruction: int
    source: str
    weight: Tensor  # (features, width)
    bias: Tensor  # (features,)


@dataclass(frozen=True)
class Reading:
    """A probe read before a hook point's edits: the request's condition of that index gets direction . x + bias."""

    direction: Tensor  # (width,)
    bias: float
    condition_index: int
    is_latched: bool
    is_cosine: bool


@dataclass
class Program:
    """Instructions whose operands are lines, not yet placed in a pool.

    `operands[i]` holds for every instruction its five integers; a Line stands for where that will be.
    """

    codes: list[int] = field(default_factory=list)
    operands: list[list[int | Line]] = field(default_factory=list)
    numbers: list[list[float]] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)

    def add(self, code: Opcode, operands: Sequence[int | Line] = (), numbers: Sequence[float] = ()) -> None:
        self.codes.append(int(code))
        self.operands.append([*operands, *[0] * (5 - len(operands))])
        self.numbers.append([*numbers, *[0.0] * (6 - len(numbers))])

    @property
    def lines(self) -> Iterator[Line]:
        return (operand for operands in self.operands for operand in operands if isinstance(operand, Line))


def lines_of(programs: Mapping[HookPoint, Program]) -> dict[str, list[Line]]:
    """The lines that the programs of a row take, by pool, each once."""
    found: dict[str, dict[Line, None]] = {}
    for point, program in programs.items():
        found.setdefault(pool_of(point.site), {}).update(dict.fromkeys(program.lines))
    return {pool: list(lines) for pool, lines in found.items() if lines}


def assemble(
    readings: Iterable[Reading], steps: Sequence[Step], is_kept: bool = False, is_kept_first: bool = False
) -> Program:
    """The program of one row at one hook point; empty when nothing happens there.

    Args:
        is_kept: whether what the edits leave is kept.
        is_kept_first: whether what is there before them is.
    """
    program = Program()
    if is_kept_first:
        program.add(Opcode.KEEP)
    for reading in readings:
        flags = [reading.condition_index, int(reading.is_latched), int(reading.is_cosine)]
        program.add(Opcode.PROBE, [Line.own(reading.direction), *flags], [0, 0, 0, 0, reading.bias])
    gate = OPEN
    for (wanted, renorm), together in _stages(steps):
        if wanted != gate:
            _emit_gate(program, wanted)
            gate = wanted
        if renorm:
            program.add(Opcode.SAVE)
        sources = {id(op): step.source for step in together for op in step.ops}
        for op in merged([op for step in together for op in step.ops], is_partial=wanted.is_partial):
            _emit(program, op, sources.get(id(op), ""))
        if renorm:
            program.add(Opcode.RENORM)
    if is_kept:
        program.add(Opcode.KEEP)
    if program.codes:
        program.add(Opcode.END)
    return program


def meter() -> Program:
    """Measure the row and leave it alone."""
    program = Program()
    program.add(Opcode.METER)
    program.add(Opcode.END)
    return program


def _stages(steps: Sequence[Step]) -> Iterator[tuple[tuple[Gate, bool], list[Step]]]:
    """Runs of steps that share a gate; a step that keeps the norm stands alone."""
    found = [step for step in steps if step.ops]
    keyed = groupby(enumerate(found), key=lambda pair: (pair[1].gate, pair[0] if pair[1].renorm else -1))
    for (gate, alone), pairs in keyed:
        yield (gate, alone >= 0), [step for _, step in pairs]


def merged(ops: Sequence[EditOp], is_partial: bool) -> Iterator[EditOp]:
    """Neighbouring diagonal edits as one. Half of one edit after half of another is not half of both, unless both
    only add."""
    pending: Diagonal | None = None
    for op in ops:
        if isinstance(op, Diagonal):
            if pending is None:
                pending = op
                continue
            if not is_partial or (pending.mul is None and op.mul is None):
                pending = _composed(pending, op)
                continue
        if pending is not None:
            yield pending
        pending = op if isinstance(op, Diagonal) else None
        if pending is None:
            yield op
    if pending is not None:
        yield pending


def _composed(first: Diagonal, then: Diagonal) -> Diagonal:
    """x * m1 + a1, then x * m2 + a2:  x * (m1 m2) + (a1 m2 + a2)."""
    mul = then.mul if first.mul is None else first.mul if then.mul is None else first.mul * then.mul
    carried = first.add if first.add is None or then.mul is None else first.add * then.mul
    add = then.add if carried is None else carried if then.add is None else carried + then.add
    return Diagonal(mul, add)


def _emit_gate(program: Program, gate: Gate) -> None:
    program.add(Opcode.GAIN, [gate.schedule_index], [1.0])
    if gate.condition_index >= 0:
        program.add(Opcode.WHEN, [gate.condition_index, int(gate.is_latched)], [gate.on, gate.off, float(gate.sign)])
    if gate.ramp is not None:
        condition_index, *numbers = gate.ramp
        program.add(Opcode.RAMP, [condition_index], numbers)


def _emit(program: Program, op: EditOp, source: str) -> None:
    if isinstance(op, Diagonal):
        program.add(Opcode.DIAG, [-1 if row is None else Line.own(row) for row in (op.mul, op.add)])
    elif isinstance(op, Cross):
        program.add(Opcode.CROSS, [Line.own(op.mul), Line.own(op.cross), op.stride])
    else:
        _emit_directions(program, op, source)


def _emit_directions(program: Program, op: Directions, source: str) -> None:
    if op.norm != "none":
        program.add(Opcode.NORM_IN, [PER_TOKEN_NORMS.index(op.norm)])
    if op.top_k is not None:
        program.encodings.append(Encoding(len(program.codes), source, op.top_k.encoder, op.top_k.bias))
        program.add(Opcode.TOP_K, [0, len(op.top_k.encoder), op.top_k.k])
    args = op.args.tolist()
    if op.replacement is not None:
        program.add(Opcode.APART)
    biases = [0.0] * len(op.phi) if op.bias is None else op.bias.tolist()
    for index, phi in enumerate(op.phi):
        read = -1 if op.read is None else Line.shared(op.read[index])
        starts = int(index % MAX_GROUP == 0)
        program.add(Opcode.DIR, [read, Line.shared(op.write[index]), int(phi), starts], [*args[index], biases[index]])
    if op.replacement is not None:
        bias = -1 if op.replacement.bias is None else Line.shared(op.replacement.bias)
        program.add(Opcode.TAKE, [bias], [op.replacement.scale])
    if op.norm != "none":
        program.add(Opcode.NORM_IN, [0])
