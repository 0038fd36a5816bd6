"""DExperts for one row."""

from collections.abc import Sequence

from reference.plain import BANNED, softmax


def rewrite(
    base: Sequence[float],
    expert: Sequence[float] | None,
    antiexpert: Sequence[float] | None,
    alpha: float,
    top_p: float,
) -> list[float]:
    expert, antiexpert = expert or base, antiexpert or base
    kept = top(base, top_p)
    return [
        base[v] + alpha * (expert[v] - antiexpert[v]) if v in kept and base[v] > BANNED else BANNED
        for v in range(len(base))
    ]


def top(row: Sequence[float], p: float) -> set[int]:
    chances, mass, kept = softmax(row), 0.0, set()
    for v in sorted(range(len(row)), key=lambda v: -row[v]):
        if mass > p:
            break
        kept.add(v)
        mass += chances[v]
    return kept
