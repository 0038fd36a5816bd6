"""Tiny random models of many architectures, without tokenizers, saved where a test wants them."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
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
ARCHITECTURES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, _GROUPED | {"head_dim": 32}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, _GROUPED | {"head_dim": 32}),
    "mistral": (MistralConfig, MistralForCausalLM, _GROUPED | {"head_dim": 32, "sliding_window": None}),
    "phi3": (Phi3Config, Phi3ForCausalLM, _GROUPED | {"hidden_size": 128}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {"hidden_size": 128, "use_parallel_residual": True}),
}


def save(architecture: str, folder: Path, seed: int = 0, **changes: Any) -> str:
    """Write a random checkpoint; the folder as a string."""
    config_class, model_class, own = ARCHITECTURES[architecture]
    torch.manual_seed(seed)
    model_class(config_class(**_SHAPE | own | changes)).save_pretrained(folder)
    return str(folder)
