"""Tiny random models of many architectures, without tokenizers, saved where a test wants them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 320
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.12,
}
_GROUPED = {"num_key_value_heads": 2}
_LATENT = {  # vLLM has kernels for a latent of that size with its positions, and no smaller one
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "q_lora_rank": None,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 64,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
}
ARCHITECTURES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _GROUPED | {"head_dim": 32}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, _GROUPED | {"head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, _GROUPED | {"head_dim": 32, "sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, _GROUPED | {"hidden_size": 128}),
    "deepseek_v2": (DeepseekV2Config, DeepseekV2ForCausalLM, _LATENT),
    "lfm2": (
        Lfm2Config,
        Lfm2ForCausalLM,
        _GROUPED
        | {"hidden_size": 128, "conv_dim": 128, "block_dim": 128, "layer_types": ["conv", "full_attention", "conv"]},
    ),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"hidden_size": 128, "use_parallel_residual": True}),
}


def save(architecture: str, folder: Path, seed: int = 0, **changes: Any) -> str:
    """Write a random checkpoint; the folder as a string."""
    config_class, model_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model_class(config_class(**_SHAPE | own | changes)).save_pretrained(folder)
    return str(folder)
