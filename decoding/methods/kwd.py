"""Knowledge weighted decoding: the model's best tokens, weighed by a classifier that has a logit for every token.

    s(v) = log softmax(l)(v) + log sigmoid(g(v))        over the k best of l, else -inf;  g = W h + bias

h is the last hidden state. This is the released code's one-forward classifier ("v2"); its authors take the best s.
Choi et al. 2023 (KCTS), arXiv:2310.09044; k = 50 in its scripts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from whipstaff.decoding.method import Params, Rewriting
from whipstaff.decoding.rows import Rows


class KwdParams(Params):
    """Which classifier, and how many tokens it judges."""

    method: Literal["kwd"] = "kwd"
    classifier: str = Field(description="head of kind token_classifier")
    k: int = Field(50, ge=1, le=256, description="best tokens that are judged; all others are banned")


class Kwd(Rewriting[KwdParams]):
    name, paper = "kwd", "Choi et al. 2023, arXiv:2310.09044"
    stage, params = "mix", KwdParams
    head_fields: ClassVar[Mapping[str, str]] = {"classifier": "token_classifier"}
    needs = frozenset({"hidden"})

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None  # the classifier decides

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.hidden is not None
        head, vocab = rows.heads["classifier"], rows.logits.shape[1]
        most = min(max((params.k for params in settings), default=1), vocab)
        best = _only_best(rows.logits, rows.column(params.k for params in settings).long().clamp(max=vocab), most)
        tokens = best.topk(most).indices  # (R, most): of each row its own k, then banned ones
        g = (head["weight"][tokens] * rows.hidden.float()[:, None]).sum(2)
        g = g + head["bias"][tokens] if "bias" in head else g
        scores = best.log_softmax(1).gather(1, tokens) + logsigmoid(g)
        return best.fill_(-torch.inf).scatter_(1, tokens, scores)


def _only_best(logits: Tensor, k: Tensor, most: int) -> Tensor:
    """-inf for all but each row's k (R, 1) best tokens, of equal ones the first; `most` is the largest k."""
    values = logits.topk(most).values
    least = values.gather(1, k - 1)
    room = k - (values > least).sum(1, keepdim=True)  # for those that equal the k-th
    is_tied = logits == least
    is_late = is_tied.cumsum(1, dtype=torch.int32) > room
    return logits.masked_fill((logits < least) | (is_tied & is_late), -torch.inf)
