"""Exclude top choices: now and then, of the likely tokens only the least likely stays.

    with chance `probability`: remove every p >= threshold but the smallest; equal ones stay together

Nothing happens where fewer than two tokens reach the threshold. As in llama.cpp, where it is p-e-w's proposal.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import cut_rows_
from whipstaff.decoding.method import LogitsRewriter, Params
from whipstaff.decoding.rows import Rows

_TINY = torch.finfo(torch.float32).tiny


class XtcParams(Params):
    """How often, and what counts as likely."""

    method: Literal["xtc"] = "xtc"
    probability: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="chance per token; 0 is off")
    threshold: float = Field(0.1, ge=0, le=1, allow_inf_nan=False, description="likely from here; above 0.5 is off")


class Xtc(LogitsRewriter[XtcParams]):
    name, paper = "xtc", "llama.cpp, xtc_probability"
    stage, params = "truncation", XtcParams
    example: ClassVar[Mapping[str, Any]] = {"probability": 1.0}
    shorthands: ClassVar[Mapping[str, str]] = {"xtc_probability": "probability", "xtc_threshold": "threshold"}
    switches = (frozenset({"probability"}),)
    needs = frozenset({"random"})

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> XtcParams:
        return XtcParams(probability=0.0)

    def is_off(self, params: XtcParams) -> bool:
        return params.probability == 0 or params.threshold > 0.5

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.random is not None
        logits, (best, log_p) = rows.logits, rows.best()
        threshold = rows.column(params.threshold for params in settings)[:, 0].clamp(min=_TINY)  # a banned one has 0
        cut_rows_(turned := -logits, high=log_p - best - threshold.log())
        least = -turned.amax(1)  # of the likely ones; inf where there are none
        happens = rows.random < rows.column(params.probability for params in settings)[:, 0]
        cut_rows_(logits, high=least.masked_fill(~happens, torch.inf))
        return logits
