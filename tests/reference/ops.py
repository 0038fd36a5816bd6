"""Edits as loops over rows, in float64, and greedy decoding with them in plain transformers: hooks only, no cache.

An edit is told by its attributes, as `whipstaff.steering.ops` names them; nothing of ours is imported.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Edit:
    """Ops at one place, at the positions that `touches` selects; with `renorm`, rows keep their length."""

    site: str
    layer: int
    ops: Sequence[Any]
    touches: Callable[[int, int], bool]  # (position, prompt length) -> bool
    renorm: bool = False


def edited(x: Tensor, ops: Sequence[Any], renorm: bool = False) -> Tensor:
    """One row (width,) float64 after the ops, in order."""
    before = x
    for op in ops:
        if hasattr(op, "stride"):
            x = _crossed(x, op)
        elif hasattr(op, "phi"):
            x = _directed(x, op)
        else:
            x = x * (1 if op.mul is None else op.mul.double()) + (0 if op.add is None else op.add.double())
    if renorm and x.norm() > 0:
        x = x * before.norm() / x.norm()
    return x


def _crossed(x: Tensor, op: Any) -> Tensor:
    partner = torch.tensor([i ^ op.stride for i in range(len(x))])
    return op.mul.double() * x + op.cross.double() * x[partner]


def _directed(x: Tensor, op: Any) -> Tensor:
    if op.norm == "constant_norm":
        back = x.norm() / math.sqrt(len(x))
        seen = x / back
    elif op.norm == "layer_norm":
        back = x.std()  # unbiased
        seen = (x - x.mean()) / (back + 1e-5)
    else:
        back, seen = torch.ones(()), x
    num = len(op.phi)
    z = torch.zeros(num, dtype=torch.float64) if op.read is None else op.read.double() @ seen
    if op.bias is not None:
        z = z + op.bias.double()
    least = -math.inf
    if op.top_k is not None:
        least = (op.top_k.encoder.double() @ seen + op.top_k.bias.double()).topk(op.top_k.k).values[-1].item() - 1e-9
    change = torch.zeros_like(x)
    for r in range(num):
        pair = z[r - r % 2 : r - r % 2 + 2]
        change += _phi(op.phi[r].name, float(z[r]), pair, r % 2, op.args[r].tolist(), least) * op.write[r].double()
    if op.replacement is not None:
        mean = x.mean() if op.norm == "layer_norm" else 0.0
        bias = 0.0 if op.replacement.bias is None else op.replacement.bias.double()
        return x + op.replacement.scale * (back * (change + bias) + mean - x)
    return x + back * change


def _phi(name: str, z: float, pair: Tensor, half: int, args: list[float], least: float) -> float:
    a, b, c, d = args
    match name:
        case "AFFINE":
            return a * z + b
        case "SET":
            return a - z
        case "GATED":
            return b * z + c if z > a else d
        case "TOP_K":
            return b * z + c if z > a and z >= least else d
        case "TANH":
            return a * math.tanh(z)
        case "SILU":
            return a * z / (1 + math.exp(-z))
        case "SIGN":
            return a * ((z > 0) - (z < 0))
        case "ANGLE":
            target = float(pair.norm()) * (math.cos(a), math.sin(a))[half]
            return target - z if pair[0] > b else 0.0
    raise ValueError(name)


def logits(model: nn.Module, ids: list[int], prompt_len: int, edits: Sequence[Edit]) -> Tensor:
    """(len(ids), V) logits of one sequence under the edits."""
    with torch.no_grad(), hooked(model, prompt_len, edits):
        found: Tensor = model(torch.tensor([ids]), use_cache=False).logits[0]
        return found


def greedy(model: nn.Module, prompt: list[int], num_tokens: int, edits: Sequence[Edit]) -> tuple[list[int], Tensor]:
    """Greedy tokens, and the logits (num_tokens, V) that each was chosen from."""
    generated: list[int] = []
    rows: list[Tensor] = []
    for _ in range(num_tokens):
        rows.append(logits(model, prompt + generated, len(prompt), edits)[-1])
        generated.append(int(rows[-1].argmax()))
    return generated, torch.stack(rows)


@contextmanager
def hooked(model: nn.Module, prompt_len: int, edits: Sequence[Edit]) -> Iterator[None]:
    """The model with its edits."""
    sites: dict[tuple[str, int], list[Edit]] = {}
    for edit in edits:
        sites.setdefault((edit.site, edit.layer), []).append(edit)
    with ExitStack() as hooks:
        for (site, layer), mine in sites.items():
            hooks.callback(_hook(model, site, layer, mine, prompt_len).remove)
        yield


def _hook(model: Any, site: str, layer: int, edits: list[Edit], prompt_len: int) -> Any:
    def change(x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).double()
        for position in range(len(rows)):
            for edit in edits:
                if edit.touches(position, prompt_len):
                    rows[position] = edited(rows[position], edit.ops, edit.renorm)
        return rows.to(x.dtype).view(x.shape)

    def of_input(module: nn.Module, args: Any, kwargs: Any) -> Any:
        if args:
            return (change(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}

    def of_output(module: nn.Module, args: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else (change(output[0]), *output[1:])

    def of_router(module: Any, args: Any, output: Any) -> Any:
        router_logits = change(output[0])
        weights, chosen = router_logits.float().softmax(-1).topk(module.top_k)
        return router_logits, weights / weights.sum(-1, keepdim=True), chosen

    module = _module(model, site, layer)
    if site == "router":
        return module.register_forward_hook(of_router)
    if site in ("resid_pre", "attn_in", "attn_head", "mlp_in"):
        return module.register_forward_pre_hook(of_input, with_kwargs=True)
    return module.register_forward_hook(of_output)


def _module(model: Any, site: str, layer: int) -> nn.Module:
    """The module whose input or output a site is, by each family's own names."""
    if hasattr(model, "transformer"):  # GPT-2
        block = model.transformer.h[layer]
        attention, projection, mlp = block.attn, block.attn.c_proj, block.mlp
    elif hasattr(model, "gpt_neox"):
        block = model.gpt_neox.layers[layer]
        attention, projection, mlp = block.attention, block.attention.dense, block.mlp
    else:
        block = (model.backbone if hasattr(model, "backbone") else model.model).layers[layer]
        attention = getattr(block, "self_attn", None)
        projection = getattr(attention, "o_proj", None) or getattr(attention, "out_proj", None)
        mlp = getattr(block, "mlp", None) or getattr(block, "feed_forward", None)
    if site == "router":
        found: Any = mlp.gate
    else:
        found = {
            "resid_pre": block,
            "resid_post": block,
            "attn_in": attention,
            "attn_head": projection,
            "attn_out": attention,
            "mlp_in": mlp,
            "mlp_out": mlp,
        }[site]
    assert isinstance(found, nn.Module), site
    return found
