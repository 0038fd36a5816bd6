"""Locally typical sampling: keep the tokens whose surprise is closest to the expected one.

    sort by |-log p - H|, the closest first; keep the fewest whose mass reaches `p`        H = -sum p log p

The likeliest token may go. Meister et al. 2022, arXiv:2202.00666; p = 0.2 for summaries, 0.95 for stories.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import typical_rows_
from whipstaff.decoding.method import LogitsRewriter, Params
from whipstaff.decoding.rows import Rows


class TypicalPParams(Params):
    """How much mass is kept."""

    method: Literal["typical_p"] = "typical_p"
    p: float = Field(0.95, gt=0, le=1, allow_inf_nan=False, description="1 is off")


class TypicalP(LogitsRewriter[TypicalPParams]):
    name, paper = "typical_p", "Meister et al. 2022, arXiv:2202.00666"
    stage, params = "truncation", TypicalPParams
    example: ClassVar[Mapping[str, Any]] = {"p": 0.1}
    shorthands: ClassVar[Mapping[str, str]] = {"typical_p": "p", "typical": "p"}
    switches = (frozenset({"p"}),)

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> TypicalPParams:
        return TypicalPParams(p=1.0)

    def is_off(self, params: TypicalPParams) -> bool:
        return params.p == 1

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        typical_rows_(rows.logits, rows.column(params.p for params in settings)[:, 0])
        return rows.logits
