"""Directions from rows of two classes, and how well they tell them apart. Sums are float64, in the rows' order."""

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whipstaff.steering.errors import SteeringError

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Aggregate = Literal["mean", "pca", "lat", "logistic"]
AGGREGATES: tuple[Aggregate, ...] = ("mean", "pca", "lat", "logistic")


def mean_difference(rows: Floats, labels: Ints) -> Floats:
    """(width,) mean of label 1 less mean of label 0."""
    wide = rows.astype(np.float64)
    found: Floats = wide[labels == 1].mean(0) - wide[labels == 0].mean(0)
    return found


def first_component(rows: Floats) -> Floats:
    """(width,) unit: where centred rows vary most; its sign is arbitrary."""
    wide = rows.astype(np.float64)
    _, _, found = np.linalg.svd(wide - wide.mean(0), full_matrices=False)
    component: Floats = found[0]
    return component


def pair_centred(positive: Floats, negative: Floats) -> Floats:
    """(width,) unit, repeng's `pca_center`: pairs about their midpoints, turned to the positive side.

    Centring the *differences* instead, repeng's default, takes away the very shift that all pairs share.
    """
    middle = (positive.astype(np.float64) + negative) / 2
    found = first_component(np.concatenate([positive - middle, negative - middle]))
    return found * _sign_of_pairs(positive @ found, negative @ found)


def lat(first: Floats, second: Floats, first_is_positive: NDArray[np.bool_]) -> tuple[Floats, float]:
    """RepE's reader: ((width,) unit component of centred differences, its sign by the labels).

    The order within pairs has to be mixed: it is what keeps the mean of the differences, which is taken away, near 0.
    """
    found = first_component(first.astype(np.float64) - second)
    a, b = first @ found, second @ found
    positive, negative = np.where(first_is_positive, a, b), np.where(first_is_positive, b, a)
    return found, _sign_of_pairs(positive, negative)


def _sign_of_pairs(positive: Floats, negative: Floats) -> float:
    """1 where positives project higher in most pairs, -1 where they project lower."""
    return float(np.sign(np.mean(positive > negative) - np.mean(positive < negative))) or 1.0


def logistic(rows: Floats, labels: Ints, seed: int = 0) -> tuple[Floats, float]:
    """(weight (width,), intercept) of an L2 logistic regression, C = 1, at most 1,000 iterations."""
    model = classifier(seed).fit(rows, labels)
    return model.coef_[0].astype(np.float64), float(model.intercept_[0])


def classifier(seed: int) -> Any:
    """The probe of ITI's release. Raises: SteeringError without scikit-learn."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise SteeringError("probes take scikit-learn: pip install 'whipstaff[fit]'") from error
    return LogisticRegression(random_state=seed, max_iter=1000)


class Separation(NamedTuple):
    """How far a direction tells two classes apart, on rows that it was not made from."""

    auc: float  # 0.5 is chance
    distance: float  # of the classes' means, in standard deviations within a class


def separation(scores: Floats, labels: Ints) -> Separation:
    """Of one number per row. NaN where a class has no row."""
    yes, no = scores[labels == 1].astype(np.float64), scores[labels == 0].astype(np.float64)
    if not len(yes) or not len(no):
        return Separation(float("nan"), float("nan"))
    ranks = np.argsort(np.argsort(np.concatenate([yes, no]), kind="stable")) + 1.0
    both = np.concatenate([yes, no])
    for value in np.unique(both[np.isin(both, yes) & np.isin(both, no)]):  # ties between classes count half
        ranks[both == value] = ranks[both == value].mean()
    auc = (ranks[: len(yes)].sum() - len(yes) * (len(yes) + 1) / 2) / (len(yes) * len(no))
    within = np.sqrt((yes.var() * len(yes) + no.var() * len(no)) / (len(yes) + len(no)))
    return Separation(float(auc), float((yes.mean() - no.mean()) / max(within, 1e-30)))


def cosine(a: Floats, b: Floats) -> float:
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), 1e-300))


def expected_cosine(distance: float, width: int, num_per_class: int) -> float:
    """How near a mean difference comes to the truth: classes `distance` deviations apart, with so many rows."""
    return float(distance / np.sqrt(distance**2 + 2 * width / num_per_class))


def words_auc(train: list[str], train_labels: Ints, dev: list[str], dev_labels: Ints) -> float:
    """How well a bag of words tells the classes apart: near 1, the words alone predict the label."""
    from sklearn.feature_extraction.text import CountVectorizer

    counter = CountVectorizer(token_pattern=r"\S+")
    model = classifier(0).fit(counter.fit_transform(train), train_labels)
    return separation(model.decision_function(counter.transform(dev)), dev_labels).auc
