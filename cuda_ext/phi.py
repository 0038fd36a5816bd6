"""What an edit does with its readings of a row; the numbers are those of csrc/phi.cuh."""

from enum import IntEnum


class Phi(IntEnum):
    """z is what a direction reads, (z, w) what a pair at an even direction reads; a, b, c, d are its arguments."""

    OFF = 0  # 0: the direction is padding
    AFFINE = 1  # a z + b
    SET = 2  # a - z
    CLAMP = 3  # min(max(z, a), b) - z
    GATED = 4  # b z + c where z > a, else d: ReLU and JumpReLU features
    TANH = 5  # a tanh z
    SILU = 6  # a z / (1 + e^-z)
    SIGN = 7  # a sign z
    ANGLE = 8  # pair: turned to angle a in its plane, where z > b; the length is kept
    ROTATE = 9  # pair: turned by angle a
    TOP_K = 10  # GATED, but in `run_edits_` only where z is also among the largest readings, which Op.TOP_K finds
