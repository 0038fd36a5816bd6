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

_ONE = 2.0**40  # of a mass


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
        p = log_p.exp()
        key = log_p.add_(explain_rows(logits).entropy[:, None]).abs_().view(torch.int32)  # nats; inf where banned
        limit = _limit(key, p, mass).masked_fill(mass >= 1, torch.iinfo(torch.int32).max)
        return logits.masked_fill_(key > limit, -torch.inf)


def _limit(key: Tensor, p: Tensor, mass: Tensor) -> Tensor:
    """(R, 1) int32, the least number for which the tokens whose keys do not exceed it have that mass (R, 1).

    A radix select over keys (R, V) int32, none negative: floats that are not negative are ordered as their bits. Masses
    are counted in whole numbers, so that no order of adding matters.
    """
    weight = p.mul_(_ONE).long()
    wanted = (mass * _ONE).long().minimum(weight.sum(1, keepdim=True))
    prefix = torch.zeros_like(wanted, dtype=torch.int32)
    for shift, num in ((20, 2048), (10, 1024), (0, 1024)):
        digit = (key >> shift).sub_(prefix << 10).clamp_(-1, num)  # -1 and num: of keys with another prefix
        bins = torch.zeros(len(key), num + 2, dtype=torch.int64, device=key.device)
        bins = bins.scatter_add_(1, digit.long().add_(1), weight)[:, 1:-1]
        so_far = bins.cumsum(1)
        found = (so_far < wanted).sum(1, keepdim=True)
        wanted = wanted - (so_far - bins).gather(1, found)
        prefix = (prefix << 10) + found.int()
    return prefix
