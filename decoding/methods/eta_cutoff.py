"""Eta sampling: a least probability that falls where the distribution is flat; the best token stays always.

    keep p >= min(epsilon, sqrt(epsilon) * exp(-H))        H = -sum p log p

Hewitt et al. 2022, arXiv:2210.15191; epsilon 3e-4 to 4e-3 by the size of the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import cut_rows_, explain_rows
from whipstaff.decoding.method import LogitsRewriter, Params, in_ten_thousandths
from whipstaff.decoding.rows import Rows


class EtaCutoffParams(Params):
    """The least probability where the model is sure."""

    method: Literal["eta_cutoff"] = "eta_cutoff"
    epsilon: float = Field(3e-4, ge=0, lt=1, allow_inf_nan=False, description="0 is off")


class EtaCutoff(LogitsRewriter[EtaCutoffParams]):
    name, paper = "eta_cutoff", "Hewitt et al. 2022, arXiv:2210.15191"
    stage, params = "truncation", EtaCutoffParams
    example: ClassVar[Mapping[str, Any]] = {"epsilon": 0.3}
    shorthands: ClassVar[Mapping[str, str]] = {"eta_cutoff": "epsilon"}
    switches = (frozenset({"epsilon"}),)
    keeps_greedy = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> EtaCutoffParams:
        return EtaCutoffParams(epsilon=0.0)

    def is_off(self, params: EtaCutoffParams) -> bool:
        return params.epsilon == 0

    def read(self, field: str, value: Any) -> Any:
        return in_ten_thousandths(value)

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        logits, epsilon = rows.logits, rows.column(params.epsilon for params in settings)[:, 0]
        least = torch.minimum(epsilon.log(), epsilon.log() / 2 - explain_rows(logits).entropy)  # a log probability
        best, log_p = rows.best()
        cut_rows_(logits, best + (least - log_p).clamp(max=0))
        return logits
