"""Co-LLM for one row."""

import math
from collections.abc import Sequence

from reference.plain import BANNED, sigmoid, softmax


def threshold(step: int, end: float, warmup: str, steps: int) -> float:
    share = min(step / steps, 1.0)
    return {
        "none": lambda: end,
        "linear": lambda: (1 - share) + share * end,
        "cosine": lambda: end + (1 - end) * (1 + math.cos(math.pi * share)) / 2,
        "exponential": lambda: end if share == 1 else end**share,
    }[warmup]()


def rewrite(
    base: Sequence[float],
    assistant: Sequence[float],
    hidden: Sequence[float],
    weight: Sequence[float],
    bias: float,
    limit: float,
    strategy: str,
) -> list[float]:
    chance = sigmoid(sum(h * w for h, w in zip(hidden, weight, strict=True)) + bias)
    if chance <= limit:
        return list(base)
    if strategy == "compose":
        pairs = zip(softmax(base), softmax(assistant), strict=True)
        assistant = [math.log((1 - chance) * p + chance * q) for p, q in pairs]
    return [BANNED if b == BANNED else a for b, a in zip(base, assistant, strict=True)]
