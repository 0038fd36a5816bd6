"""The adaptive decoder's choice for one row."""

import math
from collections.abc import Mapping, Sequence

from reference.plain import best_of, sigmoid, softmax

Matrix = Sequence[Sequence[float]]


def layer(x: Sequence[float], weight: Matrix, bias: Sequence[float]) -> list[float]:
    return [math.fsum(w * h for w, h in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def chances(hidden: Sequence[float], head: Mapping[str, list]) -> list[float]:  # type: ignore[type-arg]
    x = list(hidden)
    for k in range(2):
        x = [z * sigmoid(z) for z in layer(x, head[f"w{k}"], head[f"b{k}"])]
    return softmax(layer(x, head["w2"], head["b2"]))


def chosen(pi: Sequence[float], uniform: float | None) -> int:
    """The likeliest one, or with a number the one where the running sum passes it."""
    if uniform is None:
        return best_of(pi)
    total = 0.0
    for index, chance in enumerate(pi):
        total += chance
        if uniform < total:
            return index
    return len(pi) - 1
