"""Contrastive search as the paper's formula reads: of the k likeliest tokens the one that is unlike what was said."""

import math
from collections.abc import Callable, Sequence

Vector = Sequence[float]


def choose(
    logits: Sequence[float], before: Sequence[Vector], feed: Callable[[int], Vector], k: int, alpha: float
) -> tuple[int, dict[int, float]]:
    """The next token, and the score of every token that was tried.

    Args:
        before: last hidden states of all positions so far.
        feed: the last hidden state once a token is fed.
    """
    best = sorted(range(len(logits)), key=lambda v: (-logits[v], v))[:k]
    total = math.fsum(math.exp(value - max(logits)) for value in logits)
    scores = {}
    for v in best:
        if logits[v] == -math.inf:
            continue
        hidden = feed(v)
        likeness = max(_cosine(hidden, other) for other in before)
        scores[v] = (1 - alpha) * math.exp(logits[v] - max(logits)) / total - alpha * likeness
    return max(scores, key=lambda v: scores[v]), scores


def _cosine(a: Vector, b: Vector) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))
