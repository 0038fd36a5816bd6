"""vLLM's truncation for one row: min-p, then top-k, then top-p."""

from collections.abc import Sequence

from reference.plain import BANNED, only, softmax


def truncate(row: Sequence[float], top_k: int, top_p: float, min_p: float) -> list[float]:
    chances = softmax(row)
    row = only(row, {v for v, p in enumerate(chances) if p >= min_p * max(chances)})
    if top_k:
        least = sorted(row, reverse=True)[min(top_k, len(row)) - 1]
        row = only(row, {v for v, x in enumerate(row) if x >= least})
    if top_p < 1:
        chances, mass = softmax(row), 0.0
        for v in sorted((v for v in range(len(row)) if row[v] > BANNED), key=lambda v: row[v])[:-1]:
            mass += chances[v]
            if mass > 1 - top_p:
                break
            row[v] = BANNED
    return list(row)
