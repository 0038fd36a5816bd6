"""Learning the numbers of an edit by gradients: the model stays as it is, and the edit is the one that is served."""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.data import BadData, Split
from whipstaff.steering.fit.job import Job
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.source import Entry

Entries = Callable[[], Sequence[Entry]]  # the edit with the numbers as they are now


class Example(NamedTuple):
    """A text whose tokens from `num_prompt` on are learned; `worse` is another that should become less likely."""

    ids: tuple[int, ...]
    num_prompt: int
    worse: tuple[int, ...] = ()


class Course(NamedTuple):
    """How training went: mean losses in nats on the dev split, without the edit, untrained, and of the numbers kept."""

    plain: float
    untrained: float
    kept: float
    steps: int
    losses: tuple[float, ...]  # of every step


def local(job: Job) -> LocalModel:
    """Raises: SteeringError where the model is not on this machine."""
    if not isinstance(job.source, LocalModel):
        raise SteeringError("gradients take a model on this machine: --model, not --server", "server")
    return job.source


def examples(job: Job, split: Split) -> list[Example]:
    """The rows of a split as texts to learn."""
    found: list[Example] = []
    for item in job.splits[split]:
        row = item.row
        try:
            if job.data.kind == "questions":
                found += _preferences(job, row)
                continue
            prompt, response = (row.input, row.output) if job.data.kind == "demos" else (row.prompt, row.response)
            shown = job.template.render(prompt, response)
        except SteeringError as error:
            raise BadData(str(error), item.place, param=error.param) from error
        if not shown.response or shown.num_prompt < 1:
            raise BadData("no token of a response that follows a prompt", item.place)
        found.append(Example(shown.ids, shown.num_prompt))
    return found


def _preferences(job: Job, row: object) -> Iterator[Example]:
    """The best answer against each wrong one."""
    best = job.template.render(row.asked, row.best or row.right[0])  # type: ignore[attr-defined]
    for wrong in row.wrong:  # type: ignore[attr-defined]
        worse = job.template.render(row.asked, wrong)  # type: ignore[attr-defined]
        if worse.ids[: best.num_prompt] == best.ids[: best.num_prompt]:
            yield Example(best.ids, best.num_prompt, worse.ids)


def answer_log_p(
    model: LocalModel, texts: Sequence[tuple[tuple[int, ...], int]], entries: Sequence[Entry]
) -> list[Tensor]:
    """For each (text, length of its prompt): (answer tokens,) log-probabilities, under some steering."""
    lengths, prompts = [len(ids) for ids, _ in texts], [num for _, num in texts]
    with model.edited(entries, lengths, prompts):
        logits = model.forward([ids for ids, _ in texts])
    found = []
    for row, (ids, num) in enumerate(texts):
        log_p = logits[row, num - 1 : len(ids) - 1].to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found.append(log_p[torch.arange(len(ids) - num), list(ids[num:])])
    return found


BETA = 0.5  # of direct preference optimisation, as LoFiT's release has it


def loss(model: LocalModel, batch: Sequence[Example], entries: Sequence[Entry]) -> Tensor:
    """Mean nats per answer token; of preferences, the mean of -log sigmoid(BETA * the gain of the better answer)."""
    better = [(each.ids, each.num_prompt) for each in batch]
    if not batch[0].worse:
        return torch.cat(answer_log_p(model, better, entries)).mean().neg()
    both = better + [(each.worse, each.num_prompt) for each in batch]
    with torch.no_grad():
        before = torch.stack([each.sum() for each in answer_log_p(model, both, ())])
    gain = torch.stack([each.sum() for each in answer_log_p(model, both, entries)]) - before
    num = len(batch)
    return torch.nn.functional.softplus(-BETA * (gain[:num] - gain[num:])).mean()


def mean_loss(model: LocalModel, some: Sequence[Example], entries: Sequence[Entry]) -> float:
    """Over all examples, batch by batch."""
    total, size = 0.0, model.batch_size
    with torch.no_grad():
        for start in range(0, len(some), size):
            batch = some[start : start + size]
            total += float(loss(model, batch, entries)) * len(batch)
    return total / len(some)


def epochs(some: Sequence[Example], num: int, batch_size: int, seed: int) -> list[list[Example]]:
    """Batches, in an order that the seed says."""
    draws, found = random.Random(seed), []
    for _ in range(num):
        order = draws.sample(list(some), len(some))
        found += [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    return found


def descend(
    params: Sequence[Tensor],
    steps: Iterable[Callable[[], Tensor]],
    lr: float,
    after: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Adam over losses, one step each; the losses. Raises: SteeringError where they are no longer finite."""
    optimizer = torch.optim.Adam(params, lr=lr)
    found = []
    for number, compute in enumerate(steps):
        optimizer.zero_grad()
        value = compute()
        if not torch.isfinite(value):
            raise SteeringError(f"step {number + 1}: the loss is {value.item()}; a smaller --lr", "lr")
        value.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(float(value.detach()))
        after(number + 1, found[-1])
    return found


def train(
    job: Job,
    params: Sequence[Tensor],
    entries: Entries,
    lr: float,
    num_epochs: int,
    what: str = "training",
    penalty: Callable[[], Tensor] | None = None,
    num_looks: int = 10,
) -> Course:
    """Lower the loss on the training split, and leave in `params` what had the lowest one on the dev split."""
    model = local(job)
    some, dev = examples(job, "train"), examples(job, "dev")
    if not some or not dev:
        raise SteeringError(f"{', '.join(job.data.names)}: nothing in the split {'train' if not some else 'dev'}")
    batches = epochs(some, num_epochs, model.batch_size, job.options.seed)
    if job.options.steps:
        batches = [batches[index % len(batches)] for index in range(job.options.steps)]
    plain, untrained = mean_loss(model, dev, ()), mean_loss(model, dev, entries())
    best = [math.inf]
    kept = [each.detach().clone() for each in params]
    every = max(len(batches) // num_looks, 1)

    def step(batch: Sequence[Example]) -> Callable[[], Tensor]:
        return lambda: loss(model, batch, entries()) + (penalty() if penalty else 0.0)

    def after(number: int, value: float) -> None:
        job.progress(what, number, len(batches))
        if number % every and number < len(batches):
            return
        now = mean_loss(model, dev, entries())
        if now < best[0]:
            best[0] = now
            for place, each in zip(kept, params, strict=True):
                place.copy_(each.detach())

    losses = descend(params, map(step, batches), lr, after)
    with torch.no_grad():
        for place, each in zip(kept, params, strict=True):
            each.copy_(place)
    return Course(plain, untrained, best[0], len(batches), tuple(losses))


def score_of(job: Job, course: Course) -> dict[str, Any]:
    """What a file's provenance says of its training."""
    if course.kept >= course.plain:
        job.warn("no effect beyond noise: on the dev split the trained edit is no better than none")
    rounded = {name: round(float(getattr(course, name)), 4) for name in ("plain", "untrained", "kept")}
    return {f"dev_loss_{name}": value for name, value in rounded.items()} | {"steps": course.steps}
