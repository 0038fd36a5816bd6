"""Knowledge weighted decoding: the model's best tokens, weighed by a classifier. Two kinds of classifier serve.

    prefix_classifier   s(v) = log p(v) + log f(v),  f(v) = softmax(W h_v + bias)[1],  h_v the last hidden state once v
                        is fed: one more token through the model for each of the k best
    token_classifier    s(v) = log p(v) + log sigmoid(g(v)),  g = W h + bias,  h the last hidden state: no more tokens

over the k best tokens of the model's distribution p, which is renormalised over them for a token_classifier, as in the
released code (its "v2"); -inf elsewhere. The authors take the best s; temperature and truncation come after. Of the
token that is drawn the classifier's probability is explained.
Choi et al. 2023 (KCTS), arXiv:2310.09044; k = 50 in its scripts.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from whipstaff.decoding.best import only_best
from whipstaff.decoding.method import LogitsRewriter, Params
from whipstaff.decoding.prefix_classifier import NUM_CLASSES, classes
from whipstaff.decoding.rows import Rows


class KwdParams(Params):
    """Which classifier, and how many tokens it judges."""

    method: Literal["kwd"] = "kwd"
    classifier: str = Field(
        description="head of kind token_classifier, or of kind prefix_classifier, which looks one token ahead"
    )
    k: int = Field(50, ge=1, le=256, description="best tokens that are judged; all others are banned")


class Kwd(LogitsRewriter[KwdParams]):
    name, paper = "kwd", "Choi et al. 2023, arXiv:2310.09044"
    stage, params = "mix", KwdParams
    head_fields: ClassVar[Mapping[str, str]] = {"classifier": "token_classifier"}
    ahead_fields: ClassVar[Mapping[str, str]] = {"classifier": "prefix_classifier"}
    needs = frozenset({"hidden", "lookahead"})

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None  # the classifier decides

    def num_tried(self, params: KwdParams) -> int:
        return params.k

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        head, vocab = rows.heads["classifier"], rows.logits.shape[1]
        most = min(max((params.k for params in settings), default=1), vocab)
        best = only_best(rows.logits, rows.column(params.k for params in settings).long().clamp(max=vocab), most)
        tokens = best.topk(most).indices  # (R, most): of each row its own k, then banned ones
        if len(head["weight"]) == NUM_CLASSES:
            scores = rows.logits.log_softmax(1).masked_fill(best == -torch.inf, -torch.inf).gather(1, tokens)
            judged = _judged_ahead(rows, head, tokens)
        else:
            scores = best.log_softmax(1).gather(1, tokens)
            judged = _judged(rows, head, tokens)
        rows.judged["classifier"] = tokens, judged.exp()
        scores = scores + judged
        return best.fill_(-torch.inf).scatter_(1, tokens, scores)


def _judged(rows: Rows, head: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """(R, n) log sigmoid of what the classifier says of each token."""
    assert rows.hidden is not None
    g = (head["weight"][tokens] * rows.hidden.float()[:, None]).sum(2)
    return logsigmoid(g + head["bias"][tokens] if "bias" in head else g)


def _judged_ahead(rows: Rows, head: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """(R, n) log-probability of class 1 once each token is fed."""
    assert rows.lookahead is not None
    found = []
    for tried in tokens.unbind(1):
        found.append(classes(rows.lookahead(tried), head).log_softmax(1)[:, 1])
    return torch.stack(found, 1)
