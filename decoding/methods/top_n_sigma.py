"""Top n sigma: keep the logits within n standard deviations of the best one.

    keep l >= max l - n * std(l)        std over the tokens that are not banned, divided by their number

Temperature does not change what is kept. Tang et al. 2024, arXiv:2411.07641; n = 1. As in llama.cpp, n <= 0 is off.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.cuda_ext import cut_rows_
from whipstaff.decoding.count import num_allowed
from whipstaff.decoding.method import LogitsRewriter, Params
from whipstaff.decoding.rows import Rows


class TopNSigmaParams(Params):
    """How many standard deviations."""

    method: Literal["top_n_sigma"] = "top_n_sigma"
    n: float = Field(1.0, ge=-1, le=1000, allow_inf_nan=False, description="standard deviations; 0 or less is off")


class TopNSigma(LogitsRewriter[TopNSigmaParams]):
    name, paper = "top_n_sigma", "Tang et al. 2024, arXiv:2411.07641"
    stage, params = "truncation", TopNSigmaParams
    example: ClassVar[Mapping[str, Any]] = {"n": 0.2}
    shorthands: ClassVar[Mapping[str, str]] = {"top_n_sigma": "n", "nsigma": "n"}
    switches = (frozenset({"n"}),)
    keeps_greedy = True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> TopNSigmaParams:
        return TopNSigmaParams(n=0.0)

    def is_off(self, params: TopNSigmaParams) -> bool:
        return params.n <= 0

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        logits, n = rows.logits, rows.column(params.n for params in settings)
        best = logits.amax(1, keepdim=True)
        below = (best - logits).nan_to_num_(nan=0.0, posinf=0.0)  # 0 where banned, which adds nothing to the sums
        num = num_allowed(logits)[:, None]
        mean = below.sum(1, keepdim=True) / num
        square = torch.linalg.vector_norm(below, dim=1, keepdim=True).square() / num
        deviation = (square - mean.square()).clamp(min=0).sqrt()
        least = (best - n * deviation).masked_fill(n <= 0, -torch.inf)
        cut_rows_(logits, least[:, 0])
        return logits
