"""Dynamic temperature: around the request's own, by how flat the distribution is.

    tau = low + (high - low) * (H / log(number of tokens)) ** exponent        low, high = temperature -+ range, >= 0

H is the entropy before any temperature, over the tokens that are not banned. A request with temperature 0 stays
greedy. As in llama.cpp, whose order is truncation first: see temperature_last.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import explain_rows
from whipstaff.decoding.count import num_allowed
from whipstaff.decoding.draw import temper
from whipstaff.decoding.method import Params, Rewriting
from whipstaff.decoding.rows import Rows


class DynatempParams(Params):
    """How far to go from the request's temperature."""

    method: Literal["dynatemp"] = "dynatemp"
    range: float = Field(0.5, ge=0, le=100, allow_inf_nan=False, description="0: the request's temperature")
    exponent: float = Field(1.0, ge=0, le=100, allow_inf_nan=False, description="above 1 stays cold for longer")


class Dynatemp(Rewriting[DynatempParams]):
    name, paper = "dynatemp", "llama.cpp, dynatemp_range"
    stage, params = "temperature", DynatempParams
    shorthands: ClassVar[Mapping[str, str]] = {"dynatemp_range": "range", "dynatemp_exponent": "exponent"}
    needs = frozenset({"temperature"})
    keeps_greedy = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> DynatempParams:
        return DynatempParams(range=0.0)

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.temperature is not None
        own = rows.temperature
        reach = rows.column(params.range for params in settings)[:, 0]
        low, high = (own - reach).clamp(min=0), own + reach
        most = num_allowed(rows.logits).log()  # nats, of a flat distribution
        flatness = explain_rows(rows.logits).entropy.clamp(min=0) / most
        wanted = low + (high - low) * flatness ** rows.column(params.exponent for params in settings)[:, 0]
        tau = torch.where((reach > 0) & (most > 0) & (own > 0), wanted, own)
        rows.facts["temperature"] = tau
        return temper(rows.logits, tau)
