"""Best of several: draw candidates, rank them, return the best.

    score = sum over the answer's tokens of log p(token) / length ** length_penalty

p is what log-probabilities are told of: what the request itself draws from, before penalties, temperature and
truncation; or it is the distribution of an auxiliary model, as where a smaller model proposes and a larger one judges.
A prefix_classifier judges the answer instead, by the last hidden state that was computed of it, which is that before
its last token (for an answer that ended: the token that ended it): score = log softmax(W h + bias)[1].

Candidates are drawn as the request draws any answer, so that everything else goes together with it. OpenAI's `best_of`
is the mean per token, `length_penalty` 1. Generative re-scoring: Adiwardana et al. 2020, arXiv:2001.09977.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from whipstaff.decoding.method import Candidate, Params, Ranker
from whipstaff.decoding.prefix_classifier import classes
from whipstaff.decoding.rows import Rows

_JUDGED = "best_of"  # the fact that is said of every token


class BestOfParams(Params):
    """How many candidates, and who ranks them: the request itself, unless another is named."""

    method: Literal["best_of"] = "best_of"
    num_candidates: int = Field(4, ge=1, le=64, description="answers that are drawn; 1 is off")
    model: str | None = Field(None, description="auxiliary model by whose likelihood they are ranked")
    classifier: str | None = Field(None, description="head of kind prefix_classifier that ranks them")
    length_penalty: float = Field(
        1.0,
        ge=-10,
        le=10,
        allow_inf_nan=False,
        description="exponent of the length that divides a likelihood: 1 is the mean per token, 0 the sum",
    )

    @model_validator(mode="after")
    def _one_ranks(self) -> "BestOfParams":
        if self.model is not None and self.classifier is not None:
            raise ValueError("a model or a classifier ranks the candidates; name one of them")
        return self


class BestOf(Ranker[BestOfParams]):
    name, paper = "best_of", "Adiwardana et al. 2020, arXiv:2001.09977"
    stage, params = "rule", BestOfParams
    stream_fields = ("model",)
    head_fields: ClassVar[Mapping[str, str]] = {"classifier": "prefix_classifier"}
    needs = frozenset({"hidden"})
    shorthands: ClassVar[Mapping[str, str]] = {"best_of": "num_candidates"}
    switches = (frozenset({"num_candidates"}),)
    keeps_greedy = True

    @property
    def num_streams(self) -> int:
        return 0

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> BestOfParams:
        return BestOfParams(num_candidates=1)

    def is_off(self, params: BestOfParams) -> bool:
        return params.num_candidates == 1

    def num_candidates(self, params: BestOfParams) -> int:
        return params.num_candidates

    def reads_rows(self, params: BestOfParams) -> bool:
        return params.model is not None or params.classifier is not None

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        """The logits as they are; what a classifier makes of each row is said of its token."""
        assert rows.hidden is not None
        if head := rows.heads.get("classifier"):
            rows.facts[_JUDGED] = classes(rows.hidden, head).log_softmax(1)[:, 1]
        return rows.logits

    def score(self, params: BestOfParams, candidate: Candidate) -> float:
        if params.classifier is not None:
            return float(candidate.explained[-1]["facts"][_JUDGED])
        total = candidate.log_probability
        if params.model is not None:
            total = sum(one["streams"][params.model]["logprob"] for one in candidate.explained)
        return total / float(candidate.num_tokens**params.length_penalty)
