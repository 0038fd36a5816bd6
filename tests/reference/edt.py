"""EDT's temperature for one row."""

from collections.abc import Sequence

from reference.plain import entropy


def temperature(row: Sequence[float], t0: float, theta: float, n: float) -> float:
    if theta == 0:
        return t0
    nats = entropy(row)
    found = t0 * n ** (theta / nats) if nats > 0 else (t0 if n == 1 else 0.0)
    return found if found >= 1e-4 else 0.0
