"""DExperts: the difference of an expert and an antiexpert, on the tokens that the base model finds likely.

    s = base + alpha * (expert - antiexpert)        raw logits; -inf outside the top-p of base

A side that is not named is the base itself, so that one model steers alone. Liu et al. 2021, arXiv:2105.03023;
alpha = 2 against toxicity, 3.2 for sentiment, top-p 0.9 before the mix.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from whipstaff.decoding.method import DecodingError, Params, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term


class DExpertsParams(Params):
    """Which models steer, how far, and among which tokens."""

    method: Literal["dexperts"] = "dexperts"
    expert: str | None = Field(None, description="auxiliary model of what is wanted; none: the base itself")
    antiexpert: str | None = Field(None, description="auxiliary model of what is not wanted; none: the base itself")
    alpha: float = Field(2.0, ge=-100, le=100, allow_inf_nan=False, description="0 leaves only the top-p")
    top_p: float = Field(0.9, gt=0, le=1, allow_inf_nan=False, description="of the base, before mixing; 1 is off")


class DExperts(StreamMixer[DExpertsParams]):
    name, paper = "dexperts", "Liu et al. 2021, arXiv:2105.03023"
    params = DExpertsParams
    stream_fields = ("expert", "antiexpert")
    num_streams = 1

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> DExpertsParams:
        return DExpertsParams(expert=streams[0], alpha=0.0, top_p=1.0)

    def is_off(self, params: DExpertsParams) -> bool:
        return params.alpha == 0 and params.top_p == 1

    def mix(self, params: DExpertsParams) -> Mix:
        if params.expert == params.antiexpert:
            if params.expert is None:
                raise DecodingError("name an expert, an antiexpert or both", "expert")
            raise DecodingError("expert and antiexpert are the same model: their difference is zero", "antiexpert")
        weights = {"": 1.0}
        for model, weight in ((params.expert, params.alpha), (params.antiexpert, -params.alpha)):
            weights[model or ""] = weights.get(model or "", 0.0) + weight
        base = Term(MAIN, weights.pop(""), top_p=params.top_p)
        return Mix((base, *(Term(Stream(model), weight) for model, weight in weights.items())))
