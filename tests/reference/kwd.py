"""Knowledge weighted decoding for one row."""

import math
from collections.abc import Sequence

from reference.plain import log_softmax, only, sigmoid


def rewrite(row: Sequence[float], class_logits: Sequence[float], k: int) -> list[float]:
    best = sorted(range(len(row)), key=lambda v: (-row[v], v))[:k]
    log_p = log_softmax(only(row, set(best)))
    return [x + math.log(sigmoid(g)) for x, g in zip(log_p, class_logits, strict=True)]
