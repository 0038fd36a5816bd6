"""Locally typical sampling for one row."""

import math
from collections.abc import Sequence

from reference.plain import entropy, log_softmax, only


def rewrite(row: Sequence[float], p: float) -> list[float]:
    if p >= 1:
        return list(row)
    log_p, expected = log_softmax(row), entropy(row)
    oddness = [abs(-x - expected) for x in log_p]
    kept, mass = set(), 0.0
    for v in sorted(range(len(row)), key=lambda v: oddness[v]):
        kept.add(v)
        mass += math.exp(log_p[v])
        if mass >= p:
            break
    return only(row, kept)
