"""Dynamic temperature: around the request's own, by how flat the distribution is.

    tau = low + (high - low) * (H / log(number of tokens)) ** exponent        low, high = temperature -+ range, >= 0

or low and high as they are given. H is the entropy before any temperature, over the tokens that are not banned. A
request with temperature 0 stays greedy. As in llama.cpp, whose order is truncation first: see temperature_last.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from whipstaff.cuda_ext import explain_rows
from whipstaff.decoding.count import num_allowed
from whipstaff.decoding.method import DecodingError, LogitsRewriter, Params, Vocabulary
from whipstaff.decoding.rows import Rows
from whipstaff.decoding.sampler import apply_temperature

_SAME = 1e-6  # of a range that is said in two ways


class DynatempParams(Params):
    """How far to go from the request's temperature."""

    method: Literal["dynatemp"] = "dynatemp"
    range: float = Field(0.5, ge=0, le=100, allow_inf_nan=False, description="0: the request's temperature")
    low: float | None = Field(None, ge=0, le=100, allow_inf_nan=False, description="instead: the lowest temperature")
    high: float | None = Field(None, ge=0, le=100, allow_inf_nan=False, description="and the highest one")
    exponent: float = Field(1.0, ge=0, le=100, allow_inf_nan=False, description="above 1 stays cold for longer")

    @field_validator("high")
    @classmethod
    def _is_high(cls, high: float | None, info: ValidationInfo) -> float | None:
        low = info.data.get("low")
        if high is not None and low is not None and high < low:
            raise ValueError(f"it is lower than the lowest temperature, {low:g}")
        return high

    @property
    def reach(self) -> float:
        """From the middle to either end."""
        return self.range if self.low is None or self.high is None else (self.high - self.low) / 2


class Dynatemp(LogitsRewriter[DynatempParams]):
    name, paper = "dynatemp", "llama.cpp, dynatemp_range"
    stage, params = "temperature", DynatempParams
    example: ClassVar[Mapping[str, Any]] = {"low": 0.1, "high": 0.3}
    shorthands: ClassVar[Mapping[str, str]] = {
        "dynatemp_range": "range",
        "dynatemp_low": "low",
        "dynatemp_high": "high",
        "dynatemp_exponent": "exponent",
    }
    switches = (frozenset({"range"}), frozenset({"low", "high"}))
    gates = ("dynamic_temperature",)
    needs = frozenset({"temperature"})
    keeps_greedy = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> DynatempParams:
        return DynatempParams(range=0.0)

    def is_off(self, params: DynatempParams) -> bool:
        return params.reach == 0

    def resolve(self, params: DynatempParams, words: Vocabulary) -> DynatempParams:
        if (params.low is None) != (params.high is None):
            raise DecodingError(
                "the lowest and the highest temperature go together", "low" if params.high is None else "high"
            )
        if "range" in params.model_fields_set and params.range and abs(params.range - params.reach) > _SAME:
            raise DecodingError(
                f"given twice: {params.low:g} to {params.high:g} is a range of {params.reach:g}", "range"
            )
        return params

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.temperature is not None
        own = rows.temperature
        reach, low, high = (
            rows.column(math.nan if (value := getattr(params, name)) is None else value for params in settings)[:, 0]
            for name in ("reach", "low", "high")
        )
        low = torch.where(low.isnan(), (own - reach).clamp(min=0), low)
        high = torch.where(high.isnan(), own + reach, high)
        most = num_allowed(rows.logits).log()  # nats, of a flat distribution
        flatness = explain_rows(rows.logits).entropy.clamp(min=0) / most
        wanted = low + (high - low) * flatness ** rows.column(params.exponent for params in settings)[:, 0]
        tau = torch.where((reach > 0) & (most > 0) & (own > 0), wanted, own)
        rows.facts["temperature"] = tau
        return apply_temperature(rows.logits, tau)
