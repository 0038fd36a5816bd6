"""Eta sampling for one row."""

import math
from collections.abc import Sequence

from reference.plain import best_of, entropy, only, softmax


def rewrite(row: Sequence[float], epsilon: float) -> list[float]:
    least = min(epsilon, math.sqrt(epsilon) * math.exp(-entropy(row)))
    return only(row, {v for v, p in enumerate(softmax(row)) if p >= least} | {best_of(row)})
