"""ITI: which heads tell right answers from wrong ones, in which direction, and how far they spread along it."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import heads
from whipstaff.steering.fit.data import BadData, Item
from whipstaff.steering.fit.directions import Ints, cosine, mean_difference, separation
from whipstaff.steering.fit.job import Axis, Fitted, Job, chosen_layers, points_of
from whipstaff.steering.fit.render import Rendered, read_at
from whipstaff.steering.fit.rows import Rows
from whipstaff.steering.fit.source import Asked

MIN_QUESTIONS = 16


def example(job: Job, item: Item) -> list[tuple[Rendered, str]]:
    return [(job.template.render(item.row.asked, answer), "last") for answer in (item.row.right[0], item.row.wrong[0])]


def iti(job: Job) -> Fitted:
    """Heads ranked by their mean validation accuracy over folds of the training questions; directions from all."""
    layers = chosen_layers(job.options.layers or "all", job.num_layers)
    asked, labels, question_of, is_train = _answers(job)
    points = points_of("attn_head", layers)
    rows = Rows(job.folder, job.source, asked, points, job.goes_on).collect(job.progress)
    shape = (job.source.shape.num_heads, job.source.shape.head_dim)

    def all_rows(index: int) -> NDArray[np.float32]:
        return rows.at(points[index]).reshape(-1, *shape)

    train_questions = np.unique(question_of[is_train])
    place = {question: index for index, question in enumerate(train_questions)}
    train_of = np.array([place[question] for question in question_of[is_train]])
    folds = heads.folds(len(train_questions), job.options.folds or 2, 0.2, job.options.seed)

    def train_rows(index: int) -> NDArray[np.float32]:
        return all_rows(index)[is_train]

    num_steps = len(folds) * len(layers)
    found = []
    for number, fold in enumerate(folds):

        def told(index: int, done: int = number * len(layers)) -> None:
            job.progress("probing", done + index + 1, num_steps)

        seed, own_labels = job.options.seed, labels[is_train]
        found.append(heads.probe(train_rows, len(layers), own_labels, train_of, fold, seed, told))
    accuracy = np.mean([each.accuracy for each in found], 0)
    chance = _chance(train_rows, len(layers), labels[is_train], train_of, folds[0], job.options.seed)
    num = min(job.options.num_heads or max(1, min(48, accuracy.size // 8)), accuracy.size)
    chosen = heads.best(accuracy, num)
    tensors, lines, dev_aucs = {}, [], []
    directions = np.zeros((len(layers), *shape))
    sigma = np.zeros((len(layers), shape[0]))
    for index, head in chosen:
        own = all_rows(index)[:, head]
        vector = mean_difference(own[is_train], labels[is_train])
        directions[index, head] = vector / np.linalg.norm(vector)
        sigma[index, head] = heads.deviation(own[is_train], vector)
        dev_aucs.append(separation(own[~is_train] @ vector, labels[~is_train]).auc)
        between = cosine(found[0].difference[index, head], found[1].difference[index, head])
        lines.append(
            f"  {layers[index]}.{head:<5} {accuracy[index, head]:>8.3f} {dev_aucs[-1]:>8.3f} {between:>10.3f} "
            f"{sigma[index, head]:>8.3f}"
        )
    job.say("  head     accuracy  dev AUC  cos folds    sigma")
    for line in lines:
        job.say(line)
    job.say(f"  (the best of {accuracy.size} heads with shuffled labels: {chance:.3f})")
    if accuracy.max() <= chance:
        job.warn(
            "no effect beyond noise: no head tells answers apart better than the best one does with shuffled labels"
        )
    for index, layer in enumerate(layers):
        if sigma[index].any():
            tensors[f"attn_head.{layer}.direction"] = torch.tensor(directions[index], dtype=torch.float32)
            tensors[f"attn_head.{layer}.sigma"] = torch.tensor(sigma[index], dtype=torch.float32)
    score = {
        "heads": [[layers[index], head] for index, head in chosen],
        "accuracy": [round(float(accuracy[at]), 4) for at in chosen],
        "dev_auc": [None if auc != auc else round(auc, 4) for auc in dev_aucs],
        "best_accuracy_with_shuffled_labels": round(chance, 4),
        "questions": len(train_questions),
    }
    parts = {
        points[index]: (directions[index] / np.where(sigma[index], sigma[index], 1.0)[:, None]).ravel()
        for index in range(len(layers))
        if sigma[index].any()
    }
    return Fitted(tensors, score, job.options.scale, axis=Axis(parts, job.options.read or "last"))


class Answers(NamedTuple):
    """Every answer, in order: what is read of it, 1 for right ones, its question, and whether to learn from it."""

    asked: list[Asked]
    labels: Ints
    question_of: Ints
    is_train: NDArray[np.bool_]


def _answers(job: Job) -> Answers:
    """Raises: SteeringError."""
    asked: list[Asked] = []
    labels: list[int] = []
    question_of: list[int] = []
    is_train: list[bool] = []
    groups: dict[str, int] = {}
    for split in ("train", "dev"):
        for item in job.splits[split]:
            number = groups.setdefault(item.row.group or item.row.own_group, len(groups))
            for label, answers in ((1, item.row.right), (0, item.row.wrong)):
                for answer in answers:
                    try:
                        rendered = job.template.render(item.row.asked, answer)
                    except SteeringError as error:
                        raise BadData(str(error), item.place, param=error.param) from error
                    for said in job.template.warnings(rendered):
                        job.warn(f"{item.place}: {said}")
                    asked.append(read_at(rendered, job.options.read or "last", item))
                    labels.append(label)
                    question_of.append(number)
                    is_train.append(split == "train")
    num_train = len({number for number, train in zip(question_of, is_train, strict=True) if train})
    if num_train < 4:
        raise SteeringError(f"{', '.join(job.data.names)}: {num_train} questions to learn from; folds need 4 at least")
    if num_train < MIN_QUESTIONS:
        job.warn(f"only {num_train} questions to learn from: heads are ranked by chance below {MIN_QUESTIONS}")
    return Answers(asked, np.array(labels), np.array(question_of), np.array(is_train, dtype=bool))


def _chance(
    rows_of: Callable[[int], NDArray[np.float32]],
    num_layers: int,
    labels: Ints,
    question_of: Ints,
    fold: heads.Fold,
    seed: int,
) -> float:
    """The best accuracy that any head reaches when labels are shuffled: what picking the best of many gives."""
    shuffled = np.random.RandomState(seed).permutation(labels)
    return float(heads.probe(rows_of, num_layers, shuffled, question_of, fold, seed).accuracy.max())
