"""Contrastive decoding in logit space, as used for reasoning.

    s = (1 + beta) * expert - beta * amateur        where expert >= log(alpha) + max expert, else -inf

Raw logits; the served model is the expert and the mask looks at it alone. O'Brien & Lewis 2023, arXiv:2309.09117;
alpha = 0.1, beta = 0.5.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from whipstaff.decoding.method import Params, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term


class ContrastiveBetaParams(Params):
    """Which amateur, how far away from it, and how plausible a token must be."""

    method: Literal["contrastive_beta"] = "contrastive_beta"
    amateur: str = Field(description="auxiliary model: the weak one")
    alpha: float = Field(0.1, ge=0, le=1, allow_inf_nan=False, description="share of the best probability; 0 is off")
    beta: float = Field(0.5, ge=0, le=100, allow_inf_nan=False, description="0 leaves only the mask")


class ContrastiveBeta(StreamMixer[ContrastiveBetaParams]):
    name, paper = "contrastive_beta", "O'Brien & Lewis 2023, arXiv:2309.09117"
    params = ContrastiveBetaParams
    stream_fields = ("amateur",)

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> ContrastiveBetaParams:
        return ContrastiveBetaParams(amateur=streams[0], alpha=0.0, beta=0.0)

    def is_off(self, params: ContrastiveBetaParams) -> bool:
        return params.alpha == 0 and params.beta == 0

    def mix(self, params: ContrastiveBetaParams) -> Mix:
        expert = Term(MAIN, 1.0 + params.beta, alpha=params.alpha)
        return Mix((expert, Term(Stream(params.amateur), -params.beta)))
