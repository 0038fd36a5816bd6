"""Mirostat 2: hold the surprise of the text near a target.

    keep -log2 p <= mu, and the best token always;  after drawing x:  mu <- mu - eta * (-log2 q(x) - tau)

mu starts at 2 * tau. q is the distribution that x was drawn from: truncated, and summing to one. Basu et al. 2021,
arXiv:2007.14966, algorithm 2; tau = 5 bits and eta = 0.1 as in llama.cpp.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from whipstaff.cuda_ext import cut_rows_
from whipstaff.decoding.method import LogitsRewriter, Params
from whipstaff.decoding.rows import Rows


class MirostatParams(Params):
    """The target, and how fast to go there."""

    method: Literal["mirostat"] = "mirostat"
    mode: Literal[0, 2] = Field(2, description="llama.cpp's numbers: 2 is mirostat 2, 0 is off")
    tau: float = Field(5.0, ge=0, le=100, allow_inf_nan=False, description="target surprise in bits")
    eta: float = Field(0.1, ge=0, le=10, allow_inf_nan=False, description="learning rate; 0 stays at 2 * tau")

    @field_validator("mode", mode="before")
    @classmethod
    def _is_served(cls, mode: Any) -> Any:
        if mode == 1:
            raise ValueError("mirostat 1 is not served; 2 is, and 0 is off")
        return mode


class Mirostat(LogitsRewriter[MirostatParams]):
    name, paper = "mirostat", "Basu et al. 2021, arXiv:2007.14966, algorithm 2"
    stage, params = "truncation", MirostatParams
    example: ClassVar[Mapping[str, Any]] = {"tau": 0.5}
    shorthands: ClassVar[Mapping[str, str]] = {
        "mirostat": "mode",
        "mirostat_mode": "mode",
        "mirostat_tau": "tau",
        "mirostat_eta": "eta",
    }
    switches = (frozenset({"mode"}),)
    state_size = 1  # mu
    keeps_greedy = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> MirostatParams:
        return MirostatParams(mode=0)

    def is_off(self, params: MirostatParams) -> bool:
        return params.mode == 0

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.state is not None
        logits, mu = rows.logits, rows.state
        start = rows.column(2 * params.tau for params in settings)
        mu.copy_(torch.where(mu.isnan(), start, mu))
        best, log_p = rows.best()  # which stays
        least = best + (-math.log(2) * mu[:, 0] - log_p).clamp(max=0)
        is_on = rows.column(params.mode == 2 for params in settings)[:, 0] > 0
        cut_rows_(logits, least.masked_fill(~is_on, -torch.inf))
        return logits

    def note(self, rows: Rows, settings: Sequence[Any], sampled: Tensor) -> None:
        assert rows.state is not None
        surprise = rows.logits.log_softmax(1).gather(1, sampled[:, None]) / -math.log(2)
        excess = surprise - rows.column(params.tau for params in settings)
        rows.state.sub_(rows.column(params.eta for params in settings) * excess)
