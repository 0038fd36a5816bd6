"""MoTE: experts that are chosen more often in prompts of one class than in those of another (Dahlke et al. 2025)."""

import numpy as np
import torch

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.contrast import texts_of, words_alone
from whipstaff.steering.fit.heads import best, expert_scores
from whipstaff.steering.fit.job import Fitted, Job, chosen_layers, points_of
from whipstaff.steering.fit.source import Asked


def mote(job: Job) -> Fitted:
    """A file that switches the first class's experts off."""
    num_experts, per_token = job.source.shape.num_experts, job.source.experts_per_token
    if not num_experts or not per_token:
        raise SteeringError("the model has no experts", "model")
    layers = chosen_layers(job.options.layers or "all", job.num_layers)
    points = points_of("router", layers)
    splits = {split: [one for item in job.splits[split] for one in texts_of(job, item)] for split in ("train", "dev")}
    texts = [one for some in splits.values() for one in some]
    counts = np.zeros((len(texts), len(layers), num_experts))
    asked = [Asked(one.rendered.ids, tuple(range(one.rendered.prompt_end))) for one in texts]
    for index, found in enumerate(job.source.read(asked, points)):
        for place, point in enumerate(points):
            chosen = found[point].topk(per_token, dim=1).indices  # (tokens, per_token)
            counts[index, place] = torch.bincount(chosen.flatten(), minlength=num_experts).numpy()
        job.progress("reading", index + 1, len(texts))
    is_class, num_train = [one.label == 1 for one in texts], len(splits["train"])
    scores = expert_scores(counts[:num_train], is_class[:num_train])
    draws = np.random.RandomState(job.options.seed)
    chance = float(expert_scores(counts[:num_train], list(draws.permutation(is_class[:num_train]))).max())
    num = job.options.experts or 10
    top = best(scores, num)
    for place in range(len(layers)):
        if sum(at[0] == place for at in top) > num_experts - per_token:
            raise SteeringError(
                f"layer {layers[place]} would keep fewer than {per_token} experts: fewer --experts", "experts"
            )
    dev = expert_scores(counts[num_train:], is_class[num_train:]) if len(set(is_class[num_train:])) == 2 else None
    job.say("  expert    more often chosen in the class: train, dev")
    for at in top:
        job.say(f"  {layers[at[0]]}.{at[1]:<6} {scores[at]:.4f}  " + ("-" if dev is None else f"{dev[at]:.4f}"))
    job.say(f"  (the most of any expert with shuffled labels: {chance:.4f})")
    if scores[top[0]] <= chance:
        job.warn("no effect beyond noise: shuffled labels have an expert that is as far apart")
    tensors = {}
    for place, layer in enumerate(layers):
        mask = torch.zeros(num_experts)
        mask[[expert for where, expert in top if where == place]] = 1
        if mask.any():
            tensors[f"router.{layer}.off"] = mask
    words = words_alone(job)
    score = {
        "experts": [[layers[place], expert] for place, expert in top],
        "difference": [round(float(scores[at]), 5) for at in top],
        "difference_on_dev": None if dev is None else [round(float(dev[at]), 5) for at in top],
        "most_with_shuffled_labels": round(chance, 5),
        "auc_words_alone": None if words is None else round(words, 4),
    }
    return Fitted(tensors, score)
