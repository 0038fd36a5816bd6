"""Top-a: keep what is at least `a` times the square of the best probability.

    keep p >= a * (max p) ** 2

Strict where the model is sure, lax where it is not. By the author of RWKV, who takes a = 0.2.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import cut_rows_
from whipstaff.decoding.method import LogitsRewriter, Params
from whipstaff.decoding.rows import Rows


class TopAParams(Params):
    """How strict."""

    method: Literal["top_a"] = "top_a"
    a: float = Field(0.2, ge=0, le=1, allow_inf_nan=False, description="0 is off")


class TopA(LogitsRewriter[TopAParams]):
    name, paper = "top_a", "RWKV-LM, top-a sampling"
    stage, params = "truncation", TopAParams
    example: ClassVar[Mapping[str, Any]] = {"a": 0.9}
    shorthands: ClassVar[Mapping[str, str]] = {"top_a": "a"}
    switches = (frozenset({"a"}),)
    keeps_greedy = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> TopAParams:
        return TopAParams(a=0.0)

    def is_off(self, params: TopAParams) -> bool:
        return params.a == 0

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        logits, a = rows.logits, rows.column(params.a for params in settings)[:, 0]
        best, log_p = rows.best()
        cut_rows_(logits, best + (a.log() + log_p))
        return logits
