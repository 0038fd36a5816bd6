"""Auxiliary models: further causal language models in the same engine, whose logits requests mix into the base's.

Their attention layers register in the base's forward context under a prefix of their own, so vLLM sizes and allocates
KV for all models together and block tables, chunked prefill, prefix caching and preemption are shared. A forward pass
that runs auxiliary models returns the base's hidden states with theirs beside them and, in two last columns, the row
of the batch that each token belongs to; whatever rows vLLM then asks logits for carry what mixing needs.
"""

from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.backends import set_model_tag
from vllm.config import ModelConfig, VllmConfig, set_current_vllm_config
from vllm.config.utils import replace
from vllm.model_executor.model_loader import get_model

from whipstaff.decoding.mix import mix_rows
from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.layout import AuxiliarySpec
from whipstaff.server.engine.steerer import Steerer

_TAG_BASE = 128  # row = 128 * high + low: both columns are exact even in bfloat16 (256 is its last exact step)
_NUM_TAGS = 2


def auxiliary_config(base: ModelConfig, model: str, max_len: int | None = None) -> ModelConfig:
    """The model config of an auxiliary model; `max_len` None derives it from the model itself."""
    return ModelConfig(
        model=model,
        tokenizer=base.tokenizer,
        skip_tokenizer_init=base.skip_tokenizer_init,
        trust_remote_code=base.trust_remote_code,
        dtype=base.dtype,
        max_model_len=max_len,
        enforce_eager=base.enforce_eager,
        seed=base.seed,
    )


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

    def __init__(self, spec: AuxiliarySpec, config: VllmConfig) -> None:
        self.name = spec.name
        model, model_config = load_auxiliary(spec, config)
        self.model: Any = model
        self.hidden_size = int(model_config.get_hidden_size())
        self._last_position = spec.max_len - 1
        self._last_id = int(model_config.get_vocab_size()) - 1

    def forward(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """(T, hidden_size). Tokens of requests that do not need this model may lie beyond its context or, in the
        vocabulary's padding, beyond its embeddings; they are clamped, and what comes of them is never read."""
        hidden: Tensor = self.model(
            input_ids=input_ids.clamp(max=self._last_id),
            positions=positions.clamp(max=self._last_position),
            intermediate_tensors=None,
            inputs_embeds=None,
        )
        return hidden

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """(rows, vocabulary)."""
        logits: Tensor = self.model.compute_logits(hidden)
        return logits


def compose(base: nn.Module, auxiliaries: list[Auxiliary], steerer: Steerer, hidden_size: int) -> None:
    """Teach the base model to run auxiliary models where a step needs them, and to mix their logits."""
    cls: Any = type(base)
    by_name = {auxiliary.name: auxiliary for auxiliary in auxiliaries}

    class Composite(cls):
        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            hidden = cls.forward(self, input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            names = steerer.needed_auxiliaries()
            if not names:
                return hidden
            if input_ids is None:
                raise UnsupportedEngine("auxiliary models need token ids, and this step has embeddings only")
            beside = [by_name[name].forward(input_ids, positions) for name in names]
            if steerer.view is None:  # profiling or capture: they ran, nobody mixes
                return hidden
            self.whipstaff_mix = names, steerer.row_weights(names)
            return torch.cat([hidden, *beside, _tags(steerer.token_rows(), hidden)], dim=-1)

        def compute_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            if hidden.shape[-1] == hidden_size:
                logits: Tensor | None = cls.compute_logits(self, hidden, *args, **kwargs)
                return logits
            names, row_weights = self.whipstaff_mix
            widths = [hidden_size, *(by_name[name].hidden_size for name in names), _NUM_TAGS]
            own, *others, tags = torch.split(hidden, widths, dim=-1)
            logits = cls.compute_logits(self, own.contiguous(), *args, **kwargs)
            streams = [
                by_name[name].compute_logits(part.contiguous()) for name, part in zip(names, others, strict=True)
            ]
            if logits is None:  # tensor parallel: another rank samples
                return None
            return mix_rows(logits, streams, row_weights.to(hidden.device)[_rows(tags)])

    Composite.__name__, Composite.__qualname__ = cls.__name__, cls.__qualname__
    Composite.__module__ = cls.__module__
    base.__class__ = Composite


def _tags(rows: Tensor, like: Tensor) -> Tensor:
    """(T, 2) columns that name each token's row of the batch; tokens of padding get row 0."""
    tags = torch.zeros(like.shape[0], _NUM_TAGS, dtype=like.dtype)
    tags[: len(rows), 0] = (rows // _TAG_BASE).to(like.dtype)
    tags[: len(rows), 1] = (rows % _TAG_BASE).to(like.dtype)
    return tags.to(like.device, non_blocking=True)


def _rows(tags: Tensor) -> Tensor:
    """The row that each pair of tags names."""
    high, low = tags.to(torch.int64).unbind(-1)
    return high * _TAG_BASE + low
