"""Top n sigma for one row."""

import math
from collections.abc import Sequence

from reference.plain import BANNED, only


def rewrite(row: Sequence[float], n: float) -> list[float]:
    if n <= 0:
        return list(row)
    finite = [x for x in row if x > BANNED]
    mean = sum(finite) / len(finite)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in finite) / len(finite))
    return only(row, {v for v, x in enumerate(row) if x >= max(row) - n * deviation})
