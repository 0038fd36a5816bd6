"""DoLa for one row."""

import math
from collections.abc import Sequence

from reference.plain import BANNED, best_of, log_softmax


def divergence(mature: Sequence[float], early: Sequence[float]) -> float:
    """Half of KL(m || q) + KL(m || p), over the tokens that the mature row allows."""
    total = 0.0
    for q, p in zip(log_softmax(mature), log_softmax(early), strict=True):
        m = (math.exp(q) + math.exp(p)) / 2
        if q > BANNED and m > 0:
            total += m * (math.log(m) - q) + m * (math.log(m) - p)
    return total / 2


def choice(mature: Sequence[float], layers: Sequence[Sequence[float]]) -> int:
    return best_of([divergence(mature, early) for early in layers])


def rewrite(mature: Sequence[float], early: Sequence[float], relative_top: float) -> list[float]:
    last, first = log_softmax(mature), log_softmax(early)
    least = max(last) + math.log(relative_top) if relative_top else BANNED
    return [q - p if q >= least and q > BANNED else BANNED for q, p in zip(last, first, strict=True)]
