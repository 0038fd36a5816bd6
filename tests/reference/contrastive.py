"""Contrastive decoding for one row."""

import math
from collections.abc import Sequence

from reference.plain import BANNED, log_softmax


def rewrite(
    expert: Sequence[float], amateur: Sequence[float], alpha: float, beta: float, temperature: float
) -> list[float]:
    strong, weak = log_softmax(expert), log_softmax([x / temperature for x in amateur])
    least = max(strong) + math.log(alpha) if alpha else BANNED
    return [s - beta * w if s >= least and s > BANNED else BANNED for s, w in zip(strong, weak, strict=True)]
