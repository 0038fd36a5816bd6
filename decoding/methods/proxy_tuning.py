"""Proxy-tuning: move a large model's logits by what tuning did to a small one.

    s = base + alpha * (expert - antiexpert)        raw logits, cut to the base's vocabulary, float32

Liu et al. 2024, arXiv:2401.08565, eq. 1; greedy and alpha = 1 in all of its evaluations.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from whipstaff.decoding.method import DecodingError, Mixing, Params
from whipstaff.decoding.mix import Mix


class ProxyTuningParams(Params):
    """Which pair of auxiliary models, and how far to move."""

    method: Literal["proxy_tuning"] = "proxy_tuning"
    expert: str = Field(description="auxiliary model: the small tuned one")
    antiexpert: str = Field(description="auxiliary model: the small one before tuning")
    alpha: float = Field(1.0, ge=-100, le=100, allow_inf_nan=False, description="0 changes nothing")


class ProxyTuning(Mixing[ProxyTuningParams]):
    name, paper = "proxy_tuning", "Liu et al. 2024, arXiv:2401.08565, eq. 1"
    params = ProxyTuningParams
    stream_fields = ("expert", "antiexpert")

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> ProxyTuningParams:
        return ProxyTuningParams(expert=streams[0], antiexpert=streams[1], alpha=0.0)

    def mix(self, params: ProxyTuningParams) -> Mix:
        if params.expert == params.antiexpert:
            raise DecodingError("expert and antiexpert are the same model: their difference is zero", "antiexpert")
        return Mix.of({params.expert: params.alpha, params.antiexpert: -params.alpha})
