"""How well what was fitted tells texts apart that it was not made from: rows of the test split, which no recipe looks
at. Nothing here says what steering does to answers; `whipstaff eval` does."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from whipstaff.steering.fit.contrast import texts_of
from whipstaff.steering.fit.data import Item
from whipstaff.steering.fit.directions import Floats, Ints, separation
from whipstaff.steering.fit.job import Axis, Job
from whipstaff.steering.fit.render import Rendered, read_at

_DRAWS = 1000
_Z = 1.96  # 95 %


class Reading(NamedTuple):
    """One text of the split."""

    label: int  # 1: shows it
    row: int  # texts of one row are compared
    group: int  # rows of one group are no independent evidence


def held_out(job: Job, axis: Axis | None) -> dict[str, Any]:
    """What a file's numbers are worth on the test split, with 95 % intervals over groups: `auc`; `ahead`, the share of
    positives that lie beyond the negatives of their own row; `accuracy` at the threshold of the training rows, where
    texts are of no pair. Raises: SteeringError."""
    items = job.splits["test"]
    if axis is None:
        return {"rows": len(items), "problem": "files of this method tell no texts apart; see whipstaff eval"}
    shown = [(rendered, label, item) for item in items for rendered, label in _texts(job, item)]
    if len({label for _, label, _ in shown}) < 2:
        return {
            "rows": len(items),
            "problem": "the test split lacks a class: give more rows, or rows with a split",
        }
    groups: dict[str, int] = {}
    rows = {id(item): index for index, item in enumerate(items)}
    read = [
        Reading(label, rows[id(item)], groups.setdefault(item.row.group or item.row.own_group, len(groups)))
        for _, label, item in shown
    ]
    asked = [read_at(rendered, axis.read, item) for rendered, _, item in shown]
    scores = np.zeros(len(asked))
    for index, found in enumerate(job.source.read(asked, list(axis.parts))):
        scores[index] = sum(float(found[point][0].double().numpy() @ part) for point, part in axis.parts.items())
        job.progress("evaluating", index + 1, len(asked))
    return {"rows": len(items), "groups": len(groups)} | _said(scores, read, axis.threshold, job.options.seed)


def _texts(job: Job, item: Item) -> list[tuple[Rendered, int]]:
    if job.data.kind != "questions":
        return [(one.rendered, one.label) for one in texts_of(job, item)]
    sides = ((1, item.row.right), (0, item.row.wrong))
    return [(job.template.render(item.row.asked, answer), label) for label, answers in sides for answer in answers]


def _said(scores: Floats, read: Sequence[Reading], threshold: float | None, seed: int) -> dict[str, Any]:
    labels, rows, groups = (np.array([getattr(one, name) for one in read]) for name in Reading._fields)
    found: dict[str, Any] = {"auc": _figure(separation(scores, labels).auc, _drawn_auc(scores, labels, groups, seed))}
    ahead = [_ahead(scores[rows == row], labels[rows == row]) for row in np.unique(rows)]
    num = len(np.unique(groups))
    if all(share is not None for share in ahead):
        share = float(np.mean([one for one in ahead if one is not None]))
        found["ahead"] = _figure(share, wilson(share, num))
    elif threshold is not None:
        share = float(np.mean((scores > threshold) == (labels == 1)))
        found["accuracy"] = _figure(share, wilson(share, num))
    return found


def _figure(value: float, interval: tuple[float, float]) -> dict[str, Any]:
    return {"value": round(value, 4), "interval": [round(one, 4) for one in interval]}


def _ahead(scores: Floats, labels: Ints) -> float | None:
    """Of all (positive, negative) of a row; None where it has not both."""
    yes, no = scores[labels == 1], scores[labels == 0]
    return float((yes[:, None] > no[None]).mean()) if len(yes) and len(no) else None


def _drawn_auc(scores: Floats, labels: Ints, groups: Ints, seed: int) -> tuple[float, float]:
    """A bootstrap over groups; draws that lack a class say nothing."""
    draws, names = np.random.RandomState(seed), np.unique(groups)
    members = [np.flatnonzero(groups == name) for name in names]
    found = []
    for _ in range(_DRAWS):
        chosen = np.concatenate([members[index] for index in draws.randint(0, len(names), len(names))])
        found.append(separation(scores[chosen], labels[chosen]).auc)
    low, high = np.nanpercentile(found, [2.5, 97.5])
    return float(low), float(high)


def wilson(share: float, num: int) -> tuple[float, float]:
    """A 95 % interval of a share of `num` independent things: not of length 0 where all went well."""
    middle = (share + _Z**2 / (2 * num)) / (1 + _Z**2 / num)
    half = _Z * math.sqrt(share * (1 - share) / num + _Z**2 / (4 * num**2)) / (1 + _Z**2 / num)
    return max(middle - half, 0.0), min(middle + half, 1.0)
