"""Entropy-based dynamic temperature: cold where the model is sure, warm where it is not.

    tau = t0 * n ** (theta / H)        H = -sum p log p in nats, before any temperature

Below 1e-4 the best token alone is left. Takes the place of the request's temperature. Zhang et al. 2024,
arXiv:2403.14541; n = 0.8, while t0 and theta are tuned per task.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import explain_rows
from whipstaff.decoding.method import LogitsRewriter, Params
from whipstaff.decoding.rows import Rows
from whipstaff.decoding.sampler import apply_temperature

_COLDEST = 1e-4


class EdtParams(Params):
    """The highest temperature, and how entropy lowers it."""

    method: Literal["edt"] = "edt"
    t0: float = Field(0.6, ge=0, le=100, allow_inf_nan=False, description="temperature where entropy is high")
    theta: float = Field(1.0, ge=0, le=100, allow_inf_nan=False, description="nats of entropy at which it is t0 * n")
    n: float = Field(0.8, gt=0, le=1, allow_inf_nan=False, description="1 leaves t0 everywhere")


class Edt(LogitsRewriter[EdtParams]):
    name, paper = "edt", "Zhang et al. 2024, arXiv:2403.14541"
    stage, params = "temperature", EdtParams
    keeps_greedy = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> EdtParams:
        return EdtParams(t0=1.0, theta=0.0)

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        t0 = rows.column(params.t0 for params in settings)[:, 0]
        power = rows.column(params.theta * math.log(params.n) for params in settings)[:, 0]
        nats = explain_rows(rows.logits).entropy.clamp(min=1e-30)  # of a certain row it may be -0
        tau = torch.where(power == 0, t0, t0 * (power / nats).exp())
        tau = tau.masked_fill(tau < _COLDEST, 0.0)
        rows.facts["temperature"] = tau
        return apply_temperature(rows.logits, tau)
