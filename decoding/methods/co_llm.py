"""Co-LLM: at some tokens the model steps aside for an assistant.

    d = w . h + bias;  P = sigmoid(d)                       h the last hidden state
    s = assistant                                           where P > threshold and strategy "defer"
    s = log((1 - P) p_base + P p_assistant)                 where P > threshold and strategy "compose"
    s = base                                                elsewhere

The threshold may start at 1 and reach its value after `warmup_tokens` tokens. The authors take the assistant's best
token; here later stages see its logits. Shen et al. 2024, arXiv:2403.03870; thresholds are chosen per task.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from whipstaff.decoding.method import LogitsRewriter, Params
from whipstaff.decoding.rows import Rows


class CoLlmParams(Params):
    """Who helps, and when."""

    method: Literal["co_llm"] = "co_llm"
    assistant: str = Field(description="auxiliary model that is deferred to")
    head: str = Field(description="head of kind defer_head")
    threshold: float = Field(0.5, ge=-1, le=1, allow_inf_nan=False, description="1 never defers, below 0 always")
    strategy: Literal["defer", "compose"] = Field("defer", description="the assistant's logits, or both models'")
    warmup: Literal["none", "linear", "cosine", "exponential"] = Field("none", description="how the threshold starts")
    warmup_tokens: int = Field(15, ge=1, le=100_000, description="generated tokens until the threshold is reached")

    @field_validator("warmup")
    @classmethod
    def _has_a_path(cls, warmup: str, info: ValidationInfo) -> str:
        if warmup == "exponential" and info.data.get("threshold", 0) < 0:
            raise ValueError("an exponential cannot go from 1 to a threshold below 0; take linear or cosine")
        return warmup


def threshold_at(params: CoLlmParams, num_generated: int) -> float:
    """The threshold for the token after `num_generated` others."""
    share, end = num_generated / params.warmup_tokens, params.threshold
    if params.warmup == "none" or share >= 1:
        return end
    if params.warmup == "linear":
        return 1 + (end - 1) * share
    if params.warmup == "cosine":
        return end + (1 - end) / 2 * (math.cos(math.pi * share) + 1)
    return float(end**share)


class CoLlm(LogitsRewriter[CoLlmParams]):
    name, paper = "co_llm", "Shen et al. 2024, arXiv:2403.03870"
    stage, params = "mix", CoLlmParams
    stream_fields = ("assistant",)
    head_fields: ClassVar[Mapping[str, str]] = {"head": "defer_head"}
    needs = frozenset({"hidden"})

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> CoLlmParams:
        return CoLlmParams(assistant=streams[0], head=heads[0], threshold=1.0)

    def is_off(self, params: CoLlmParams) -> bool:
        return params.threshold == 1

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.hidden is not None
        head, logits = rows.heads["head"], rows.logits
        d = (rows.hidden.float() * head["weight"]).sum(1, keepdim=True)  # (R, 1)
        d = d + head["bias"] if "bias" in head else d
        chance = d.sigmoid()
        rows.facts["defer_probability"] = chance[:, 0]
        pairs = zip(settings, rows.num_generated, strict=True)
        is_deferred = chance > rows.column(threshold_at(params, done) for params, done in pairs)
        helped = _as_wide(rows.streams["assistant"].float(), logits.shape[1])
        if any(params.strategy == "compose" for params in settings):
            both = torch.logaddexp(logsigmoid(-d) + logits.log_softmax(1), logsigmoid(d) + helped.log_softmax(1))
            helped = torch.where(rows.column(params.strategy == "compose" for params in settings) > 0, both, helped)
        helped = helped.masked_fill(logits == -torch.inf, -torch.inf)
        can_help = (helped > -torch.inf).any(1, keepdim=True)
        return torch.where(is_deferred & can_help, helped, logits)


def _as_wide(logits: Tensor, vocab: int) -> Tensor:
    """The first `vocab` columns; missing ones are tokens that the assistant does not have."""
    return pad(logits[:, :vocab], (0, max(vocab - logits.shape[1], 0)), value=-torch.inf)
