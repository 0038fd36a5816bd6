"""Locally typical sampling: keep the tokens whose surprise is closest to the expected one.

    sort by |-log p - H|, the closest first; keep the fewest whose mass reaches `p`        H = -sum p log p

The likeliest token may go. Meister et al. 2022, arXiv:2202.00666; p = 0.2 for summaries, 0.95 for stories.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import explain_rows
from whipstaff.decoding.method import Params, Rewriting
from whipstaff.decoding.rows import Rows


class TypicalPParams(Params):
    """How much mass is kept."""

    method: Literal["typical_p"] = "typical_p"
    p: float = Field(0.95, gt=0, le=1, allow_inf_nan=False, description="1 is off")


class TypicalP(Rewriting[TypicalPParams]):
    name, paper = "typical_p", "Meister et al. 2022, arXiv:2202.00666"
    stage, params = "truncation", TypicalPParams
    shorthands: ClassVar[Mapping[str, str]] = {"typical_p": "p"}

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> TypicalPParams:
        return TypicalPParams(p=1.0)

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        logits, mass = rows.logits, rows.column(params.p for params in settings)
        log_p = logits.log_softmax(1)
        oddness = (-log_p - explain_rows(logits).entropy[:, None]).abs()  # nats; inf where banned
        closest, order = oddness.sort(dim=1, stable=True)
        num_before = (log_p.exp().gather(1, order).cumsum(1) < mass).sum(1, keepdim=True)
        limit = closest.gather(1, num_before.clamp(max=logits.shape[1] - 1))
        return logits.masked_fill_((oddness > limit) & (mass < 1), -torch.inf)
