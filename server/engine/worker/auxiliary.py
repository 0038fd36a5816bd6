"""Auxiliary models: further causal language models in the same engine, whose logits requests mix into the base's.

Their attention layers register in the base's forward context under a prefix of their own, so vLLM sizes and allocates
KV for all models together and block tables, chunked prefill, prefix caching and preemption are shared.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.utils import replace
from vllm.model_executor.model_loader import get_model

from whipstaff.server.engine.config import auxiliary_config, max_tokens
from whipstaff.server.engine.layout import AuxiliarySpec


def load_auxiliary(spec: AuxiliarySpec, config: VllmConfig) -> tuple[nn.Module, ModelConfig]:
    """Load one auxiliary model into the engine that `config` describes."""
    model_config = auxiliary_config(config.model_config, spec.model, spec.max_len)
    own = replace(config, model_config=model_config, quant_config=None)
    own.compilation_config = config.compilation_config  # one forward context for all models
    with set_current_vllm_config(config), set_model_tag(spec.name):
        return get_model(vllm_config=own, model_config=model_config, prefix=_prefix(spec.name)), model_config


def _prefix(name: str) -> str:
    """A layer prefix for a model: vLLM reads layer numbers out of prefixes, so it may hold no digit."""
    return "aux_" + "".join(chr(ord("a") + int(c)) + "_" if c.isdigit() else c for c in name)


class Auxiliary:
    """One loaded auxiliary model, safe to run on any batch of the base."""

    def __init__(self, spec: AuxiliarySpec, config: VllmConfig, device: torch.device) -> None:
        self.name = spec.name
        model, model_config = load_auxiliary(spec, config)
        self.model: Any = model
        self.hidden_size = int(model_config.get_hidden_size())
        self._last_position = spec.max_len - 1
        self._last_id = int(model_config.get_vocab_size()) - 1
        # A captured graph reads where it read when it was captured, so what the model is given has a place of its own.
        self._ids = torch.zeros(max_tokens(config), dtype=torch.int32, device=device)
        self._positions = torch.zeros(max_tokens(config), dtype=torch.int64, device=device)

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(T, hidden_size). Tokens of requests that do not need this model may lie beyond its context or, in the
        vocabulary's padding, beyond its embeddings; they are clamped, and what comes of them is never read."""
        num_tokens = len(input_ids)
        ids, place = self._ids[:num_tokens], self._positions[:num_tokens]
        hidden: Tensor = self.model(
            input_ids=ids.copy_(input_ids.clamp(max=self._last_id)),
            positions=place.copy_(positions.clamp(max=self._last_position)),
            intermediate_tensors=None,
            inputs_embeds=None,
        )
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocabulary)."""
        logits: Tensor = self.model.compute_logits(hidden)
        return logits
