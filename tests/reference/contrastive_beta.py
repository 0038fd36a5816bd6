"""Contrastive decoding in logit space for one row."""

import math
from collections.abc import Sequence

from reference.plain import BANNED


def rewrite(expert: Sequence[float], amateur: Sequence[float], alpha: float, beta: float) -> list[float]:
    least = max(expert) + math.log(alpha) if alpha else BANNED
    pairs = zip(expert, amateur, strict=True)
    return [(1 + beta) * e - beta * a if e >= least and e > BANNED else BANNED for e, a in pairs]
