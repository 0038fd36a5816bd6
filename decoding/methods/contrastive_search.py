"""Contrastive search: of the model's best tokens the one that is likely and unlike everything before it.

    v* = argmax over the k best tokens of (1 - alpha) * p(v) - alpha * max_j cos(h_v, h_j)

p is the model's distribution after penalties, h_v the last hidden state once v is fed, h_j those of all positions so
far, prompt included, after the final norm. It takes k passes of one token more per token. Deterministic: temperature
and truncation find one token left. Su et al. 2022, arXiv:2202.06417; penalty_alpha and top_k as in Hugging Face's
`generate`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from whipstaff.decoding.best import only_best
from whipstaff.decoding.method import LogitsRewriter, Params
from whipstaff.decoding.rows import Rows


class ContrastiveSearchParams(Params):
    """How much likeness costs, and among how many tokens."""

    method: Literal["contrastive_search"] = "contrastive_search"
    penalty_alpha: float = Field(
        0.6, ge=0, le=1, allow_inf_nan=False, description="weight of likeness; 1 looks at nothing else, 0 is off"
    )
    k: int = Field(4, ge=1, le=256, description="best tokens that are tried; with `penalty_alpha`, `top_k` says it")


class ContrastiveSearch(LogitsRewriter[ContrastiveSearchParams]):
    name, paper = "contrastive_search", "Su et al. 2022, arXiv:2202.06417"
    stage, params = "penalty", ContrastiveSearchParams
    shorthands: ClassVar[Mapping[str, str]] = {"penalty_alpha": "penalty_alpha"}
    switches = (frozenset({"penalty_alpha"}),)
    shared: ClassVar[Mapping[str, str]] = {"top_k": "k"}
    needs = frozenset({"lookahead", "history"})

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> ContrastiveSearchParams:
        return ContrastiveSearchParams(penalty_alpha=0.0)

    def is_off(self, params: ContrastiveSearchParams) -> bool:
        return params.penalty_alpha == 0

    def num_tried(self, params: ContrastiveSearchParams) -> int:
        return params.k

    def read(self, field: str, value: Any) -> Any:
        is_off = field == "top_k" and isinstance(value, int) and value <= 0  # as vLLM says that nothing is cut
        return None if is_off else value

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        logits, vocab = rows.logits, rows.logits.shape[1]
        most = min(max((params.k for params in settings), default=1), vocab)
        best = only_best(logits, rows.column(params.k for params in settings).long().clamp(max=vocab), most)
        values, tokens = best.topk(most)  # of each row its own k, then banned ones
        likeness = _likeness(rows, tokens)
        alpha = rows.column(params.penalty_alpha for params in settings)
        scores = (1 - alpha) * logits.softmax(1).gather(1, tokens) - alpha * likeness
        chosen = scores.masked_fill(values == -torch.inf, -torch.inf).argmax(1, keepdim=True)
        rows.facts["likeness"] = likeness.gather(1, chosen)[:, 0]
        token = tokens.gather(1, chosen)
        only = torch.full_like(logits, -torch.inf).scatter_(1, token, logits.gather(1, token))
        return torch.where(alpha == 0, logits, only)


def _likeness(rows: Rows, tokens: Tensor) -> Tensor:
    """(R, n) the largest cosine between what each token leads to and what stands before it."""
    assert rows.lookahead is not None and rows.history is not None
    led_to = torch.stack([normalize(rows.lookahead(tried).float(), dim=1) for tried in tokens.unbind(1)], 1)
    found = [(before.float() @ own.T).amax(0) for before, own in zip(rows.history, led_to, strict=True)]
    return torch.stack(found) if found else led_to[:, :, 0]
