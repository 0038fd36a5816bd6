"""The plane of angular steering (Vu and Nguyen 2025): which direction of many stands for all, and how they spread."""

from typing import NamedTuple

import numpy as np

from whipstaff.steering.fit.directions import Floats, Ints, first_component


class Plane(NamedTuple):
    chosen: int  # of the candidates
    first: Floats  # (width,) the candidate nearest to all
    second: (
        Floats  # (width,) where the candidates vary most, turned so that the labels' positives lie on its positive side
    )
    mean_cosine: Floats  # (candidates,)


def candidate(rows: Floats, labels: Ints) -> Floats:
    """(width,) unit: rows of both classes brought to length 1, their means too, and the difference of those."""
    unit = _unit(rows.astype(np.float64))
    return _unit(_unit(unit[labels == 1].mean(0)) - _unit(unit[labels == 0].mean(0)))


def _unit(rows: Floats) -> Floats:
    found: Floats = rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-30)
    return found


def plane(candidates: Floats) -> Plane:
    """Of (candidates, width) directions, one for every place."""
    wide = candidates.astype(np.float64)
    unit = _unit(wide)
    mean_cosine = (unit @ unit.T).mean(1)
    chosen = int(mean_cosine.argmax())
    second = first_component(wide)
    mean = wide.mean(0)
    return Plane(chosen, wide[chosen], second * (1.0 if mean @ second >= 0 else -1.0), mean_cosine)
