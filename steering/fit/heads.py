"""Heads that tell truth from error (Li et al. 2023), that matter for a task, or that a scaling learned to want."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from whipstaff.steering.fit.directions import Floats, Ints, classifier, mean_difference

Head = tuple[int, int]  # layer, query head


class Fold(NamedTuple):
    """Questions of one fold, by index."""

    train: Ints
    val: Ints


def folds(num_questions: int, num_folds: int = 2, val_share: float = 0.2, seed: int = 42) -> list[Fold]:
    """ITI's: contiguous folds; the questions outside of one are what it is fitted on, a drawn share of them apart."""
    draws = np.random.RandomState(seed)
    parts = np.array_split(np.arange(num_questions), num_folds)
    found = []
    for held_out in range(num_folds):
        used = np.concatenate([part for index, part in enumerate(parts) if index != held_out])
        train = draws.choice(used, size=int(len(used) * (1 - val_share)), replace=False)
        found.append(Fold(train, np.array([index for index in used if index not in set(train.tolist())])))
    return found


class Probed(NamedTuple):
    """What a fold's probes found: all are (layers, heads, ...)."""

    accuracy: Floats
    weight: Floats  # (.., head_dim)
    difference: Floats  # (.., head_dim), mean of right less mean of wrong, over training and validation rows


def probe(
    rows_of: Callable[[int], NDArray[np.float32]],
    num_layers: int,
    labels: Ints,
    question_of: Ints,
    fold: Fold,
    seed: int = 42,
    progress: Callable[[int], None] = lambda layer: None,
) -> Probed:
    """A logistic regression on every head.

    Args:
        rows_of: layer -> (answers, heads, head_dim).
        labels: (answers,) 1 for right ones.
        question_of: (answers,) which question each belongs to.
    """
    is_train, is_val = (np.isin(question_of, part) for part in fold)
    found: list[list[tuple[float, Floats, Floats]]] = []
    for layer in range(num_layers):
        rows = rows_of(layer)
        found.append([])
        for head in range(rows.shape[1]):
            x = rows[:, head]
            model: Any = classifier(seed).fit(x[is_train], labels[is_train])
            accuracy = float((model.predict(x[is_val]) == labels[is_val]).mean())
            used = is_train | is_val
            found[-1].append((accuracy, model.coef_[0], mean_difference(x[used], labels[used])))
        progress(layer)
    return Probed(*(np.array([[head[part] for head in row] for row in found]) for part in range(3)))


def best(scores: Floats, num: int) -> list[Head]:
    """The (layer, head)s of highest score, best first; equal ones in the order of layers and heads."""
    order = np.argsort(-scores.flatten(), kind="stable")[:num]
    return [(int(index // scores.shape[1]), int(index % scores.shape[1])) for index in order]


def deviation(rows: Floats, direction: Floats) -> float:
    """The standard deviation (of a population) of rows along a direction brought to length 1."""
    unit = direction / max(float(np.linalg.norm(direction)), 1e-30)
    return float((rows.astype(np.float64) @ unit).std())


def by_length(scaling: Floats) -> Floats:
    """LoFiT's score of heads: (layers, heads) lengths of what they were scaled by, (layers, heads, head_dim)."""
    found: Floats = np.linalg.norm(scaling.astype(np.float64), axis=-1)
    return found


def expert_scores(counts: Floats, is_class: Sequence[bool]) -> Floats:
    """MoTE: (layers, experts) how much more often an expert is chosen in one class than in the other.

    Args:
        counts: (prompts, layers, experts) how many tokens of a prompt an expert was chosen for.
        is_class: whether each prompt is of the class.
    """
    share = counts / np.maximum(counts.sum(-1, keepdims=True), 1)
    chosen = np.array(is_class, dtype=bool)
    found: Floats = share[chosen].mean(0) - share[~chosen].mean(0)
    return found
