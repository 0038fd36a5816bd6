"""An ensemble of experts for one row."""

from collections.abc import Sequence


def rewrite(
    base: Sequence[float], experts: Sequence[Sequence[float]], weights: Sequence[float], base_weight: float
) -> list[float]:
    found = []
    for v in range(len(base)):
        ensemble = sum(w * expert[v] for w, expert in zip(weights, experts, strict=True)) / sum(weights)
        found.append(base_weight * base[v] + (1 - base_weight) * ensemble)
    return found
