"""What demonstrations teach in a prompt, as numbers: task vectors, function vectors, and how much each head matters."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import heads
from whipstaff.steering.fit.data import Demo, Item
from whipstaff.steering.fit.job import Fitted, Job, chosen_layers, depths, points_of
from whipstaff.steering.fit.render import Rendered, Template
from whipstaff.steering.fit.source import Asked, Entry
from whipstaff.steering.method import HookPoint

FORM = "Q: {prompt}\nA: {response}"
BETWEEN = "\n\n"
MIN_DEMOS = 8


class Prompted(NamedTuple):
    """A prompt, up to where the answer begins, and the answer's first token."""

    ids: tuple[int, ...]
    target: int


class Prompts:
    """Prompts made of demonstrations.

    Raises: SteeringError where there are too few.
    """

    def __init__(self, job: Job) -> None:
        self.form = FORM if job.template.form in ("chat", "none") else job.template.form
        self.template = Template(job.source.tokenizer, "none")
        self.train, self.dev = ([item.row for item in job.splits[split]] for split in ("train", "dev"))
        self.shots = min(job.options.shots or 10, len(self.train) - 1)
        if len(self.train) < MIN_DEMOS:
            raise SteeringError(
                f"{', '.join(job.data.names)}: {len(self.train)} demonstrations to learn from; {MIN_DEMOS} at least"
            )
        self.random = random.Random(job.options.seed)

    def render(self, query: Demo, shots: Sequence[tuple[str, str]] = ()) -> Rendered:
        """The whole text; its response is the query's output."""
        told = BETWEEN.join([self._filled(*shot) for shot in shots] + [self._filled(query.input, "")])
        return self.template.render(told, query.output)

    def prompt(self, query: Demo, shots: Sequence[tuple[str, str]] = ()) -> Prompted:
        found = self.render(query, shots)
        return Prompted(found.ids[: found.num_prompt], found.ids[found.num_prompt])

    def _filled(self, prompt: str, response: str) -> str:
        return self.form.replace("{prompt}", prompt).replace("{response}", response)

    def few_shot(self, query: Demo, is_corrupted: bool = False) -> Prompted:
        """A prompt with demonstrations of the training split, drawn anew; corrupted: their outputs change places."""
        others = [demo for demo in self.train if demo.input != query.input]
        shots = self.random.sample(others, min(self.shots, len(others)))
        outputs = [demo.output for demo in shots]
        if is_corrupted:
            self.random.shuffle(outputs)
        return self.prompt(query, [(demo.input, output) for demo, output in zip(shots, outputs, strict=True)])

    def drawn(self, num: int, is_corrupted: bool = False) -> list[Prompted]:
        return [self.few_shot(self.random.choice(self.train), is_corrupted) for _ in range(num)]

    @property
    def zero_shot(self) -> list[Prompted]:
        return [self.prompt(demo) for demo in self.dev]


def example(job: Job, item: Item) -> list[tuple[Rendered, str]]:
    prompts = Prompts(job)
    shots = [(demo.input, demo.output) for demo in prompts.train if demo != item.row][: min(prompts.shots, 2)]
    return [(prompts.render(item.row, shots), "last-prompt")]


def accuracy(job: Job, prompts: Sequence[Prompted], entries: Sequence[Entry] = ()) -> float:
    """The share of prompts whose most likely next token is the answer's first."""
    rows = job.source.predict([each.ids for each in prompts], entries)
    return float(np.mean([int(row.argmax()) == each.target for row, each in zip(rows, prompts, strict=True)]))


def log_p(
    job: Job, prompts: Sequence[Prompted], entries: Sequence[Entry] = ()
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """(prompts,) of the answer's first token."""
    rows = job.source.predict([each.ids for each in prompts], entries)
    return np.array([float(row[each.target]) for row, each in zip(rows, prompts, strict=True)])


def means(job: Job, prompts: Sequence[Prompted], points: Sequence[HookPoint], what: str) -> dict[HookPoint, Tensor]:
    """(width,) float64 means at the last prompt token."""
    total = {point: torch.zeros(job.source.shape.width(point.site), dtype=torch.float64) for point in points}
    asked = [Asked(each.ids, (len(each.ids) - 1,)) for each in prompts]
    for done, found in enumerate(job.source.read(asked, points)):
        for point, rows in found.items():
            total[point] += rows[0].double()
        job.progress(what, done + 1, len(asked))
    return {point: each / len(asked) for point, each in total.items()}


def task_vector(job: Job) -> Fitted:
    """The state at the last token of prompts whose query is a stand-in, at the layer where setting it answers best."""
    prompts = Prompts(job)
    layers = chosen_layers(job.options.layers or "all", job.num_layers)
    some = prompts.drawn(job.options.trials or 20)  # each with a query of its own, which the mean forgets
    states = means(job, some, points_of("resid_post", layers), "reading")
    zero = _dev(job, prompts)
    plain, few = accuracy(job, zero), accuracy(job, [prompts.few_shot(demo) for demo in prompts.dev])
    job.say(f"first token right on dev: {plain:.3f} without demonstrations, {few:.3f} with {prompts.shots}")

    def entry(layer: int) -> Entry:
        return Entry(
            "task_vector",
            {HookPoint("resid_post", layer): {"state": states[HookPoint("resid_post", layer)].float()}},
            {},
        )

    found = {layer: accuracy(job, zero, [entry(layer)]) for layer in _counted(job, layers, "trying layers")}
    return _best_layer(
        job, found, plain, few, prompts, {layer: states[HookPoint("resid_post", layer)] for layer in layers}, "state"
    )


def _best_layer(
    job: Job, found: dict[int, float], plain: float, few: float, prompts: Prompts, vectors: dict[int, Tensor], part: str
) -> Fitted:
    for layer, value in found.items():
        job.say(f"  layer {layer:<3} {value:.3f}")
    best = max(found, key=lambda layer: found[layer])
    if found[best] <= plain:
        job.warn("no effect beyond noise: at no layer more answers are right than without it")
    if few < 0.5:
        job.warn(f"the model gets {few:.0%} right with demonstrations: it hardly does the task in its context")
    score = {
        "layer": best,
        "accuracy": round(found[best], 4),
        "accuracy_zero_shot": round(plain, 4),
        "accuracy_few_shot": round(few, 4),
        "dev_questions": len(prompts.dev),
        "shots": prompts.shots,
    }
    return Fitted({f"resid_post.{best}.{part}": vectors[best].float()}, score, job.options.scale)


def _dev(job: Job, prompts: Prompts) -> list[Prompted]:
    if not prompts.dev:
        raise SteeringError(
            f"{', '.join(job.data.names)}: the dev split has no demonstration; the layer is chosen on it"
        )
    return prompts.zero_shot


def _counted(job: Job, layers: Sequence[int], what: str) -> Iterator[int]:
    for done, layer in enumerate(layers):
        job.progress(what, done, len(layers))
        yield layer
    job.progress(what, len(layers), len(layers))


def patch(layer: int, head: int, mean: Tensor, num_heads: int) -> Entry:
    """One head's output at the last prompt token, set to its mean over prompts of the task."""
    mask = torch.zeros(num_heads)
    mask[head] = 1
    parts = {"mean": mean.float(), "mean_mask": mask}
    return Entry("head_scale", {HookPoint("attn_head", layer): parts}, {}, where="last_prompt")


def indirect_effects(
    job: Job, corrupted: Sequence[Prompted], mean: dict[int, Tensor]
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(prompts, layers, heads) how much more probable the answer is with one head patched.

    Args:
        mean: layer -> (heads, head_dim).
    """
    base = np.exp(log_p(job, corrupted))
    num_heads = job.source.shape.num_heads
    found = np.zeros((len(corrupted), len(mean), num_heads))
    for index, (layer, rows) in enumerate(mean.items()):
        for head in range(num_heads):
            found[:, index, head] = np.exp(log_p(job, corrupted, [patch(layer, head, rows, num_heads)])) - base
            job.progress("patching heads", index * num_heads + head + 1, len(mean) * num_heads)
    if not found.any():
        raise SteeringError("patching changed nothing at any head: the edit does not reach the model")
    return found


def function_vector(job: Job) -> Fitted:
    """What the heads that carry a task write to the stream, together."""
    prompts = Prompts(job)
    layers = chosen_layers(job.options.layers, job.num_layers) if job.options.layers else depths(job.num_layers, 15, 85)
    zero = _dev(job, prompts)
    shape = (job.source.shape.num_heads, job.source.shape.head_dim)
    points = points_of("attn_head", range(job.num_layers))
    found = means(job, prompts.drawn(job.options.trials or 100), points, "reading heads")
    mean = {point.layer: each.view(shape) for point, each in found.items()}
    effects = indirect_effects(job, prompts.drawn(job.options.corrupted or 25, is_corrupted=True), mean).mean(0)
    num = min(job.options.num_heads or 10, effects.size)
    top = heads.best(effects, num)
    vector = summed(job, mean, top)
    draws = random.Random(job.options.seed)
    every = [(layer, head) for layer in range(job.num_layers) for head in range(shape[0])]
    other = summed(job, mean, draws.sample(every, num))
    plain, few = accuracy(job, zero), accuracy(job, [prompts.few_shot(demo) for demo in prompts.dev])
    job.say(f"first token right on dev: {plain:.3f} without demonstrations, {few:.3f} with {prompts.shots}")
    job.say(
        f"heads {', '.join(f'{layer}.{head}' for layer, head in top)}: mean indirect effect "
        f"{np.mean([effects[at] for at in top]):.4f}, all heads {effects.mean():.4f}"
    )

    def entry(layer: int, add: Tensor) -> Entry:
        return Entry("function_vector", {HookPoint("resid_post", layer): {"add": add.float()}}, {}, where="last_prompt")

    by_layer = {layer: accuracy(job, zero, [entry(layer, vector)]) for layer in _counted(job, layers, "trying layers")}
    fitted = _best_layer(job, by_layer, plain, few, prompts, dict.fromkeys(layers, vector), "add")
    random_heads = accuracy(job, zero, [entry(fitted.score["layer"], other)])
    score = {
        "heads": [list(at) for at in top],
        "indirect_effect": round(float(np.mean([effects[at] for at in top])), 5),
        "indirect_effect_all_heads": round(float(effects.mean()), 5),
        "accuracy_random_heads": round(random_heads, 4),
    }
    return Fitted(fitted.tensors, {**fitted.score, **score}, job.options.scale)


def summed(job: Job, mean: dict[int, Tensor], top: Sequence[heads.Head]) -> Tensor:
    """(width,) what some heads' mean outputs come to behind the output projection, whose bias is no head's."""
    projected = getattr(job.source, "projected", None)
    if projected is None:
        raise SteeringError("function vectors go through the model's weights: --model, not --server", "server")
    total = torch.zeros(job.source.shape.hidden_size, dtype=torch.float64)
    for layer, head in top:
        alone = torch.zeros_like(mean[layer])
        alone[head] = mean[layer][head]
        total += projected(layer, alone.float()).double()
    return total


def head_scale(job: Job) -> Fitted:
    """Heads without which answers become less likely: one at a time is replaced by its mean over other prompts."""
    prompts = Prompts(job)
    layers = chosen_layers(job.options.layers or "all", job.num_layers)
    shape = (job.source.shape.num_heads, job.source.shape.head_dim)
    held_out = _few_shot_dev(job, prompts)
    found = means(
        job, prompts.drawn(job.options.trials or 50, is_corrupted=True), points_of("attn_head", layers), "reading heads"
    )
    mean = {point.layer: each.view(shape) for point, each in found.items()}
    base = log_p(job, held_out)
    drops = np.zeros((len(held_out), len(layers), shape[0]))
    for index, layer in enumerate(layers):
        for head in range(shape[0]):
            drops[:, index, head] = base - log_p(job, held_out, [patch(layer, head, mean[layer], shape[0])])
            job.progress("trying heads", index * shape[0] + head + 1, len(layers) * shape[0])
    if not drops.any():
        raise SteeringError("replacing heads changed nothing: the edit does not reach the model")
    top = heads.best(drops.mean(0), min(job.options.num_heads or 1, drops[0].size))
    low, high = np.percentile(_resampled(drops, job.options.seed), [2.5, 97.5], axis=0)
    job.say("  head     log-probability lost, and its 95 % interval over prompts")
    for at in top:
        job.say(f"  {layers[at[0]]}.{at[1]:<5} {drops.mean(0)[at]:.4f} [{low[at]:.4f}, {high[at]:.4f}]")
    if low[top[0]] <= 0:
        job.warn("no effect beyond noise: the interval of the head that matters most holds 0")
    tensors = {}
    for index, layer in enumerate(layers):
        mask = torch.zeros(shape[0])
        mask[[head for where, head in top if where == index]] = 1
        if mask.any():
            tensors[f"attn_head.{layer}.mean"] = mean[layer].float()
            tensors[f"attn_head.{layer}.mean_mask"] = mask
    score = {
        "heads": [[layers[index], head] for index, head in top],
        "log_p_lost": [round(float(drops.mean(0)[at]), 4) for at in top],
        "interval": [[round(float(low[at]), 4), round(float(high[at]), 4)] for at in top],
        "prompts": len(held_out),
    }
    return Fitted(tensors, score, job.options.scale, description="replaces the heads that matter most by their means")


def _few_shot_dev(job: Job, prompts: Prompts) -> list[Prompted]:
    _dev(job, prompts)
    return [prompts.few_shot(demo) for demo in prompts.dev]


def _resampled(
    values: np.ndarray[tuple[int, ...], np.dtype[np.float64]], seed: int, num: int = 1000
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """(num, ...) means over prompts drawn with replacement."""
    draws = np.random.RandomState(seed)
    return np.stack([values[draws.randint(0, len(values), len(values))].mean(0) for _ in range(num)])
