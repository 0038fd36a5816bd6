"""Contrastive decoding: what an expert finds likelier than an amateur, among the tokens that it finds plausible.

    s = log p_expert - beta * log p_amateur        where p_expert >= alpha * max p_expert, else -inf

The amateur's logits are divided by its own temperature first; the served model is the expert. Li et al. 2022,
arXiv:2210.15097; alpha = 0.1 and beta = 1 throughout, amateur temperature 0.5 for GPT-2 and 1 for OPT.
"""

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from whipstaff.decoding.method import Params, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term


class ContrastiveParams(Params):
    """Which amateur, how much of it, and how plausible a token must be."""

    method: Literal["contrastive"] = "contrastive"
    amateur: str = Field(description="auxiliary model: the weak one")
    alpha: float = Field(0.1, ge=0, le=1, allow_inf_nan=False, description="share of the best probability; 0 is off")
    beta: float = Field(1.0, ge=0, le=100, allow_inf_nan=False, description="weight of the amateur")
    amateur_temperature: float = Field(1.0, ge=0.01, le=100, allow_inf_nan=False, description="below 1 sharpens it")


class Contrastive(StreamMixer[ContrastiveParams]):
    name, paper = "contrastive", "Li et al. 2022, arXiv:2210.15097"
    params = ContrastiveParams
    stream_fields = ("amateur",)

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None  # its scores are log-probabilities, whatever the weights

    def mix(self, params: ContrastiveParams) -> Mix:
        expert = Term(MAIN, 1.0, log_softmax=True, alpha=params.alpha)
        amateur = Term(Stream(params.amateur), -params.beta, True, params.amateur_temperature)
        return Mix((expert, amateur))
