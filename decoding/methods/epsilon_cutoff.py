"""Epsilon sampling: keep what is at least this likely, and the best token always.

    keep p >= epsilon

Hewitt et al. 2022, arXiv:2210.15191; 3e-4 to 9e-4 by the size of the model.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import cut_rows_
from whipstaff.decoding.method import LogitsRewriter, Params, in_ten_thousandths
from whipstaff.decoding.rows import Rows


class EpsilonCutoffParams(Params):
    """The least probability."""

    method: Literal["epsilon_cutoff"] = "epsilon_cutoff"
    epsilon: float = Field(3e-4, ge=0, lt=1, allow_inf_nan=False, description="0 is off")


class EpsilonCutoff(LogitsRewriter[EpsilonCutoffParams]):
    name, paper = "epsilon_cutoff", "Hewitt et al. 2022, arXiv:2210.15191"
    stage, params = "truncation", EpsilonCutoffParams
    example: ClassVar[Mapping[str, Any]] = {"epsilon": 0.3}
    shorthands: ClassVar[Mapping[str, str]] = {"epsilon_cutoff": "epsilon"}
    switches = (frozenset({"epsilon"}),)
    keeps_greedy = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> EpsilonCutoffParams:
        return EpsilonCutoffParams(epsilon=0.0)

    def is_off(self, params: EpsilonCutoffParams) -> bool:
        return params.epsilon == 0

    def read(self, field: str, value: Any) -> Any:
        return in_ten_thousandths(value)

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        logits, epsilon = rows.logits, rows.column(params.epsilon for params in settings)[:, 0]
        best, log_p = rows.best()
        cut_rows_(logits, best + (epsilon.log() - log_p).clamp(max=0))
        return logits
