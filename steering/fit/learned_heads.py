"""Heads that decoding methods read, learned from last hidden states: the model itself stays as it is.

prefix_classifier, token_classifier   which tokens of an answer are as they should be; KCTS and RIPA (Choi et al.
                                      2023, arXiv:2310.09044), whose labels are 1 up to the first wrong token
defer_head                            where another model should say the next token; Co-LLM (Shen et al. 2024,
                                      arXiv:2403.03870)
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.data import BadData, Grounded, Item, Split
from whipstaff.steering.fit.directions import Floats, Ints, classifier, logistic, separation
from whipstaff.steering.fit.job import Fitted, Job
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.render import Rendered
from whipstaff.steering.fit.training import descend, examples, local

RIGHT_WHERE_WRONG = 8.0  # weight of tokens that the assistant has right and the model wrong, where learning begins


# ---- classifiers of an answer's tokens


class Judged(NamedTuple):
    """Tokens of answers that somebody judged, and what the model was thinking."""

    before: Floats  # (N, hidden) the state from which the token was predicted
    at: Floats  # (N, hidden) the state once it was read
    tokens: Ints  # (N,)
    labels: Ints  # (N,) 1 is wanted
    text_of: Ints  # (N,) the row that it stands in


def rendered(job: Job, item: Item) -> Rendered:
    """Raises: SteeringError naming the row."""
    row = item.row
    try:
        shown = job.template.render(row.asked, row.response)
    except SteeringError as error:
        raise BadData(str(error), item.place, param=error.param) from error
    if shown.num_prompt < 1:
        raise BadData("no token stands before the response", item.place)
    return shown


def grounded_example(job: Job, item: Item) -> list[tuple[Rendered, str]]:
    return [(rendered(job, item), "response-mean")]


def labels_of(shown: Rendered, row: Grounded) -> list[tuple[int, int]]:
    """(index of a token, its label) of the response's tokens that a span covers: by their last character."""
    text, said = shown.text, row.response
    cut = 0 if text.endswith(said) else len(said) - len(said.lstrip())  # a chat template takes outer spaces away
    start = len(text) - len(said if text.endswith(said) else said.strip()) - cut
    found: list[tuple[int, int]] = []
    for index in range(shown.num_prompt, len(shown.ids)):
        last = shown.spans[index][1] - 1 - start
        label = next((label for first, end, label in row.spans if first <= last < end), None)
        if label is not None:
            found.append((index, label))
    return found


def judged(job: Job, split: Split) -> Judged:
    """Raises: SteeringError where the split has no token of one of the classes."""
    model, items = local(job), job.splits[split]
    texts = [rendered(job, item) for item in items]
    before, at, tokens, labels, text_of = [], [], [], [], []
    for number, (item, shown, scored) in enumerate(
        zip(items, texts, model.score([shown.ids for shown in texts]), strict=True)
    ):
        job.progress(f"reading {split}", number + 1, len(items))
        for index, label in labels_of(shown, item.row):
            before.append(scored.states[index - 1].numpy())
            at.append(scored.states[index].numpy())
            tokens.append(shown.ids[index])
            labels.append(label)
            text_of.append(number)
    if len(set(labels)) < 2:
        raise SteeringError(f"{', '.join(job.data.names)}: the {split} split has no token of one of the labels 0 and 1")
    return Judged(np.stack(before), np.stack(at), np.array(tokens), np.array(labels), np.array(text_of))


def prefix_classifier(job: Job) -> Fitted:
    """A logistic regression on the state of each judged token."""
    train, dev = judged(job, "train"), judged(job, "dev")
    weight, bias = logistic(train.at, train.labels, job.options.seed)
    shuffled = np.random.RandomState(job.options.seed).permutation(train.labels)
    useless, _ = logistic(train.at, shuffled, job.options.seed)
    score = _score(job, dev, dev.at @ weight + bias, dev.at @ useless)
    halves = torch.tensor(np.stack([-weight, weight]) / 2, dtype=torch.float32)
    return Fitted({"weight": halves, "bias": torch.tensor([-bias / 2, bias / 2], dtype=torch.float32)}, score)


def token_classifier(job: Job) -> Fitted:
    """For each token of the vocabulary a logistic regression on the state before it: what all tokens share, and what
    is its own of those that were seen."""
    train, dev = judged(job, "train"), judged(job, "dev")
    shared, bias = logistic(train.before, train.labels, job.options.seed)
    vocab = int(local(job).embedding_size)
    weight = torch.tensor(np.tile(shared, (vocab, 1)), dtype=torch.float32).requires_grad_()
    biases = torch.full((vocab,), bias, dtype=torch.float32).requires_grad_()
    start = [each.detach().clone() for each in (weight, biases)]
    states, wanted = torch.tensor(train.before), torch.tensor(train.labels, dtype=torch.float32)
    tokens = torch.tensor(train.tokens)
    kept, best = start, [_bce(dev, *start)]

    def step() -> Tensor:
        drift = sum((now - then).square().sum() for now, then in zip((weight, biases), start, strict=True))
        said = (weight[tokens] * states).sum(1) + biases[tokens]
        return binary_cross_entropy_with_logits(said, wanted) + drift / len(tokens) / 2

    num = job.options.steps or 200

    def after(number: int, value: float) -> None:
        nonlocal kept
        job.progress("training", number, num)
        now = [each.detach().clone() for each in (weight, biases)]
        if (loss := _bce(dev, *now)) < best[0]:
            best[0], kept = loss, now

    descend([weight, biases], [step] * num, job.options.lr or 1e-2, after)
    said = _said(dev, *kept)
    useless, _ = logistic(train.before, np.random.RandomState(job.options.seed).permutation(train.labels))
    return Fitted({"weight": kept[0], "bias": kept[1]}, _score(job, dev, said, dev.before @ useless))


def _said(some: Judged, weight: Tensor, bias: Tensor) -> Floats:
    tokens = torch.tensor(some.tokens)
    found: Floats = ((weight[tokens] * torch.tensor(some.before)).sum(1) + bias[tokens]).numpy()
    return found


def _bce(some: Judged, weight: Tensor, bias: Tensor) -> float:
    wanted = torch.tensor(some.labels, dtype=torch.float32)
    return float(binary_cross_entropy_with_logits(torch.tensor(_said(some, weight, bias)), wanted))


def _score(job: Job, dev: Judged, said: Floats, useless: Floats) -> dict[str, Any]:
    """How well tokens are told apart on dev, and in how many texts the first wrong token is called wrong."""
    auc, chance = separation(said, dev.labels).auc, separation(useless, dev.labels).auc
    if auc <= max(chance, 0.5):
        job.warn("no effect beyond noise: tokens are told apart no better than with shuffled labels")
    firsts = [index for index in np.flatnonzero(dev.labels == 0) if _is_first(dev, int(index))]
    found = {"auc": auc, "auc_shuffled_labels": chance, "wanted_tokens": float(dev.labels.mean())}
    found["accuracy"] = float(((said > 0) == (dev.labels == 1)).mean())
    found["first_errors_found"] = float((said[firsts] < 0).mean())
    return {name: round(float(value), 4) for name, value in found.items()} | {"tokens": len(dev.labels)}


def _is_first(some: Judged, index: int) -> bool:
    """Whether no token before it in its text is wrong."""
    same = np.flatnonzero(some.text_of[:index] == some.text_of[index])
    return not (some.labels[same] == 0).any()


# ---- Co-LLM


class Choices(NamedTuple):
    """Tokens of answers that two models would have said, each with some probability."""

    states: Tensor  # (N, hidden) of the model, before the token
    base: Tensor  # (N,) log-probabilities
    assistant: Tensor  # (N,)
    base_is_right: Tensor  # (N,) whether the token was its likeliest
    assistant_is_right: Tensor  # (N,)


def defer_head(job: Job) -> Fitted:
    """Where the assistant is right and the model wrong, by a weighted logistic regression; from there on down the mean
    of -log((1 - P) p_model + P p_assistant)."""
    if job.options.assistant is None:
        raise SteeringError("name the model that is deferred to", "assistant")
    model = local(job)
    helper = LocalModel.load(
        job.options.assistant, str(model.model.dtype).removeprefix("torch."), str(model.device), model.batch_size
    )
    if helper.tokenizer.get_vocab() != model.tokenizer.get_vocab():
        raise SteeringError(f"{job.options.assistant}: its tokens are not those of the model", "assistant")
    train, dev = (choices(job, split, model, helper) for split in ("train", "dev"))
    mean, deviation = train.states.mean(0), train.states.std(0).clamp(min=1e-6)
    states = (train.states - mean) / deviation
    weight, bias = _begun(train, states, job.options.seed)
    num, best = job.options.steps or 300, [float("inf")]
    kept = (weight.detach().clone(), bias.detach().clone())

    def folded(w: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        own = w.detach() / deviation
        return own, b.detach() - (own * mean).sum()

    def after(number: int, value: float) -> None:
        nonlocal kept
        job.progress("training", number, num)
        now = float(mixed(dev, dev.states, *folded(weight, bias)))
        if now < best[0]:
            best[0], kept = now, (weight.detach().clone(), bias.detach().clone())

    descend([weight, bias], [lambda: mixed(train, states, weight, bias)] * num, job.options.lr or 2e-2, after)
    w, b = folded(*kept)
    defers = dev.states @ w + b > 0
    right = torch.where(defers, dev.assistant_is_right, dev.base_is_right).float().mean()
    alone = max(float(dev.base_is_right.float().mean()), float(dev.assistant_is_right.float().mean()))
    if best[0] >= -max(float(dev.base.mean()), float(dev.assistant.mean())):
        job.warn("no effect beyond noise: on the dev split one of the two models alone is no worse than both")
    found = {
        "dev_loss_model": -float(dev.base.mean()),
        "dev_loss_assistant": -float(dev.assistant.mean()),
        "dev_loss_kept": best[0],
        "deferred": float(defers.float().mean()),
        "next_token_right": float(right),
        "next_token_right_of_better_model": alone,
    }
    score = {name: round(value, 4) for name, value in found.items()} | {"tokens": len(dev.base)}
    return Fitted({"weight": w, "bias": b}, score | {"assistant": helper.identity()["model_digest"]})


def mixed(some: Choices, states: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean nats of the tokens, of which each model says its share."""
    d = states @ weight + bias
    return torch.logaddexp(logsigmoid(-d) + some.base, logsigmoid(d) + some.assistant).mean().neg()


def _begun(some: Choices, states: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    helps = (some.assistant_is_right & ~some.base_is_right).numpy().astype(int)
    if len(set(helps.tolist())) < 2:
        return torch.zeros(states.shape[1]).requires_grad_(), torch.zeros(()).requires_grad_()
    model = classifier(seed).set_params(class_weight={0: 1.0, 1: RIGHT_WHERE_WRONG}).fit(states.numpy(), helps)
    weight = torch.tensor(model.coef_[0], dtype=torch.float32)
    return weight.requires_grad_(), torch.tensor(float(model.intercept_[0])).requires_grad_()


def choices(job: Job, split: Split, model: LocalModel, helper: LocalModel) -> Choices:
    """Raises: SteeringError."""
    texts = examples(job, split)
    ids = [text.ids for text in texts]
    found: list[tuple[Tensor, ...]] = []
    for number, (text, own, its) in enumerate(zip(texts, model.score(ids), helper.score(ids), strict=True)):
        job.progress(f"reading {split}", number + 1, len(texts))
        said = slice(text.num_prompt - 1, len(text.ids) - 1)
        found.append((own.states[said], own.log_p[said], its.log_p[said], own.is_best[said], its.is_best[said]))
    if not found:
        raise SteeringError(f"{', '.join(job.data.names)}: nothing in the split {split}")
    return Choices(*(torch.cat(list(each)) for each in zip(*found, strict=True)))
