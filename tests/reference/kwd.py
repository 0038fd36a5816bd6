"""Knowledge weighted decoding for one row."""

import math
from collections.abc import Callable, Sequence

from reference.plain import log_softmax, only, sigmoid


def rewrite(row: Sequence[float], class_logits: Sequence[float], k: int) -> list[float]:
    best = sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]
    log_p = log_softmax(only(row, set(best)))
    return [x + math.log(sigmoid(g)) for x, g in zip(log_p, class_logits, strict=True)]


def rewrite_ahead(row: Sequence[float], judge: Callable[[int], float], k: int) -> list[float]:
    """The same where `judge` gives the probability that a text is good once a token is fed."""
    best = sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]
    log_p = log_softmax(row)
    return [log_p[v] + math.log(judge(v)) if v in best and row[v] > -math.inf else -math.inf for v in range(len(row))]
