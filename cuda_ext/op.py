"""The instructions of `run_edits_`'s programs; the numbers are those of csrc/run_edits.cuh."""

from enum import IntEnum


class Op(IntEnum):
    """[op, i0, i1, i2, i3, i4] in `code` with [a, b, c, d, bias, e] in `args`; `run_edits_` says what each does."""

    END = 0
    JUMP = 1  # i0 code index
    GAIN = 2  # i0 gains column or -1; a
    WHEN = 3  # i0 condition, i1 latched; a on, b off, c sign
    RAMP = 4  # i0 condition; a, b from and to, c, d the gain there
    DIAG = 5  # i0 mul line or -1, i1 add line or -1
    CROSS = 6  # i0 mul line, i1 cross line, i2 stride
    DIR = 7  # i0 read line or -1, i1 write line or -1, i2 phi, i3 starts a group; a, b, c, d of the phi, bias, e
    SAVE = 8
    RENORM = 9
    PROBE = 10  # i0 read line, i1 condition, i2 latched, i3 cosine; bias
    METER = 11
    TOP_K = 12  # i0 first encoder row, i1 how many, i2 k
    NORM_IN = 13  # i0: 0 as is, 1 constant norm, 2 layer norm
    KEEP = 14
