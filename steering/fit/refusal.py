"""One direction that carries a behaviour (Arditi et al. 2024): candidates at every token after the user's text and
every layer; the one that ablated takes the behaviour away, added brings it, and costs little elsewhere."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.contrast import Table, axis_of, direction, table, texts_of, words_alone
from whipstaff.steering.fit.directions import Floats, separation
from whipstaff.steering.fit.job import Fitted, Job, chosen_layers, points_of
from whipstaff.steering.fit.source import Entry
from whipstaff.steering.method import HookPoint
from whipstaff.steering.methods import METHODS

MAX_KL = 0.1  # nats at the last prompt token, on prompts of the other class
PRUNED = 0.2  # of the layers, from the end
_MAX_TRIED = 64  # prompts of a class on which candidates are tried
_MAX_POSITIONS = 8


class Scores(NamedTuple):
    """Of one candidate: log-odds of the marks."""

    ablated: float  # on prompts of the class, with the direction ablated: the lower, the better
    added: float  # on prompts of the other class, with the direction added: above 0
    kl: float  # on those, with the direction ablated


def survivors(
    scores: NDArray[np.float64], induced: NDArray[np.float64], kl: NDArray[np.float64]
) -> list[tuple[int, int]]:
    """(position, layer)s that may be chosen, best first: all three tables are (positions, layers)."""
    num_layers = scores.shape[1]
    found = [
        (position, layer)
        for position in range(scores.shape[0])
        for layer in range(num_layers)
        if layer < int(num_layers * (1 - PRUNED))
        and kl[position, layer] <= MAX_KL
        and induced[position, layer] >= 0
        and not np.isnan([scores[position, layer], induced[position, layer], kl[position, layer]]).any()
    ]
    return sorted(found, key=lambda at: scores[at])


def add_direction(job: Job) -> Fitted:
    return _fit(job, is_added=True)


def directional_ablation(job: Job) -> Fitted:
    return _fit(job, is_added=False)


def _fit(job: Job, is_added: bool) -> Fitted:
    layers = chosen_layers(job.options.layers or "all", job.num_layers)
    num = _tokens_after_user(job)
    rows = table(job, points_of("resid_pre", layers), "last", num)
    candidates = {
        (position, layer): direction(_at(rows, position), HookPoint("resid_pre", layer), "mean", job.options.seed)
        for position in range(num)
        for layer in layers
    }
    chosen, score = _by_effect(job, candidates, num) if job.options.marks else _by_distance(job, rows, candidates)
    position, layer = chosen
    job.say(f"chosen: token {position - num} of the prompt, resid_pre.{layer}")
    dev, labels = rows.dev(HookPoint("resid_pre", layer), position)
    auc = separation(dev @ candidates[chosen], labels).auc
    vector = torch.tensor(candidates[chosen], dtype=torch.float32)
    words = words_alone(job)
    score = {"token": position - num, "layer": layer, "auc": None if auc != auc else round(auc, 4), **score}
    score["auc_words_alone"] = None if words is None else round(words, 4)
    name = f"resid_pre.{layer}.direction" if is_added else "direction"
    axis = axis_of(rows, HookPoint("resid_pre", layer), candidates[chosen], str(position - num), position)
    return Fitted({name: vector}, score, job.options.scale, axis=axis)


class _Position:
    """A table seen at one of its positions."""

    def __init__(self, table: Table, position: int) -> None:
        self._table, self._position = table, position
        self.pairs, self.is_train = table.pairs, table.is_train

    def train(self, point: HookPoint) -> object:
        return self._table.train(point, self._position)


def _at(table: Table, position: int) -> Table:
    return _Position(table, position)  # type: ignore[return-value]  # `direction` asks for no more


def _tokens_after_user(job: Job) -> int:
    """How many tokens the template puts behind what the user said; 1 where that cannot be told."""
    if job.template.form == "none":
        return 1
    one, other = (job.template.render(text).ids for text in ("Who are you?", "Name two rivers!"))
    same = next((index for index, (a, b) in enumerate(zip(one[::-1], other[::-1], strict=False)) if a != b), 1)
    return min(max(same, 1), _MAX_POSITIONS)


def _by_distance(
    job: Job, table: Table, candidates: dict[tuple[int, int], Floats]
) -> tuple[tuple[int, int], dict[str, object]]:
    """Without words that mark the behaviour: where the classes lie farthest apart on the dev split."""
    job.warn("no --marks: the place was chosen by how far the classes lie apart there, not by what the direction does")
    limit = int(job.num_layers * (1 - PRUNED))

    def distance(at: tuple[int, int]) -> float:
        dev, labels = table.dev(HookPoint("resid_pre", at[1]), at[0])
        found = separation(dev @ candidates[at], labels).distance
        return found if found == found else 0.0

    early = [at for at in candidates if 0 < at[1] < limit] or list(candidates)
    best = max(early, key=distance)
    return best, {"distance": round(distance(best), 4)}


def _by_effect(
    job: Job, candidates: dict[tuple[int, int], Floats], num: int
) -> tuple[tuple[int, int], dict[str, object]]:
    """By what the model then says. Raises: SteeringError where nothing qualifies."""
    marks = _marks(job)
    prompts: dict[int, list[tuple[int, ...]]] = {1: [], 0: []}
    for item in job.splits["dev"] or job.splits["train"]:
        for shown in texts_of(job, item):
            prompts[shown.label].append(shown.rendered.ids)
    with_it, without = (prompts[label][:_MAX_TRIED] for label in (1, 0))
    plain_with, plain_without = list(job.source.predict(with_it)), list(job.source.predict(without))
    layers = sorted({layer for _, layer in candidates})
    tables = [np.full((num, max(layers) + 1), np.nan) for _ in range(3)]
    for done, ((position, layer), vector) in enumerate(candidates.items()):
        found = _tried(job, torch.tensor(vector, dtype=torch.float32), layer, with_it, without, plain_without, marks)
        for into, value in zip(tables, found, strict=True):
            into[position, layer] = value
        job.progress("trying directions", done + 1, len(candidates))
    whole = [np.pad(each, ((0, 0), (0, job.num_layers - each.shape[1])), constant_values=np.nan) for each in tables]
    order = survivors(*whole)
    before, usual = (float(np.mean([_log_odds(row, marks) for row in rows])) for rows in (plain_with, plain_without))
    if not order:
        raise SteeringError(
            f"no direction keeps KL <= {MAX_KL} and brings the marks when it is added (their log-odds: {before:.2f} in "
            f"one class, {usual:.2f} in the other); are these the model's own words?",
            "marks",
        )
    best = order[0]
    names = ("log_odds_ablated", "log_odds_added", "kl")
    score = {name: round(float(each[best]), 4) for name, each in zip(names, whole, strict=True)}
    return best, {
        "log_odds_plain": round(before, 4),
        "log_odds_plain_other": round(usual, 4),
        **score,
        "survivors": len(order),
    }


def _marks(job: Job) -> list[int]:
    """Tokens that begin an answer of the class."""
    found = set()
    for word in (job.options.marks or "").split(","):
        for text in (word.strip(), " " + word.strip()):
            ids = job.source.tokenizer.encode(text, add_special_tokens=False)
            if word.strip() and ids:
                found.add(int(ids[0]))
    if not found:
        raise SteeringError("say words that begin an answer, with commas between them", "marks")
    return sorted(found)


def _log_odds(log_p: Tensor, marks: Sequence[int]) -> float:
    p = float(log_p[list(marks)].double().exp().sum().clamp(1e-12, 1 - 1e-12))
    return float(np.log(p) - np.log1p(-p))


def _tried(
    job: Job,
    vector: Tensor,
    layer: int,
    with_it: Sequence[tuple[int, ...]],
    without: Sequence[tuple[int, ...]],
    plain_without: Sequence[Tensor],
    marks: Sequence[int],
) -> Scores:
    everywhere = METHODS["directional_ablation"].hook_points(job.source.shape)
    ablation = Entry("directional_ablation", {point: {"direction": vector} for point in everywhere}, {})
    addition = Entry("add_direction", {HookPoint("resid_pre", layer): {"direction": vector}}, {})
    ablated = _mean_odds(job.source.predict(with_it, [ablation]), marks)
    added = _mean_odds(job.source.predict(without, [addition]), marks)
    changed = job.source.predict(without, [ablation])
    kl = [
        float((p.double().exp() * (p.double() - q.double())).sum()) for p, q in zip(plain_without, changed, strict=True)
    ]
    return Scores(ablated, added, float(np.mean(kl)))


def _mean_odds(rows: Iterator[Tensor], marks: Sequence[int]) -> float:
    return float(np.mean([_log_odds(row, marks) for row in rows]))
