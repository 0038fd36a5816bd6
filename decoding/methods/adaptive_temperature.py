"""Adaptive decoder: a small head looks at the last hidden state and picks the temperature.

    pi = softmax(W2 silu(W1 silu(W0 h + b0) + b1) + b2)        one chance per temperature of the head's list
    s  = logits / tau,  tau the likeliest temperature, or drawn from pi;  tau = 0 leaves the best token

Level "token" picks at every token, "sequence" once, from the last token of the prompt. Takes the place of the
request's temperature. Dhuliawala et al. 2024, arXiv:2411.09661; drawing costs one uniform number per pick.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import linear, silu

from whipstaff.decoding.method import DecodingError, HeadFile, LogitsRewriter, Params
from whipstaff.decoding.rows import Rows
from whipstaff.decoding.sampler import apply_temperature


class AdaptiveTemperatureParams(Params):
    """Which head picks, how often and how."""

    method: Literal["adaptive_temperature"] = "adaptive_temperature"
    head: str = Field(description="head of kind temperature_head")
    level: Literal["token", "sequence"] = Field("token", description="pick for every token, or once")
    choose: Literal["argmax", "sample"] = Field("argmax", description="the likeliest temperature, or one at random")


class AdaptiveTemperature(LogitsRewriter[AdaptiveTemperatureParams]):
    name, paper = "adaptive_temperature", "Dhuliawala et al. 2024, arXiv:2411.09661"
    stage, params = "temperature", AdaptiveTemperatureParams
    head_fields: ClassVar[Mapping[str, str]] = {"head": "temperature_head"}
    needs = frozenset({"hidden", "random"})
    state_size = 1  # the temperature that a sequence keeps
    keeps_greedy = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None  # the head decides

    def with_heads(self, params: AdaptiveTemperatureParams, heads: Mapping[str, HeadFile]) -> AdaptiveTemperatureParams:
        temperatures = heads["head"].parts["temperatures"]
        if not ((temperatures >= 0) & (temperatures < torch.inf)).all():
            raise DecodingError(f"its temperatures are {temperatures.tolist()}; each must be 0 or more", "head")
        return params

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.hidden is not None and rows.random is not None and rows.state is not None
        head, kept = rows.heads["head"], rows.state[:, 0]
        pi = chances(rows.hidden.float(), head)
        drawn = (pi.cumsum(1) <= rows.random[:, None]).sum(1).clamp(max=pi.shape[1] - 1)
        is_drawn = rows.column(params.choose == "sample" for params in settings)[:, 0] > 0
        tau = head["temperatures"][torch.where(is_drawn, drawn, pi.argmax(1))]
        is_kept = rows.column(params.level == "sequence" for params in settings)[:, 0] > 0
        tau = torch.where(is_kept & ~kept.isnan(), kept, tau)
        kept.copy_(torch.where(is_kept, tau, kept))
        rows.facts["temperature"] = tau
        return apply_temperature(rows.logits, tau)


def chances(hidden: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """(R, number of temperatures) what the head makes of hidden (R, H)."""
    inner = silu(linear(hidden, head["w0"], head["b0"]))
    inner = silu(linear(inner, head["w1"], head["b1"]))
    return linear(inner, head["w2"], head["b2"]).softmax(1)
