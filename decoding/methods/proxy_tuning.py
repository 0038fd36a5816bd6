"""Proxy-tuning: move a large model's logits by what tuning did to a small one.

    s = base + alpha * (expert - antiexpert)        raw logits, cut to the base's vocabulary, float32

The expert may see the prompt as a chat, or another prompt. Liu et al. 2024, arXiv:2401.08565, eq. 1; greedy and
alpha = 1 in all of its evaluations.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from whipstaff.decoding.method import Companion, Content, DecodingError, Params, Source, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term


class ProxyTuningParams(Params):
    """Which pair of auxiliary models, how far to move, and what each sees."""

    method: Literal["proxy_tuning"] = "proxy_tuning"
    expert: str = Field(description="auxiliary model: the small tuned one")
    antiexpert: str = Field(description="auxiliary model: the small one before tuning")
    alpha: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False, description="0 changes nothing")
    expert_chat: bool = Field(False, description="show the expert the prompt as a chat's user message")
    expert_prompt: Content | None = Field(None, description="show the expert this prompt instead")
    antiexpert_prompt: Content | None = Field(None, description="show the antiexpert this prompt instead")


class ProxyTuning(StreamMixer[ProxyTuningParams]):
    name, paper = "proxy_tuning", "Liu et al. 2024, arXiv:2401.08565, eq. 1"
    params = ProxyTuningParams
    stream_fields = ("expert", "antiexpert")

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> ProxyTuningParams:
        return ProxyTuningParams(expert=streams[0], antiexpert=streams[1], alpha=0.0)

    def is_off(self, params: ProxyTuningParams) -> bool:
        return params.alpha == 0

    def mix(self, params: ProxyTuningParams) -> Mix:
        if params.expert == params.antiexpert:
            raise DecodingError("expert and antiexpert are the same model: their difference is zero", "antiexpert")
        if params.expert_chat and params.expert_prompt is not None:
            raise DecodingError("the expert sees one prompt", "expert_chat")
        own = params.expert_chat or params.expert_prompt is not None, params.antiexpert_prompt is not None
        expert = Term(Stream(params.expert, int(own[0])), params.alpha)
        antiexpert = Term(Stream(params.antiexpert, sum(own) if own[1] else 0), -params.alpha)
        return Mix((Term(MAIN, 1.0), expert, antiexpert))

    def companions(self, params: ProxyTuningParams, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        found = [Companion(source.as_chat("expert_chat"), "expert_chat")] if params.expert_chat else []
        others = {"expert_prompt": params.expert_prompt, "antiexpert_prompt": params.antiexpert_prompt}
        return [*found, *(Companion(source.encode(one, name), name) for name, one in others.items() if one is not None)]
