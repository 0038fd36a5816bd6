"""Gated attention to learned tokens beside the model's own:

    z_h <- z_h + scale * gate_h * softmax(q_h K_h^T / sqrt(head_dim)) V_h      K = W_k E, V = W_v E

with the layer's weights, q rotated and K not. LLaMA-Adapter has tokens E and one gate per layer, Aligner one E for all
layers and a gate per head. The engine computes it; there is nothing to edit.
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.attention import AttentionEdit, AttentionMethod, SideTokens
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.shape import ModelShape

MAX_TOKENS = 64


class SideAttention(AttentionMethod[Scaled]):
    name, paper = "side_attention", "Zhang et al. 2023, arXiv:2303.16199; Ziheng et al. 2023, arXiv:2312.05503"
    params, sites, where = Scaled, ("attn_head",), "all"
    ability = "side"
    off: ClassVar = {"scale": 0.0}
    parts: ClassVar = {"tokens": ("num_tokens", "hidden"), "gate": ("num_gates",)}

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        num_tokens, num_gates = len(tensors["tokens"]), len(tensors["gate"])
        if not 1 <= num_tokens <= MAX_TOKENS:
            raise SteeringError(f"layer {point.layer} has {num_tokens} tokens, wanted 1 to {MAX_TOKENS}")
        if num_gates not in (1, model.num_heads):
            raise SteeringError(f"layer {point.layer} has {num_gates} gates, wanted 1 or {model.num_heads}")

    def is_off(self, params: Scaled) -> bool:
        return params.scale == 0

    def attention_edits(
        self, params: Scaled, tensors: Mapping[HookPoint, Tensors], prompt_len: int
    ) -> Iterator[AttentionEdit]:
        tokens, gates = ({point.layer: parts[part] for point, parts in tensors.items()} for part in ("tokens", "gate"))
        yield SideTokens(tokens, gates, params.scale)
