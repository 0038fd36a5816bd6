"""Mirostat 2 for one row."""

import math
from collections.abc import Sequence

from reference.plain import best_of, only, softmax


def rewrite(row: Sequence[float], mu: float) -> list[float]:
    return only(row, {v for v, p in enumerate(softmax(row)) if p > 0 and -math.log2(p) <= mu} | {best_of(row)})


def learnt(truncated: Sequence[float], token: int, mu: float, tau: float, eta: float) -> float:
    return mu - eta * (-math.log2(softmax(truncated)[token]) - tau)
