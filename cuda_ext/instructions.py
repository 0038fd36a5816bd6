"""The instructions of `run_edits_`'s programs, told once.

The operator's docstring, the check of programs in `interpreter` and csrc/instructions.h, which
`python -m whipstaff.cuda_ext.header` writes, follow from the two enumerations here. A new instruction is a member of
`Opcode` and a step of the same name in each machine: interpreter.py, csrc/run_edits.cpp and csrc/run_edits.cuh.
"""

import textwrap
from enum import IntEnum
from typing import NamedTuple, Self

MAX_GROUP = 64  # directions that read the same h


class Instruction(NamedTuple):
    """One row of `code` and of `args`."""

    op: int
    i0: int
    i1: int
    i2: int
    i3: int
    i4: int
    a: float
    b: float
    c: float
    d: float
    bias: float
    e: float


NUM_OPERANDS = 5  # i0 to i4
NUM_PHI_ARGS = 4  # a to d


class Operand(IntEnum):
    """What one of i0 to i4 names, how a refusal calls it, and the lowest that it may be."""

    title: str
    lowest: int

    def __new__(cls, title: str = "", lowest: int = 0) -> Self:
        member = int.__new__(cls, len(cls.__members__))
        member._value_, member.title, member.lowest = len(cls.__members__), title, lowest
        return member

    NUMBER = ()  # names nothing
    GAIN = "gains column", -1
    CONDITION = "condition", 0
    LINE = "line", 0
    MAYBE_LINE = "line", -1
    PHI = "phi", 0
    STRIDE = "stride", 1  # pairs the columns
    FEATURE = "encoder row", 0
    NUM_FEATURES = "encoder row", 0  # how many, beginning with the row that the operand before it names


class Opcode(IntEnum):
    """[op, i0, i1, i2, i3, i4] in `code` with [a, b, c, d, bias, e] in `args`.

    A member is told by its effect, what its integers name, about how many passes over the row it makes (beside one for
    each of its features), and the argument of `run_edits_` without which it is a mistake.
    """

    effect: str
    operands: tuple[Operand, ...]
    passes: int
    needs: str

    def __new__(cls, effect: str, operands: tuple[Operand, ...] = (), passes: int = 0, needs: str = "") -> Self:
        member = int.__new__(cls, len(cls.__members__))
        member._value_, member.effect, member.operands = len(cls.__members__), effect, operands
        member.passes, member.needs = passes, needs
        return member

    END = "stop; so does leaving the code, or running more instructions than it has"
    JUMP = "go on at code[i0]", (Operand.NUMBER,)
    GAIN = "g <- a * gains[t, i0], or a where i0 = -1", (Operand.GAIN,)
    WHEN = (
        "g <- g * state, j = i0. i1 = 1: c * H[0] > a. Else hysteresis: c * H[q] above a is on, at most b or NaN is "
        "off, and between the two the state at q - 1 holds (before 0: off)",
        (Operand.CONDITION, Operand.NUMBER),
    )
    RAMP = (
        "g <- g * (c + (d - c) * clamp((H[q] - a) / (b - a), 0, 1)), j = i0; NaN counts as c",
        (Operand.CONDITION,),
    )
    DIAG = (
        "h <- h + g * (h * L[i0] + L[i1] - h);  an index of -1: ones, zeros",
        (Operand.MAYBE_LINE, Operand.MAYBE_LINE),
        1,
    )
    CROSS = (
        "h[i] <- h[i] + g * (L[i0, i] * h[i] + L[i1, i] * h[i ^ i2] - h[i]);  i2 is a power of two",
        (Operand.LINE, Operand.LINE, Operand.STRIDE),
        2,
    )
    DIR = (
        "z = (L[i0] . h - mean * e) * u_in + bias;  h <- h + g * u_out * phi(z) * L[i1], phi = i2 with a..d. "
        "i0 = -1: z = bias; i1 = -1: nothing is written. Neighbouring DIRs, also with a JUMP between, up to one with "
        "i3 = 1 and at most "
        f"{MAX_GROUP}, read the same h; the halves of a pair lie at an even offset among them and the next",
        (Operand.MAYBE_LINE, Operand.MAYBE_LINE, Operand.PHI, Operand.NUMBER),
        2,
    )
    SAVE = "saved <- |h|", (), 2
    RENORM = "h <- h * saved / |h|, where the program has changed h and |h| > 0", (), 2
    PROBE = (
        "H[q] <- L[i0] . h + bias, j = i1;  i2 = 1: into H[0];  i3 = 1: L[i0] . h / |h| + bias",
        (Operand.LINE, Operand.CONDITION, Operand.NUMBER, Operand.NUMBER),
        2,
    )
    METER = "meter += [|h|, 1]", (), 2
    TOP_K = (
        "tau <- the i2-th largest encoder[r] . h * u_in + encoder_bias[r] of the i1 rows from i0 on",
        (Operand.FEATURE, Operand.NUM_FEATURES, Operand.NUMBER),
        0,
        "encoder",
    )
    NORM_IN = (
        "i0 = 0: u_in, u_out, mean <- 1, 1, 0;  1: sqrt(W) / |h|, |h| / sqrt(W), 0;  "
        "2: 1 / (std(h) + 1e-5), std(h), mean(h), with the unbiased std",
        (Operand.NUMBER,),
        2,
    )
    KEEP = "kept[t] <- h", (), 2, "kept"
    APART = (
        "r <- 0. From here on what DIRs write goes into r, as if g were 1, and not into h: any number of them read the "
        "same h",
        (),
        1,
    )
    TAKE = (
        "h <- h + g * a * (r + u_out * L[i0] + mean - h);  i0 = -1: zeros. From here on DIRs write into h again",
        (Operand.MAYBE_LINE,),
        2,
    )


class Phi(IntEnum):
    """What a direction does with what it reads: z, or (z, w) of a pair at an even direction; a to d are its arguments.

    The result is what is added along the direction's writing line.
    """

    formula: str
    is_pair: bool

    def __new__(cls, formula: str, is_pair: bool = False) -> Self:
        member = int.__new__(cls, len(cls.__members__))
        member._value_, member.formula, member.is_pair = len(cls.__members__), formula, is_pair
        return member

    OFF = "0: the direction is padding"
    AFFINE = "a z + b"
    SET = "a - z"
    CLAMP = "min(max(z, a), b) - z"
    GATED = "b z + c where z > a, else d: ReLU and JumpReLU features"
    TANH = "a tanh z"
    SILU = "a z / (1 + e^-z)"
    SIGN = "a sign z"
    ANGLE = "pair: turned to angle a in its plane, where z > b; the length is kept", True
    ROTATE = "pair: turned by angle a", True
    TOP_K = "as GATED, but only where also z >= tau, which the instruction TOP_K finds"


def described(indent: int, width: int = 120) -> str:
    """Every instruction and its effect, for a docstring."""
    margin = " " * indent
    return "\n".join(
        textwrap.fill(op.effect, width, initial_indent=f"{margin}{op.name:10}", subsequent_indent=margin + " " * 10)
        for op in Opcode
    )
