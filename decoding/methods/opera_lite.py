"""OPERA's over-trust penalty without its search: one sequence, no token tried, no way back. Ours, after Huang et al.

Of the tokens generated so far, w_ij is how much the i-th looks at the j-th in the model's last layer: the largest
probability among the heads, over the sum of these along the row. Where the text leans on one of its own tokens again
and again, that token's column makes a large product:

    phi_j = 1e-7 * prod_{i >= j} (scale_factor * w_ij)         the last `history` columns, in log space
    penalty = min(penalty_cap, penalty_weight * max_j phi_j)   from token `switch_length` on
    penalty = -penalty_weight * (share of the last row on `span`)   before that: a reward

The step's `candidates` best tokens lose the penalty and all others stay, so what the model would say next gives way
where it leans too much. The last row is that of the last token that was said: OPERA itself (Huang et al. 2023,
arXiv:2311.17911) feeds each candidate first, and may take tokens back. The factor 1e-7 and the switch are its published
code's.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.decoding.best import only_best
from whipstaff.decoding.method import LogitsRewriter, Params, PromptFacts
from whipstaff.decoding.rows import Rows
from whipstaff.decoding.spans import Span, span_at

_COLUMNS = 512  # whose products are kept: the last ones
_FACTOR = math.log(1e-7)


class OperaLiteParams(Params):
    """When the text leans too much on a token of its own, and what that costs."""

    method: Literal["opera_lite"] = "opera_lite"
    penalty_weight: float = Field(1.0, ge=0, le=1e6, allow_inf_nan=False, description="0 is off")
    candidates: int = Field(5, ge=1, le=256, description="best tokens of a step that lose the penalty")
    scale_factor: float = Field(50.0, gt=0, le=1e6, allow_inf_nan=False, description="of every share of attention")
    penalty_cap: float = Field(50.0, ge=0, le=1000, allow_inf_nan=False, description="the largest penalty, in logits")
    switch_length: int = Field(10, ge=0, le=1 << 20, description="first tokens that get the reward instead")
    history: int = Field(_COLUMNS, ge=1, le=_COLUMNS, description="tokens back that a column may stand")
    span: Span | None = Field(
        None,
        description="what of the prompt is trusted: text, messages, images, windows; default: all but its first token",
    )


class OperaLiteSetting(Params):
    """The same in one prompt."""

    method: Literal["opera_lite"] = "opera_lite"
    penalty_weight: float
    candidates: int
    scale_factor: float
    penalty_cap: float
    switch_length: int
    history: int
    span: tuple[tuple[int, int], ...]  # [start, end) positions


class OperaLite(LogitsRewriter[OperaLiteParams]):
    name, paper = "opera_lite", "ours, after Huang et al. 2023 (OPERA), arXiv:2311.17911"
    stage, params = "penalty", OperaLiteParams
    example: ClassVar[Mapping[str, Any]] = {"switch_length": 1}
    setting = OperaLiteSetting
    needs = frozenset({"attention"})
    state_size = _COLUMNS  # log phi of column j at j modulo that

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> OperaLiteParams:
        return OperaLiteParams(penalty_weight=0.0)

    def is_off(self, params: OperaLiteParams) -> bool:
        return params.penalty_weight == 0

    def at_prompt(self, setting: OperaLiteParams, prompt: PromptFacts) -> OperaLiteSetting:
        all_but_first = ((1, prompt.num_tokens),) if prompt.num_tokens > 1 else ()
        span = all_but_first if setting.span is None else span_at(setting.span, prompt)
        return OperaLiteSetting(**setting.model_dump(exclude={"span"}), span=span)

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.attention is not None
        logits, vocab = rows.logits, rows.logits.shape[1]
        share = (rows.attention / rows.attention.sum(1, keepdim=True, dtype=torch.float64)).float()
        lean = _lean(rows, share, settings) + rows.column(params.penalty_weight for params in settings).log()
        penalty = lean.exp().minimum(rows.column(params.penalty_cap for params in settings))
        early = [row for row, params in enumerate(settings) if rows.num_generated[row] < params.switch_length]
        for row in early:
            on_span = sum(share[row, start:end].sum() for start, end in settings[row].span)
            penalty[row] = -settings[row].penalty_weight * on_span
        rows.facts["penalty"] = penalty[:, 0]
        k = rows.column(params.candidates for params in settings).long().clamp(max=vocab)
        best = only_best(logits, k, min(max((params.candidates for params in settings), default=1), vocab))
        return torch.where(best == -torch.inf, logits, logits - penalty)


def _lean(rows: Rows, share: Tensor, settings: Sequence[Any]) -> Tensor:
    """(R, 1) log of the largest column's product, -inf where there is none; the state goes on by one row.

    Args:
        share: (R, C) of the last token's attention.
    """
    assert rows.state is not None
    num, prompt = (rows.column(numbers).long() for numbers in (rows.num_generated, rows.num_prompt))
    age = (num - 1 - torch.arange(_COLUMNS, device=share.device)) % _COLUMNS  # tokens between a column and the last one
    column = num - 1 - age
    scale = rows.column(params.scale_factor for params in settings)
    factor = (scale * share.gather(1, (prompt + column).clamp(0, share.shape[1] - 1))).log()
    rows.state.copy_(rows.state.masked_fill(age == 0, _FACTOR) + factor)
    is_out = (column < 0) | (age >= rows.column(params.history for params in settings)) | rows.state.isnan()
    return rows.state.masked_fill(is_out, -torch.inf).amax(1, keepdim=True)
