"""Directions from two classes of texts: mean differences, components of pairs, and probes.

Every direction is judged on rows that it was not made from, beside what shuffled labels and a random direction give
there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import directions as found_in
from whipstaff.steering.fit.data import BadData, Item, Split
from whipstaff.steering.fit.directions import Floats, Ints, Separation, separation
from whipstaff.steering.fit.job import MIN_PER_CLASS, Axis, Fitted, Job, chosen_layers, depths, points_of
from whipstaff.steering.fit.planes import candidate, plane
from whipstaff.steering.fit.render import Rendered, read_at
from whipstaff.steering.fit.rows import Rows
from whipstaff.steering.fit.source import Asked
from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import Site

KINDS = ("pairs", "labelled", "classes")


@dataclass(frozen=True)
class Shown:
    """A text of one class."""

    rendered: Rendered
    label: int  # 1: shows it
    pair: int  # texts of one pair share it; -1: of none


@dataclass(frozen=True)
class Table:
    """The rows of all texts, and which are to learn from."""

    rows: Rows
    labels: Ints
    pairs: Ints
    is_train: NDArray[np.bool_]
    is_dev: NDArray[np.bool_]

    def train(self, point: HookPoint, position: int = 0) -> tuple[Floats, Ints]:
        return self.rows.at(point, position)[self.is_train], self.labels[self.is_train]

    def dev(self, point: HookPoint, position: int = 0) -> tuple[Floats, Ints]:
        return self.rows.at(point, position)[self.is_dev], self.labels[self.is_dev]


def texts_of(job: Job, item: Item, pair: int = -1, is_first: bool = False) -> list[Shown]:
    """The texts of one row of data, rendered."""
    row, template = item.row, job.template
    try:
        if job.data.kind == "pairs":
            whole = row.prompt is None and template.form == "chat"  # two prompts of a user
            sides = ((row.positive, 1), (row.negative, 0))
            if whole:
                return [Shown(template.render(text), label, pair) for text, label in sides]
            return [Shown(template.render(row.prompt, text), label, pair) for text, label in sides]
        if job.data.kind == "labelled":
            prompt = row.text if row.prompt is None else row.prompt
            if row.text is not None and template.form != "chat":
                return [Shown(template.render(None, row.text), row.label, -1)]
            return [Shown(template.render(prompt, row.response), row.label, -1)]
        return [Shown(template.render(row.prompt), int(row.class_ == first_class(job)), -1)]
    except SteeringError as error:
        raise BadData(str(error), item.place, param=error.param) from error


def first_class(job: Job) -> str:
    """Which class is meant: that of the first row. Raises: SteeringError unless there are two."""
    names = list(dict.fromkeys(item.row.class_ for item in job.data.items))
    if len(names) != 2:
        raise SteeringError(f"{', '.join(job.data.names)}: wanted two classes, and there are {len(names)}: {names[:5]}")
    return str(names[0])


def example(job: Job, item: Item) -> list[tuple[Rendered, str]]:
    read = job.options.read or "last"
    return [(shown.rendered, read) for shown in texts_of(job, item)]


def table(job: Job, points: Sequence[HookPoint], read: str, positions: int = 0) -> Table:
    """Read the training and the dev split at some places.

    Args:
        positions: the last so many tokens instead of the one that `read` names; 0: that one.
    """
    texts: list[Shown] = []
    asked: list[Asked] = []
    is_train: list[bool] = []
    for split in ("train", "dev"):
        for item in job.splits[split]:
            for shown in texts_of(job, item, pair=len(asked)):
                one = read_at(shown.rendered, read, item)
                if positions:
                    num = len(one.ids)
                    if num < positions:
                        raise BadData(f"{num} tokens, and {positions} are read", item.place)
                    one = Asked(one.ids, tuple(range(num - positions, num)))
                texts.append(shown)
                asked.append(one)
                is_train.append(split == "train")
                for said in job.template.warnings(shown.rendered):
                    job.warn(f"{item.place}: {said}")
    labels, train = np.array([text.label for text in texts]), np.array(is_train, dtype=bool)
    _check_counts(job, labels, train)
    rows = Rows(job.folder, job.source, asked, points, job.goes_on).collect(job.progress)
    return Table(rows, labels, np.array([text.pair for text in texts]), train, ~train)


def _check_counts(job: Job, labels: Ints, is_train: NDArray[np.bool_]) -> None:
    counts = [int(((labels == value) & is_train).sum()) for value in (1, 0)]
    if not all(counts):
        raise SteeringError(
            f"{', '.join(job.data.names)}: the training split has {counts[0]} texts of one class and "
            f"{counts[1]} of the other"
        )
    if min(counts) < MIN_PER_CLASS:
        job.warn(
            f"only {min(counts)} texts of a class to learn from: below {MIN_PER_CLASS} a direction is mostly noise"
        )
    if not (~is_train).any():
        job.warn("no dev split: nothing says how good this is; give more rows, or rows with a split")


def direction(table: Table, point: HookPoint, aggregate: str, seed: int, labels: Ints | None = None) -> Floats:
    """(width,) float64 from the training rows; as long as the difference of the classes' means along it.

    Args:
        labels: of the training rows, instead of their own.
    """
    rows, own = table.train(point)
    labels = own if labels is None else labels
    difference = found_in.mean_difference(rows, labels)
    if aggregate == "mean":
        return difference
    if aggregate == "logistic":
        unit = _unit(found_in.logistic(rows, labels, seed)[0])
    else:
        unit = _of_pairs(rows, labels, table.pairs[table.is_train], aggregate, seed)
    return unit * abs(float(difference @ unit))


def _of_pairs(rows: Floats, labels: Ints, pairs: Ints, aggregate: str, seed: int) -> Floats:
    if (pairs < 0).any():
        raise SteeringError(
            "components are of pairs: give data with positive and negative, or --aggregate mean", "aggregate"
        )
    order = np.argsort(pairs, kind="stable")
    first, second = order[::2], order[1::2]
    is_positive = labels[first] == 1
    positive, negative = np.where(is_positive, first, second), np.where(is_positive, second, first)
    if aggregate == "pca":
        return found_in.pair_centred(rows[positive], rows[negative])
    turned = np.random.RandomState(seed).rand(len(first)) < 0.5  # the order within pairs is mixed: see `lat`
    a, b = np.where(turned, positive, negative), np.where(turned, negative, positive)
    component, sign = found_in.lat(rows[a], rows[b], turned)
    return component * sign


def _unit(vector: Floats) -> Floats:
    return vector / max(float(np.linalg.norm(vector)), 1e-300)


@dataclass(frozen=True)
class Judged:
    """A direction and what speaks for it."""

    point: HookPoint
    direction: Floats
    dev: Separation
    pairs: float  # share of the dev split's pairs whose positive lies farther along; NaN without pairs
    shuffled: float  # AUC of a direction made with shuffled labels
    random: float  # AUC of a random direction
    halves: float  # cosine of the directions of two halves of the training texts
    dose: float  # its length beside the mean length of the rows

    def line(self) -> str:
        return (
            f"  {self.point.site}.{self.point.layer:<4} {self.dev.auc:>6.3f} {self.dev.distance:>8.2f} "
            f"{self.pairs:>6.2f} {self.halves:>8.3f} {self.dose:>8.3f}   {self.shuffled:.3f}  {self.random:.3f}"
        )


HEADINGS = "  place           AUC  distance  pairs   halves     dose   AUC with shuffled labels, in a random direction"


def judged(job: Job, table: Table, point: HookPoint, aggregate: str) -> Judged:
    """The direction at a place."""
    seed = job.options.seed
    draws = np.random.RandomState(seed)
    found = direction(table, point, aggregate, seed)
    rows, labels = table.train(point)
    dev, dev_labels = table.dev(point)
    shuffled = found_in.mean_difference(rows, _shuffled(labels, table.pairs[table.is_train], draws))
    random = draws.standard_normal(len(found))
    halves = _halves(rows, labels, table.pairs[table.is_train])
    length = float(np.linalg.norm(rows.astype(np.float64), axis=1).mean())
    aucs = [separation(dev @ each, dev_labels).auc for each in (shuffled, random)]
    dose = float(np.linalg.norm(found)) / max(length, 1e-30)
    ahead, distance = _by_pairs(dev @ found, dev_labels, table.pairs[table.is_dev])
    whole = separation(dev @ found, dev_labels)
    whole = whole if ahead != ahead else whole._replace(distance=distance)
    return Judged(point, found, whole, ahead, aucs[0], aucs[1], halves, dose)


def _by_pairs(scores: Floats, labels: Ints, pairs: Ints) -> tuple[float, float]:
    """(share of pairs whose positive is ahead, mean lead in standard deviations of leads); NaN without pairs."""
    if not len(pairs) or (pairs < 0).any():
        return float("nan"), float("nan")
    order = np.argsort(pairs, kind="stable")
    first, second = order[::2], order[1::2]
    leads = np.where(labels[first] == 1, 1.0, -1.0) * (scores[first].astype(np.float64) - scores[second])
    return float((leads > 0).mean()), float(leads.mean() / max(float(leads.std()), 1e-30))


def _shuffled(labels: Ints, pairs: Ints, draws: np.random.RandomState) -> Ints:
    """Labels that say nothing: swapped within pairs by a coin, or dealt anew."""
    if (pairs < 0).any():
        return draws.permutation(labels)
    swaps = {pair: draws.rand() < 0.5 for pair in np.unique(pairs)}
    return np.array([1 - label if swaps[pair] else label for label, pair in zip(labels, pairs, strict=True)])


def _halves(rows: Floats, labels: Ints, pairs: Ints) -> float:
    """The cosine between the mean differences of every second text (or pair) and of the others."""
    order = np.cumsum(labels == labels[0]) if (pairs < 0).any() else np.searchsorted(np.unique(pairs), pairs)
    halves = [order % 2 == side for side in (0, 1)]
    if any(len(np.unique(labels[half])) < 2 for half in halves):
        return float("nan")
    a, b = (found_in.mean_difference(rows[half], labels[half]) for half in halves)
    return found_in.cosine(a, b)


def best_of(candidates: Sequence[Judged], num_layers: int) -> Judged:
    """Where the classes lie farthest apart on the dev split, between a fifth and four fifths of the depth: what comes
    earlier reads words, and later edits have few layers left to act through."""
    middle = [one for one in candidates if one.point.layer in depths(num_layers, 20, 80)] or list(candidates)
    return max(middle, key=lambda one: one.dev.distance if one.dev.distance == one.dev.distance else 0.0)


def score_of(one: Judged, words: float | None, table: Table) -> dict[str, Any]:
    """What a file's provenance says."""
    numbers = {
        "auc": one.dev.auc,
        "distance": one.dev.distance,
        "pairs_ahead": one.pairs,
        "auc_shuffled_labels": one.shuffled,
        "auc_random_direction": one.random,
        "cosine_of_halves": one.halves,
        "relative_dose": one.dose,
        "auc_words_alone": float("nan") if words is None else words,
    }
    counts = {"train_texts": int(table.is_train.sum()), "dev_texts": int(table.is_dev.sum())}
    rounded = {key: None if value != value else round(value, 4) for key, value in numbers.items()}
    return {"at": f"{one.point.site}.{one.point.layer}", **rounded, **counts}


def words_alone(job: Job, splits: Sequence[Split] = ("train", "dev")) -> float | None:
    """The AUC of a bag of words."""
    sides: list[tuple[list[str], Ints]] = []
    for split in splits:
        shown = [one for item in job.splits[split] for one in texts_of(job, item)]
        sides.append(([one.rendered.text for one in shown], np.array([one.label for one in shown])))
    if not all(len(set(labels.tolist())) == 2 for _, labels in sides):
        return None
    return found_in.words_auc(*sides[0], *sides[1])


# ---- recipes


def added(job: Job, site: Site, read: str, aggregate: str, default: str | None) -> Fitted:
    """A vector per layer that is added.

    Args:
        default: the layers where a user names none; None: the best one.
    """
    aggregate = job.options.aggregate or aggregate
    named = job.options.layers or default
    layers = chosen_layers(named, job.num_layers) if named else list(range(job.num_layers))
    read = job.options.read or read
    rows = table(job, points_of(site, layers), read)
    found = _all_judged(job, rows, points_of(site, layers), aggregate)
    kept = found if named else [best_of(found, job.num_layers)]
    strongest = best_of(kept, job.num_layers)
    job.say(f"kept {', '.join(f'{one.point.site}.{one.point.layer}' for one in kept)}")
    tensors = {f"{one.point.site}.{one.point.layer}.add": _tensor(_sized(job, one.direction)) for one in kept}
    score = score_of(strongest, words_alone(job), rows) | {"aggregate": aggregate}
    return Fitted(tensors, score, job.options.scale, axis=axis_of(rows, strongest.point, strongest.direction, read))


def axis_of(table: Table, point: HookPoint, direction: Floats, read: str, position: int = 0) -> Axis:
    """Along a direction, with a threshold between the classes' means of the training rows."""
    rows, labels = table.train(point, position)
    along = rows.astype(np.float64) @ direction
    return Axis({point: direction}, read, float(along[labels == 1].mean() + along[labels == 0].mean()) / 2)


def _all_judged(job: Job, rows: Table, points: Sequence[HookPoint], aggregate: str) -> list[Judged]:
    job.say(HEADINGS)
    found = []
    for index, point in enumerate(points):
        found.append(judged(job, rows, point, aggregate))
        job.say(found[-1].line())
        job.progress("fitting", index + 1, len(points))
    return found


def _sized(job: Job, vector: Floats) -> Floats:
    return _unit(vector) if job.options.unit else vector


def _tensor(numbers: Any) -> Tensor:
    return torch.tensor(np.asarray(numbers), dtype=torch.float32)


def caa(job: Job) -> Fitted:
    return added(job, "resid_post", "answer" if _has_letters(job) else "last", "mean", None)


def _has_letters(job: Job) -> bool:
    """Whether the answers are letters in brackets, as CAA's own are."""
    if job.data.kind != "pairs":
        return False
    answers = [text.strip() for item in job.data.items for text in (item.row.positive, item.row.negative)]
    return all(len(text) == 3 and text[0] == "(" and text[2] == ")" for text in answers)


def shift(job: Job) -> Fitted:
    return added(job, "resid_post", "response-mean" if _has_responses(job) else "last", "mean", None)


def _has_responses(job: Job) -> bool:
    rows = [item.row for item in job.data.items]
    if job.data.kind == "pairs":
        return job.template.form != "chat" or all(row.prompt is not None for row in rows)
    return job.data.kind == "labelled" and all(row.response is not None for row in rows)


def repe(job: Job) -> Fitted:
    return added(job, "resid_post", "last", "lat", "40%-90%")


def control_vector(job: Job) -> Fitted:
    return added(job, "resid_post", "last", "pca", f"1-{job.num_layers - 1}" if job.num_layers > 1 else "all")


def actadd(job: Job) -> Fitted:
    """The states of one pair of prompts, position by position."""
    if len(job.data) != 1:
        raise SteeringError(f"actadd is of one pair, and there are {len(job.data)}")
    item = job.data.items[0]
    shown = texts_of(job, item)
    num = max(len(one.rendered.ids) for one in shown)
    pad = job.source.tokenizer.encode(" ", add_special_tokens=False)[:1]
    if not pad:
        raise SteeringError("the tokenizer has no token for a space, with which the shorter prompt is filled up")
    asked = []
    for one in shown:
        ids = one.rendered.ids + tuple(pad) * (num - len(one.rendered.ids))
        asked.append(Asked(ids, tuple(range(num))))
    layers = chosen_layers(job.options.layers or str(job.num_layers // 3), job.num_layers)
    rows = Rows(job.folder, job.source, asked, points_of("resid_pre", layers), job.goes_on).collect(job.progress)
    tensors = {}
    for layer in layers:
        whole = np.stack(
            [rows.at(HookPoint("resid_pre", layer), position) for position in range(num)], 1
        )  # (2, n, width)
        tensors[f"resid_pre.{layer}.rows"] = _tensor(whole[0] - whole[1])
    return Fitted(tensors, {"tokens": num}, job.options.scale)


def angular(job: Job) -> Fitted:
    """A plane for all places where norms give what attention and MLP receive."""
    layers = chosen_layers(job.options.layers or "all", job.num_layers)
    points = [
        HookPoint(site, layer) for layer in layers for site in ("attn_in", "mlp_in") if (site, layer) != ("attn_in", 0)
    ]
    read = job.options.read or "last"
    rows = table(job, points, read)
    found = plane(np.stack([candidate(*rows.train(point)) for point in points]))
    chosen = points[found.chosen]
    dev, labels = rows.dev(chosen)
    share = [_share_in_plane(*rows.train(point), found.first, found.second) for point in points]
    score = {
        "at": f"{chosen.site}.{chosen.layer}",
        "auc": _rounded(separation(dev @ found.first, labels).auc),
        "mean_cosine": _rounded(float(found.mean_cosine[found.chosen])),
        "share_of_difference_in_plane": _rounded(float(np.mean(share))),
        "auc_words_alone": _rounded(words_alone(job)),
    }
    tensors = {"first_direction": _tensor(found.first), "second_direction": _tensor(found.second)}
    return Fitted(tensors, score, axis=axis_of(rows, chosen, found.first, read))


def _share_in_plane(rows: Floats, labels: Ints, first: Floats, second: Floats) -> float:
    """How much of a place's mean difference lies in the plane, squared lengths."""
    difference = found_in.mean_difference(rows, labels)
    basis, _ = np.linalg.qr(np.stack([first, second]).T)
    return float(np.linalg.norm(basis.T @ difference) ** 2 / max(float(difference @ difference), 1e-300))


def _rounded(value: float | None) -> float | None:
    return None if value is None or value != value else round(value, 4)


def probe(job: Job) -> Fitted:
    """A probe of the last prompt token, for `when`: above 0 it is the first class."""
    named = job.options.layers
    layers = chosen_layers(named, job.num_layers) if named else depths(job.num_layers, 10, 80)
    points = points_of("resid_post", layers)
    rows = table(job, points, "last-prompt")
    aggregate = job.options.aggregate or "logistic"
    found = _all_judged(job, rows, points, aggregate)
    most = max((one.dev.auc for one in found), default=0.0)
    one = next((each for each in found if each.dev.auc >= most - 0.01), found[0])  # the earliest that is as good
    unit = _unit(one.direction)
    train, labels = rows.train(one.point)
    dev, dev_labels = rows.dev(one.point) if rows.is_dev.any() else (train, labels)
    threshold, f1 = best_threshold(dev @ unit, dev_labels)
    score = score_of(one, words_alone(job), rows) | {"f1": round(f1, 4), "aggregate": aggregate}
    if job.neutral is not None:
        score["fires_on_neutral"] = _fires(job, one.point, unit, threshold)
    tensors = {
        f"resid_post.{one.point.layer}.direction": _tensor(unit),
        f"resid_post.{one.point.layer}.bias": _tensor(-threshold),
    }
    job.say(f'use it as "when": {{"probe": NAME, "above": 0}}, for edits at layer {one.point.layer + 1} and later')
    axis = Axis({one.point: unit}, "last-prompt", threshold)
    return Fitted(tensors, score, description=f"above 0: {_meaning(job)}", axis=axis)


def _meaning(job: Job) -> str:
    return first_class(job) if job.data.kind == "classes" else "label 1" if job.data.kind == "labelled" else "positive"


def _fires(job: Job, point: HookPoint, unit: Floats, threshold: float) -> float:
    """On which share of neutral texts the probe reads above its threshold at the last token."""
    assert job.neutral is not None
    asked = [job.template.render(item.row.text).asked("last") for item in job.neutral.items]
    readings = [float(rows[point][0].double().numpy() @ unit) for rows in job.source.read(asked, [point])]
    return round(float(np.mean(np.array(readings) > threshold)), 4)


def best_threshold(scores: Floats, labels: Ints) -> tuple[float, float]:
    """(threshold, F1): readings above it are called 1. Midway between neighbours, the middle of equally good ones."""
    values = np.unique(scores.astype(np.float64))
    cuts = np.concatenate([[values[0] - 1], (values[1:] + values[:-1]) / 2])
    f1 = np.array([_f1(scores > cut, labels == 1) for cut in cuts])
    best = np.flatnonzero(f1 >= f1.max() - 1e-12)
    chosen = best[len(best) // 2]
    return float(cuts[chosen]), float(f1[chosen])


def _f1(said: NDArray[np.bool_], true: NDArray[np.bool_]) -> float:
    hits = int((said & true).sum())
    return 2 * hits / max(int(said.sum()) + int(true.sum()), 1)
