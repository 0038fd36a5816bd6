"""Recipes that learn by gradients: SITE's mixing, LoFiT's heads, the ReFT family, and soft prompts."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import heads, icl
from whipstaff.steering.fit.data import Item
from whipstaff.steering.fit.job import Fitted, Job, chosen_layers, points_of
from whipstaff.steering.fit.render import Rendered
from whipstaff.steering.fit.source import Entry
from whipstaff.steering.fit.training import answer_log_p, descend, local, score_of, train
from whipstaff.steering.method import HookPoint
from whipstaff.steering.methods.reft import where_of

INIT = 1e-3  # LoFiT's standard deviation
KINDS = ("responses", "demos", "questions")


def example(job: Job, item: Item) -> list[tuple[Rendered, str]]:
    row = item.row
    if job.data.kind == "questions":
        return [(job.template.render(row.asked, row.best or row.right[0]), "response-mean")]
    prompt, response = (row.input, row.output) if job.data.kind == "demos" else (row.prompt, row.response)
    return [(job.template.render(prompt, response), "response-mean")]


# ---- SITE


def mixing(task: dict[int, Tensor], logits: dict[int, Tensor]) -> Entry:
    """SITE's edit with alpha = sigmoid(logits).

    Args:
        task: layer -> (heads, head_dim); logits: layer -> (heads,).
    """
    points = {HookPoint("attn_head", layer): {"task": task[layer], "alpha": logits[layer].sigmoid()} for layer in task}
    return Entry("site", points, {})


def first_token(job: Job, prompted: Sequence[icl.Prompted], entries: Sequence[Entry]) -> Tensor:
    """Mean nats of the answers' first tokens."""
    texts = [((*each.ids, each.target), len(each.ids)) for each in prompted]
    return torch.cat(answer_log_p(local(job), texts, entries)).mean().neg()


def site(job: Job) -> Fitted:
    """Heads move towards what they give after demonstrations, each as far as zero-shot answers ask for."""
    model, prompts = local(job), icl.Prompts(job)
    if not prompts.dev:
        raise SteeringError(f"{', '.join(job.data.names)}: the dev split has no demonstration")
    layers = chosen_layers(job.options.layers or "all", job.num_layers)
    shape = (model.shape.num_heads, model.shape.head_dim)
    found = icl.means(job, prompts.drawn(job.options.trials or 50), points_of("attn_head", layers), "reading heads")
    task = {point.layer: each.view(shape).float() for point, each in found.items()}
    logits = {layer: torch.zeros(shape[0], requires_grad=True) for layer in layers}
    dev = prompts.zero_shot
    plain, few = icl.accuracy(job, dev), icl.accuracy(job, [prompts.few_shot(demo) for demo in prompts.dev])
    num, best, kept = (
        job.options.steps or 400,
        [math.inf],
        {layer: each.detach().clone() for layer, each in logits.items()},
    )
    untrained = float(first_token(job, dev, [mixing(task, logits)]).detach())

    def step() -> Tensor:
        return first_token(job, [prompts.prompt(prompts.random.choice(prompts.train))], [mixing(task, logits)])

    def after(number: int, value: float) -> None:
        job.progress("training", number, num)
        if number % 50 and number < num:
            return
        with torch.no_grad():
            now = float(first_token(job, dev, [mixing(task, logits)]))
        if now < best[0]:  # the release never updates its best, and keeps the last
            best[0] = now
            for layer, each in logits.items():
                kept[layer].copy_(each.detach())

    descend(list(logits.values()), [step] * num, job.options.lr or 0.2, after)
    alpha = {layer: each.sigmoid() for layer, each in kept.items()}
    reached = icl.accuracy(job, dev, [mixing(task, kept)])
    job.say(f"first token right on dev: {plain:.3f} plain, {reached:.3f} mixed, {few:.3f} with demonstrations")
    if reached <= plain:
        job.warn("no effect beyond noise: no more answers are right than without it")
    whole = torch.stack(list(alpha.values()))
    score = {
        "accuracy": round(reached, 4),
        "accuracy_zero_shot": round(plain, 4),
        "accuracy_few_shot": round(few, 4),
        "dev_loss_untrained": round(untrained, 4),
        "dev_loss_kept": round(best[0], 4),
        "alpha_near_0_or_1": round(float(((whole < 0.1) | (whole > 0.9)).float().mean()), 4),
        "shots": prompts.shots,
    }
    tensors = {f"attn_head.{layer}.task": task[layer] for layer in layers}
    tensors |= {f"attn_head.{layer}.alpha": alpha[layer] for layer in layers}
    return Fitted(tensors, score, job.options.scale)


# ---- LoFiT


def lofit(job: Job) -> Fitted:
    """Stage 1 learns how every head would be scaled, and keeps those that ask for most; stage 2 learns what is
    added to those, from the start."""
    model = local(job)
    layers = chosen_layers(job.options.layers or "all", job.num_layers)
    shape = (model.shape.num_heads, model.shape.head_dim)
    draws = torch.Generator().manual_seed(job.options.seed)
    scaling = {layer: (INIT * torch.randn(*shape, generator=draws)).requires_grad_() for layer in layers}

    def scaled() -> list[Entry]:
        return [Entry("lofit", {HookPoint("attn_head", layer): {"A": each} for layer, each in scaling.items()}, {})]

    l1 = 5e-4 if job.options.l1 is None else job.options.l1
    number = job.options.epochs or 5
    first = train(
        job,
        list(scaling.values()),
        scaled,
        job.options.lr or 5e-3,
        number,
        "choosing heads",
        lambda: l1 * torch.stack([each.abs().sum() for each in scaling.values()]).sum(),
    )
    lengths = heads.by_length(torch.stack([each.detach() for each in scaling.values()]).numpy())
    num = min(job.options.num_heads or max(1, lengths.size // 10), lengths.size)
    top = heads.best(lengths, num)
    job.say(f"heads {', '.join(f'{layers[index]}.{head}' for index, head in top)}")
    added = [(INIT * torch.randn(shape[1], generator=draws)).requires_grad_() for _ in top]

    def placed() -> dict[HookPoint, dict[str, Tensor]]:
        found = {}
        for index in sorted({index for index, _ in top}):
            rows = [torch.zeros(shape[1])] * shape[0]
            for (where, head), each in zip(top, added, strict=True):
                if where == index:
                    rows[head] = each
            found[HookPoint("attn_head", layers[index])] = {"v": torch.stack(rows)}
        return found

    second = train(job, added, lambda: [Entry("lofit", placed(), {})], job.options.lr or 1e-2, number, "training")
    score = score_of(job, second) | {
        "heads": [[layers[index], head] for index, head in top],
        "dev_loss_of_scaling": round(first.kept, 4),
    }
    tensors = {f"attn_head.{point.layer}.v": parts["v"].detach() for point, parts in placed().items()}
    return Fitted(tensors, score, job.options.scale)


# ---- ReFT

_PARTS: dict[str, tuple[str, ...]] = {
    "loreft": ("weight", "bias", "rotate"),
    "direft": ("weight", "bias", "rotate"),
    "noreft": ("weight", "bias", "project", "project_bias"),
    "nodireft": ("weight", "bias", "project"),
    "consreft": ("bias", "rotate"),
    "lobireft": ("bias", "rotate"),
}
REFT = tuple(_PARTS)


def reft(method: str) -> Callable[[Job], Fitted]:
    return lambda job: _reft(job, method)


def _reft(job: Job, method: str) -> Fitted:
    model, rank = local(job), job.options.rank or 4
    layers = chosen_layers(job.options.layers or str(job.num_layers // 2), job.num_layers)
    if rank > model.shape.hidden_size:
        raise SteeringError(f"the stream is {model.shape.hidden_size} wide", "rank")
    said = job.options.positions or "f1+l1"
    where = where_of(said)
    draws = torch.Generator().manual_seed(job.options.seed)
    raw = {
        layer: {part: _start(part, rank, model.shape.hidden_size, draws) for part in _PARTS[method]} for layer in layers
    }

    def parts_of(layer: int) -> dict[str, Tensor]:
        return {part: _orthonormal(each) if part == "rotate" else each for part, each in raw[layer].items()}

    def entries() -> list[Entry]:
        return [Entry(method, {HookPoint("resid_post", layer): parts_of(layer) for layer in layers}, {}, where)]

    params = [each for parts in raw.values() for each in parts.values()]
    course = train(job, params, entries, job.options.lr or 5e-3, job.options.epochs or 5)
    tensors = {
        f"resid_post.{layer}.{part}": each.detach() for layer in layers for part, each in parts_of(layer).items()
    }
    score = score_of(job, course) | {"rank": rank, "positions": said}
    return Fitted(tensors, score, job.options.scale, where=where)


def _start(part: str, rank: int, width: int, draws: torch.Generator) -> Tensor:
    """As pyreft starts: linear layers as torch does, what is added nothing yet where nothing else holds it back."""
    if part in ("bias", "project_bias"):
        return torch.zeros(rank, requires_grad=True)
    if part == "rotate":
        return torch.randn(rank, width, generator=draws).requires_grad_()
    return ((2 * torch.rand(rank, width, generator=draws) - 1) / math.sqrt(width)).requires_grad_()


def _orthonormal(rows: Tensor) -> Tensor:
    """(rank, width) orthonormal rows that span the same; gradients go through."""
    basis, upper = torch.linalg.qr(rows.T)
    signs = upper.diagonal().sign()
    found: Tensor = (basis * torch.where(signs == 0, 1.0, signs)).T
    return found


# ---- soft prompts


def soft_prompt(job: Job) -> Fitted:
    """Rows before the prompt, which begin as embeddings of words: those of `text`, over and over, or of any tokens.
    Lester et al. 2021, arXiv:2104.08691."""
    model, said = local(job), job.options.text
    if said is None:
        draws = torch.Generator().manual_seed(job.options.seed)
        num = job.options.rows or 8
        ids = torch.randint(len(model.tokenizer), (num,), generator=draws).tolist()
    else:
        own = model.tokenizer.encode(said, add_special_tokens=False)
        num = job.options.rows or len(own)
        ids = [own[index % len(own)] for index in range(num)]
    rows = model.embeddings_of(ids).requires_grad_()

    def entries() -> list[Entry]:
        return [Entry("soft_prompt", {}, {}, rows=rows)]

    course = train(job, [rows], entries, job.options.lr or 1e-2, job.options.epochs or 5)
    return Fitted({"rows": rows.detach()}, score_of(job, course) | {"rows": num})
