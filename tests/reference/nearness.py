"""What each of some centres counts for, by how near a feature is to it: ELREA's weights, in NumPy."""

from typing import Any

import numpy as np


def shares(feature: Any, centres: Any, top_m: int | None = None) -> Any:
    """(C,) of feature (F,) and centres (C, F)."""
    cos = np.array([feature @ centre / np.sqrt(feature @ feature) / np.sqrt(centre @ centre) for centre in centres])
    weights = np.exp((cos - cos.mean()) / cos.std())
    if top_m is not None:
        weights[np.argsort(cos)[: len(cos) - top_m]] = 0
    return weights / weights.sum()
