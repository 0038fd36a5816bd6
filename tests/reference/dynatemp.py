"""Dynamic temperature for one row."""

import math
from collections.abc import Sequence

from reference.plain import BANNED, entropy


def temperature(row: Sequence[float], own: float, reach: float, exponent: float) -> float:
    num = sum(x > BANNED for x in row)
    if own == 0 or reach == 0 or num <= 1:
        return own
    low, high = max(0.0, own - reach), own + reach
    return low + (high - low) * (entropy(row) / math.log(num)) ** exponent
