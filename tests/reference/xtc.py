"""Exclude top choices for one row, as llama.cpp walks the sorted list."""

from collections.abc import Sequence

from reference.plain import only, softmax


def rewrite(row: Sequence[float], probability: float, threshold: float, uniform: float) -> list[float]:
    if probability <= 0 or threshold > 0.5 or uniform > probability:
        return list(row)
    chances = softmax(row)
    order = sorted(range(len(row)), key=lambda v: -row[v])
    last = 0
    for place, v in enumerate(order):
        if chances[v] < threshold:
            break
        last = place
    return only(row, set(range(len(row))) - set(order[:last]))
