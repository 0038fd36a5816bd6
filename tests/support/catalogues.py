"""What a server may have loaded, for tests of what requests compile to; and ways to compile them."""

from typing import Any

import pytest
import torch
from torch import Tensor

from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.admission.receipt import receipt as receipt_of
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.errors import (
    WhipstaffError,
)
from whipstaff.server.plan import PlacedRequest
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.fed import Fed
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.shape import SITES, ModelShape

SHAPE = ModelShape(architecture="Test", hidden_size=8, num_layers=4, num_heads=2, head_dim=4, num_kv_heads=2)
SPARSE_SHAPE = SHAPE.model_copy(update={"num_experts": 4})
TENSORS = {
    "resid_post.1.add": torch.linspace(-1, 1, 8),
    "resid_post.3.add": torch.full((8,), 0.1),
    "resid_post.3.gain": torch.full((8,), -1.0),
    "attn_head.0.add": torch.arange(8.0).reshape(2, 4),
}
UNIT = torch.eye(8)
NTH = ("first", "second")
HEADS = torch.arange(8.0).reshape(2, 4)
CODES = {"encoder": UNIT[:5], "decoder": UNIT[:5]}
MANY = torch.arange(320.0).reshape(40, 8) / 320
FILES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "calm": ({"method": "vector", "scale": 3.0}, TENSORS),
    "late": ({"method": "caa", "where": "generation"}, {"resid_post.2.add": torch.ones(8)}),
    "strange": ({"method": "a method of somebody's own"}, {"resid_post.2.add": torch.ones(8)}),
    "iti": ({"method": "iti"}, {"attn_head.1.direction": HEADS, "attn_head.1.sigma": torch.tensor([0.0, 2.0])}),
    "lofit": ({"method": "lofit"}, {"attn_head.2.A": HEADS, "attn_head.2.v": HEADS}),
    "ablate": ({"method": "directional_ablation"}, {"direction": UNIT[0]}),
    "knob": ({"method": "context_knob"}, {"resid_post.2.basis": UNIT[:2]}),
    "turn": ({"method": "tarot"}, {"attn_head.1.angles": torch.full((2, 2), 1.0)}),
    "sae": ({"method": "sae"}, {f"resid_post.2.{part}": tensor for part, tensor in CODES.items()}),
    "headsae": ({"method": "sae"}, {f"attn_head.1.{part}": t.reshape(5, 2, 4) for part, t in CODES.items()}),
    "manysae": ({"method": "sae"}, {"resid_post.2.encoder": MANY, "resid_post.2.decoder": MANY + 1}),
    "rows": ({"method": "actadd"}, {"resid_pre.1.rows": UNIT[:3]}),
    "angular": ({"method": "angular"}, {f"attn_in.1.{which}_direction": UNIT[i] for i, which in enumerate(NTH)}),
    "plane": ({"method": "angular"}, {f"mlp_in.1.{which}_direction": UNIT[i] for i, which in enumerate(NTH)}),
    "probe": ({"method": "probe"}, {"resid_post.0.direction": UNIT[0], "resid_post.0.bias": torch.tensor(0.5)}),
    "probes": ({"method": "probe"}, {f"resid_post.{layer}.direction": UNIT[layer] for layer in range(2)}),
    "soft": ({"method": "soft_prompt"}, {"rows": UNIT[:3]}),
    "prefix": (
        {"method": "prefix_kv"},
        {f"attn_head.{layer}.{part}": torch.ones(2, 2, 4) for layer in range(4) for part in ("key", "value")},
    ),
    "router": ({"method": "vector", "model": SPARSE_SHAPE}, {"router.1.add": torch.ones(4)}),
    "wide": (
        {"method": "caa", "model": SHAPE.model_copy(update={"hidden_size": 16})},
        {"resid_post.0.add": torch.ones(16)},
    ),
}
LIMITS = {"expert": 64, "anti": 64, "short": 10}
HOOKED = ("resid_pre", "resid_post", "attn_head", "attn_out", "mlp_out", "mlp_in")  # not attn_in, not router
PLACES = frozenset(HookPoint(site, layer).canonical for site in SITES if site in HOOKED for layer in range(4))


def compiled(caps: Capabilities, **fields: Any) -> CompiledRequest:
    result = compile_extras(fields, caps)
    assert result is not None
    return result


def refusal(caps: Capabilities, **fields: Any) -> WhipstaffError:
    with pytest.raises(WhipstaffError) as caught:
        compile_extras(fields, caps)
    return caught.value


def plan_of(caps: Capabilities, *entries: Any) -> SteeringPlan:
    plan = compiled(caps, steering=list(entries)).plan.steering
    assert plan is not None
    return plan


def receipt(caps: Capabilities, entry: Any, fed: list[Fed] | None = None) -> dict[str, Any]:
    (said,) = receipt_of(compiled(caps, steering=entry), fed=fed or [])["steering"]
    return dict(said)


def at_prompt(made: CompiledRequest, prompt: Prompt, max_tokens: int = 4, is_explicit: bool = True) -> PlacedRequest:
    return made.at_prompt(prompt, lambda _: max_tokens, is_explicit)


def check(made: CompiledRequest, prompt_len: int = 9, max_tokens: int = 4, is_explicit: bool = True) -> int:
    """How many tokens may follow a prompt of some tokens."""
    prompt = Prompt(prompt_len, list(range(prompt_len)), 64, None)
    return at_prompt(made, prompt, max_tokens, is_explicit).max_tokens


PAIR = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}
WHEN = {"probe": "probe", "above": 0.25}
MIXED: list[dict[str, Any]] = [
    {"vector": "calm", "layers": [1], "where": {"prompt": [[0, -1]], "exclude": {"prompt": [[2, 3]]}}, "when": WHEN},
    {"vector": "sae", "features": [{"feature": 2, "set": 4.0}], "schedule": {"shape": "linear", "tokens": 8}},
    {"vector": "iti", "when": {"probe": "probe", "below": 1, "release": 2, "decide": "step"}, "renorm": True},
    {"vector": "late", "schedule": {"shape": "entropy", "low": 0.5, "high": 2}, "normalize": True},
    {"vector": "rows", "location": "back"},
    {"vector": "late", "where": {"tokens": [5, 6]}},
]
SPARSE = {"feature": 0, "set": 1}
PASTA = {"method": "pasta", "heads": {"0": [0]}, "spans": [[0, 1]]}
MOTE = {"method": "mote", "experts": {"1": {"off": [0]}}}
