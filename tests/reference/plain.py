"""Distributions as lists of floats: what the references of decoding methods have in common."""

import math
from collections.abc import Sequence

BANNED = -math.inf


def log_softmax(row: Sequence[float]) -> list[float]:
    best = max(row)
    total = math.log(sum(math.exp(x - best) for x in row))
    return [x - best - total for x in row]


def softmax(row: Sequence[float]) -> list[float]:
    return [math.exp(x) for x in log_softmax(row)]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def entropy(row: Sequence[float]) -> float:
    """In nats."""
    return -sum(math.exp(x) * x for x in log_softmax(row) if x > BANNED)


def best_of(row: Sequence[float]) -> int:
    """The first of the best."""
    return max(range(len(row)), key=lambda v: row[v])


def only(row: Sequence[float], kept: set[int]) -> list[float]:
    return [x if v in kept else BANNED for v, x in enumerate(row)]


def tempered(row: Sequence[float], temperature: float) -> list[float]:
    return only(row, {best_of(row)}) if temperature == 0 else [x / temperature for x in row]
