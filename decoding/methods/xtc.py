"""Exclude top choices: now and then, of the likely tokens only the least likely stays.

    with chance `probability`: remove every p >= threshold but the smallest; equal ones stay together

Nothing happens where fewer than two tokens reach the threshold. As in llama.cpp, where it is p-e-w's proposal.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.decoding.method import Params, Rewriting
from whipstaff.decoding.rows import Rows

_TINY = torch.finfo(torch.float32).tiny


class XtcParams(Params):
    """How often, and what counts as likely."""

    method: Literal["xtc"] = "xtc"
    probability: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="chance per token; 0 is off")
    threshold: float = Field(0.1, ge=0, le=1, allow_inf_nan=False, description="likely from here; above 0.5 is off")


class Xtc(Rewriting[XtcParams]):
    name, paper = "xtc", "llama.cpp, xtc_probability"
    stage, params = "truncation", XtcParams
    shorthands: ClassVar[Mapping[str, str]] = {"xtc_probability": "probability", "xtc_threshold": "threshold"}
    needs = frozenset({"uniform"})

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> XtcParams:
        return XtcParams(probability=0.0)

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.uniform is not None
        logits = rows.logits
        threshold = rows.column(params.threshold for params in settings).clamp(min=_TINY)  # a banned token has p = 0
        least = logits.masked_fill(logits.softmax(1) < threshold, torch.inf).amin(1, keepdim=True)
        happens = rows.uniform[:, None] < rows.column(params.probability for params in settings)
        return logits.masked_fill_(logits > least.masked_fill(~happens, torch.inf), -torch.inf)
