"""A sparse autoencoder of one place in a model, and which of its features tells two classes of texts apart.

    a = relu(encoder (x - decoder_bias) + encoder_bias)      x' = a decoder + decoder_bias

learned by mean squared error and an L1 penalty on a, decoder rows being kept at one length (Bricken et al. 2023,
transformer-circuits.pub/2023/monosemantic-features). Features are written in the order in which their mean activations
differ between the classes, so feature 0 is the one to try first.
"""

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.contrast import Table, table
from whipstaff.steering.fit.directions import Ints, separation
from whipstaff.steering.fit.job import Fitted, Job, chosen_layers
from whipstaff.steering.fit.training import descend
from whipstaff.steering.method import HookPoint

TOKENS = 16  # of each text, its last ones
LR, STEPS, L1, BATCH = 3e-3, 800, 6e-3, 1024
CHOSEN = 4  # features that get a bias


class Learned(NamedTuple):
    """An autoencoder of rows that have length 1 in each dimension, on average, about their mean."""

    encoder: Tensor  # (features, width)
    encoder_bias: Tensor  # (features,)
    decoder: Tensor  # (features, width), rows of length 1
    decoder_bias: Tensor  # (width,)

    def encode(self, rows: Tensor) -> Tensor:
        return torch.relu((rows - self.decoder_bias) @ self.encoder.T + self.encoder_bias)

    def decode(self, active: Tensor) -> Tensor:
        return active @ self.decoder + self.decoder_bias


def sae(job: Job) -> Fitted:
    """Raises: SteeringError."""
    point, tokens = HookPoint("resid_post", _layer(job)), job.options.tokens or TOKENS
    found = table(job, [point], "last", positions=tokens)
    train, dev = (_rows(found, point, tokens, is_train) for is_train in (True, False))
    if not len(dev):
        raise SteeringError(f"{', '.join(job.data.names)}: no dev split; give more rows, or rows with a split")
    mean, size = train.mean((0, 1)), float((train - train.mean((0, 1))).square().mean().sqrt())
    learned = _learn(job, (train - mean).flatten(0, 1) / size)
    active, active_dev = (learned.encode((rows - mean) / size) for rows in (train, dev))
    labels, labels_dev = found.labels[found.is_train], found.labels[found.is_dev]
    order = _order(active, labels)
    best, shuffled = int(order[0]), np.random.RandomState(job.options.seed).permutation(labels)
    missed = (learned.decode(active_dev) * size + mean - dev).square().mean()
    score = {
        "layer": point.layer,
        "auc": _auc(active_dev, labels_dev, best),
        "auc_shuffled_labels": _auc(active_dev, labels_dev, int(_order(active, shuffled)[0])),
        "explained": round(1 - float(missed / (dev - mean).square().mean()), 4),
        "active": round(float((active_dev > 0).float().sum(-1).mean()), 2),
        "never_active": int((~(active > 0).flatten(0, 1).any(0)).sum()),
    }
    place = f"resid_post.{point.layer}"
    tensors = {
        f"{place}.encoder": learned.encoder[order] / size,
        f"{place}.encoder_bias": learned.encoder_bias[order],
        f"{place}.decoder": learned.decoder[order] * size,
        f"{place}.decoder_bias": learned.decoder_bias * size + mean,
    }
    usual = float(active[torch.from_numpy(labels == 1)][..., best].max(-1).values.mean())
    job.say(f"feature 0 reads {usual:.2f} at most in texts that show it, on average; steer it by about as much")
    return Fitted({name: tensor.contiguous() for name, tensor in tensors.items()}, score)


def lf_steering(job: Job) -> Fitted:
    """The same, with the features that `lf_steering` puts a bias on. Raises: SteeringError."""
    found = sae(job)
    chosen = list(range(min(job.options.num_features or CHOSEN, len(next(iter(found.tensors.values()))))))
    return replace(found, defaults={"activation": "relu", "features": chosen})


def _layer(job: Job) -> int:
    """Raises: SteeringError."""
    layers = chosen_layers(job.options.layers, job.num_layers) if job.options.layers else [job.num_layers // 2]
    if len(layers) != 1:
        raise SteeringError(f"an autoencoder is of one layer, not of {layers}", "layers")
    return layers[0]


def _rows(found: Table, point: HookPoint, tokens: int, is_train: bool) -> Tensor:
    """(texts, tokens, width) float32."""
    read = [(found.train if is_train else found.dev)(point, position)[0] for position in range(tokens)]
    return torch.from_numpy(np.stack(read, 1))


def _learn(job: Job, rows: Tensor) -> Learned:
    """From (N, width) rows."""
    random, width = torch.Generator().manual_seed(job.options.seed), rows.shape[1]
    num, l1 = job.options.features or width, L1 if job.options.l1 is None else job.options.l1
    decoder = torch.nn.functional.normalize(torch.randn(num, width, generator=random), dim=1)
    params = Learned(decoder.clone(), torch.zeros(num), decoder, torch.zeros(width))
    for each in params:
        each.requires_grad_()
    steps = job.options.steps or STEPS

    def step() -> Tensor:
        some = rows[torch.randint(len(rows), (min(BATCH, len(rows)),), generator=random)]
        active = params.encode(some)
        return (params.decode(active) - some).square().mean() + l1 * active.sum(1).mean()

    def after(number: int, _: float) -> None:
        with torch.no_grad():
            params.decoder.div_(params.decoder.norm(dim=1, keepdim=True).clamp_min(1e-8))
        job.progress("training", number, steps)

    descend(params, [step] * steps, job.options.lr or LR, after)
    return Learned(*(each.detach() for each in params))


def _order(active: Tensor, labels: Ints) -> Ints:
    """Features, first those whose means over a text lie farthest apart, higher in label 1, in deviations within a
    class; rare ones count as if they varied like others. active is (texts, tokens, features)."""
    texts, shows = active.mean(1).double(), torch.from_numpy(labels == 1)
    yes, no = texts[shows], texts[~shows]
    within = ((yes.var(0) * len(yes) + no.var(0) * len(no)) / len(texts)).sqrt()
    apart = (yes.mean(0) - no.mean(0)) / within.clamp_min(float(within.mean()) + 1e-12)
    return np.argsort(-apart.numpy(), kind="stable")


def _auc(active: Tensor, labels: Ints, feature: int) -> float:
    """How well its mean over a text tells the classes apart."""
    return round(separation(active[..., feature].mean(1).double().numpy(), labels).auc, 4)
