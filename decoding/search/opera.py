"""OPERA: beams that distrust columns of attention on which everything after leans, and that go back behind them.

Huang et al. 2024, arXiv:2311.17911, as the authors' code does it. All weights w are of the model's last layer: of each
row of attention the largest probability among the heads, divided by the row's sum. At t generated tokens, each beam's
N likeliest tokens are tried. With T = t + 1 tokens, the tried one among them,

    phi_j   = 1e-7 * prod over i = j..T-1 of (scale_factor * w_ij)        columns j of the answer's own tokens
    penalty = max phi_j, or, while T <= switch_length, minus the tried token's weight on the span that is trusted

and the logits of the candidates, less penalty_weight times this, are all that the beams choose from: the others stand
at -999. Column products are kept per beam and grow by one factor per token.

Where the columns of the newest maxima are the same again and again (`Retrospection`), the beams go back to just after
that column, and choose once more among all tokens but those that they had chosen there.

The authors' code holds phi in float16, where it is 0 below 3e-8 and infinite above 65504; here it is in float32, from
sums of logarithms, and never above `penalty_cap`. `official_fp16` rounds as they do. Their limit of visits (beta in the
paper) is N, which `visits` changes. With one beam, which they refuse, there are two forms of our own: greedy, and one
that draws at a `temperature`, of the candidates by their logits less penalties; after a return, of all tokens as above.
"""

import math
from collections import Counter
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor
from torch.nn.functional import pad

from whipstaff.decoding.method import PromptFacts, Vocabulary
from whipstaff.decoding.search.beams import Book, Candidate, EarlyStopping, Rules, num_shared
from whipstaff.decoding.search.search import (
    Continuation,
    Decision,
    Living,
    Search,
    SearchFacts,
    SearchMethod,
    SearchNeed,
    SearchParams,
    Steps,
    Tried,
)
from whipstaff.decoding.spans import Span, span_at

_FLOOR = -999.0  # the authors' logit of what is not to be chosen
_LOG_SMALL = math.log(1e-7)
_MOST_FP16 = 65504.0

Text = tuple[int, ...]


class OperaParams(SearchParams):
    """How many beams and candidates, how attention is judged, and when the beams go back."""

    method: Literal["opera"] = "opera"
    beams: int = Field(5, ge=1, le=64, description="sequences that are searched at once")
    candidates: int = Field(
        5, ge=1, le=64, validate_default=True, description="tokens of each beam that are tried, no fewer than beams"
    )
    scale_factor: float = Field(50.0, gt=0, le=1e6, allow_inf_nan=False, description="of attention weights")
    temperature: float = Field(
        0.0, ge=0, le=100, allow_inf_nan=False, description="at which one beam draws of its candidates; 0: the best"
    )
    penalty_weight: float = Field(1.0, ge=0, le=1e4, allow_inf_nan=False, description="0: no penalty")
    penalty_cap: float = Field(50.0, gt=0, le=1e6, allow_inf_nan=False, description="the largest penalty")
    switch_length: int = Field(10, ge=1, le=1 << 20, description="tokens until which trust in the span counts")
    threshold: int = Field(15, ge=1, le=1 << 20, description="steps that may lean on one column before it is left")
    visits: int | None = Field(None, ge=0, le=1 << 20, description="times a place is gone back to; none: candidates")
    history: int = Field(512, ge=1, le=1 << 20, description="tokens behind which nothing is taken back")
    span: Span | None = Field(None, description="what is trusted of the prompt; none: all but its first token")
    length_penalty: float = Field(1.0, ge=-10, le=10, allow_inf_nan=False, description="as of beam_search")
    early_stopping: EarlyStopping = Field(False, description="as of beam_search")
    official_fp16: bool = Field(False, description="scores of columns in float16, as the authors' code has them")

    @field_validator("candidates")
    @classmethod
    def _feeds_all_beams(cls, candidates: int, info: ValidationInfo) -> int:
        if candidates < 2:
            raise ValueError("with one candidate the penalty does nothing: nothing else could be chosen; at least 2")
        if candidates < (beams := info.data.get("beams", 0)):
            raise ValueError(f"{beams} beams begin with {beams} tokens; fewer candidates leave dead beams")
        return candidates

    @field_validator("temperature")
    @classmethod
    def _one_draws(cls, temperature: float, info: ValidationInfo) -> float:
        if temperature > 0 and (beams := info.data.get("beams", 1)) > 1:
            raise ValueError(
                f"{beams} beams look for the best, and draw nothing; with one, its candidates are drawn of"
            )
        return temperature


class OperaSetting(OperaParams):
    """The same in one prompt."""

    trusted: tuple[tuple[int, int], ...] = ()  # [start, end) positions of the span


class Opera(SearchMethod[OperaParams]):
    name, paper = "opera", "Huang et al. 2024, arXiv:2311.17911"
    params, setting = OperaParams, OperaSetting
    needs: ClassVar[frozenset[SearchNeed]] = frozenset({"attention", "tries"})
    sequences_field = "beams"

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None  # beams search

    def num_sequences(self, params: OperaParams) -> int:
        return params.beams

    def num_tried(self, params: OperaParams) -> int:
        return params.beams * params.candidates

    def draws(self, params: OperaParams) -> bool:
        return params.temperature > 0

    def resolve(self, params: OperaParams, words: Vocabulary) -> OperaSetting:
        return OperaSetting(**params.model_dump())

    def at_prompt(self, setting: OperaSetting, prompt: PromptFacts) -> OperaSetting:
        whole = ((1, prompt.num_tokens),) if prompt.num_tokens > 1 else ()
        return setting.model_copy(update={"trusted": whole if setting.span is None else span_at(setting.span, prompt)})

    def start(self, setting: OperaSetting, facts: SearchFacts) -> Search:
        return _Opera(setting, facts)


def shares(attention: Tensor) -> Tensor:
    """(S, C) rows of weights that sum to 1."""
    return attention / attention.sum(1, keepdim=True)


def grown(products: Tensor, weights: Tensor, scale_factor: float) -> Tensor:
    """(S, T) logarithms of the columns' products with one more row: (S, T - 1) those before, (S, T) its weights."""
    return pad(products, (0, 1)) + (scale_factor * weights).log()


def judged(params: OperaParams, products: Tensor, trust: Tensor) -> tuple[Tensor, Tensor]:
    """Of S tried tokens the penalty, and the column on which everything leans, the first of equal ones.

    Args:
        products: (S, T) logarithms.
        trust: (S,) the tokens' weight on the trusted span.
    """
    scores = products + _LOG_SMALL
    if params.official_fp16:
        scores = scores.exp().half().float()
    best, column = scores.max(1).values, scores.argmax(1)
    if products.shape[1] <= params.switch_length:
        return -trust, column
    return (best.clamp(max=_MOST_FP16) if params.official_fp16 else best.exp().clamp(max=params.penalty_cap)), column


def draw(logits: Tensor, random: torch.Generator) -> Tensor:
    """(1,) a token of (V,) logits by their softmax: the same for the same logits and numbers, wherever they are."""
    upto = logits.double().softmax(0).cpu().cumsum(0)
    place = torch.rand(1, generator=random).double() * upto[-1]
    return torch.searchsorted(upto, place, right=True).to(logits.device)


class Retrospection:
    """When to go back, where to, and what is not to be chosen there again.

    Every step says on which column each beam leans. The most frequent among the beams is where the beams would go back
    to, once each beam has leaned on it in more than `threshold` steps. A place that was visited too often passes it on
    to the one before. What a step that follows a return leans on is not noted.
    """

    def __init__(self, params: OperaParams) -> None:
        self.params = params
        self.columns: list[tuple[int, ...]] = []  # of each step, on which each beam leaned
        self.visits: Counter[int] = Counter()
        self.chosen: dict[int, set[tuple[int, int]]] = {}  # place -> (beam, token) that were chosen there last
        self.rejected: dict[int, set[tuple[int, int]]] = {}
        self.first = params.switch_length  # the first place to which one may go back

    def look(self, columns: Sequence[int]) -> int | None:
        """Note a step's columns; the place to go back to, if the beams must."""
        self.columns.append(tuple(columns))
        num_tokens = len(self.columns)
        self.first = max(self.first, num_tokens - self.params.history - 1)
        common = most_frequent(columns)
        times = [sum(step[beam : beam + 1] == (common,) for step in self.columns) for beam in range(len(columns))]
        if common < self.params.switch_length or min(times) <= self.params.threshold:
            return None
        if common + 1 >= num_tokens - 1:  # nothing was chosen there yet
            return None
        limit = self.params.candidates if self.params.visits is None else self.params.visits
        for place in (common + 1, common):
            if self.visits[place] < limit:
                self.visits[place] += 1
                return self._back_to(max(place, self.first))
        return None

    def _back_to(self, place: int) -> int:
        del self.columns[place + 1 :]
        self.rejected = {at: pairs for at, pairs in self.rejected.items() if at <= place}
        self.rejected[place] = self.rejected.get(place, set()) | self.chosen[place]
        return place

    def choose(self, place: int, chosen: Sequence[Candidate]) -> None:
        """Note what the beams chose."""
        self.chosen[place] = {(one.source, one.token) for one in chosen}


def most_frequent(values: Sequence[int]) -> int:
    """The smallest of the most frequent."""
    return min(values, key=lambda value: (-values.count(value), value))


@dataclass(frozen=True)
class _State:
    """A search before a token was chosen."""

    texts: tuple[Text, ...]
    book: Book
    products: Tensor  # (S, t - 1) of the beams' columns, without the row of each beam's last token


class _Opera(Search):
    def __init__(self, setting: OperaSetting, facts: SearchFacts) -> None:
        self.params, self.facts = setting, facts
        penalty, stopping = setting.length_penalty, setting.early_stopping
        self.book = Book(Rules(setting.beams, facts.max_tokens, facts.eos, penalty, stopping))
        self.products: Tensor | None = None
        self.past = Retrospection(setting)
        self.states: dict[int, _State] = {}  # by the number of tokens
        self.is_back = False  # whether the beams have just gone back
        self.settled = 0

    def step(self, living: Living) -> Steps:
        assert living.attention is not None
        texts = tuple(map(tuple, living.generated))
        place = len(texts[0])
        before = living.logits.new_empty(len(texts), 0) if self.products is None else self.products
        self.states[place] = _State(texts, self.book, before)
        products = self._with_row(before, living.attention) if place else before
        if self.is_back:
            self.is_back = False
            return self._choose(self._drawn(self._anew(living.logits, place), living), texts, products, {})
        log_probs, columns = yield from self._penalised(living.logits, products)
        tried = {"tried": len(texts) * self.params.candidates}
        if (back := self.past.look(columns * (self.params.beams if len(columns) < 2 else 1))) is not None:
            return self._go_back(back, texts, tried)
        return self._choose(self._drawn(log_probs, living), texts, products, tried)

    def stop(self, living: Living) -> Decision:
        return Decision(hypotheses=self.book.answers_now(living.generated)[:1])

    def _with_row(self, products: Tensor, attention: Tensor) -> Tensor:
        """(S, t) products with the row of each beam's last token."""
        first = self.facts.num_prompt
        weights = shares(attention)[:, first : first + products.shape[1] + 1]
        return grown(products, weights, self.params.scale_factor)

    def _penalised(self, logits: Tensor, products: Tensor) -> Generator[Tensor, Tried, tuple[Tensor, tuple[int, ...]]]:
        """(S, V) log-probabilities among each beam's candidates, and the column on which each beam leans."""
        params, first = self.params, self.facts.num_prompt
        candidates = logits.topk(params.candidates).indices
        penalties, columns = [], []
        for tokens in candidates.unbind(1):
            tried = yield tokens
            assert tried.attention is not None
            weights = shares(tried.attention)
            trust = sum(
                (weights[:, start:end].sum(1) for start, end in params.trusted), weights.new_zeros(len(weights))
            )
            longer = grown(products, weights[:, first : first + products.shape[1] + 1], params.scale_factor)
            penalty, column = judged(params, longer, trust)
            penalties.append(penalty)
            columns.append(column)
        scores = logits.gather(1, candidates) - params.penalty_weight * torch.stack(penalties, 1)
        floor = -torch.inf if params.temperature else _FLOOR  # a high temperature would make all others likely
        others = torch.full_like(logits, floor).masked_fill(logits == -torch.inf, -torch.inf)
        leaned = torch.stack(columns, 1).tolist()
        return others.scatter(1, candidates, scores).log_softmax(1), tuple(map(most_frequent, leaned))

    def _anew(self, logits: Tensor, place: int) -> Tensor:
        """(S, V) log-probabilities of all tokens, of which those rejected at a place are as unlikely as the least."""
        is_allowed = logits > -torch.inf
        least = logits.masked_fill(~is_allowed, torch.inf).amin(1, keepdim=True)
        scores = logits - least + _FLOOR
        for beam, token in self.past.rejected[place]:
            scores[beam, token] = scores[beam, token].clamp(max=_FLOOR)
        return scores.log_softmax(1)

    def _drawn(self, log_probs: Tensor, living: Living) -> Tensor:
        """(S, V) log-probabilities; where one beam draws, of the token that it drew alone."""
        if not self.params.temperature:
            return log_probs
        assert living.random is not None
        token = draw(log_probs[0] / self.params.temperature, living.random)
        return torch.full_like(log_probs, -torch.inf).index_copy(1, token, log_probs[:, token])

    def _choose(
        self, log_probs: Tensor, texts: Sequence[Text], products: Tensor, counts: Mapping[str, int]
    ) -> Decision:
        self.book, running = self.book.advance(log_probs, texts)
        if self.book.is_over:
            return Decision(hypotheses=self.book.finished[:1], counts=counts)
        self.past.choose(len(texts[0]), running)
        self.products = products[[one.source for one in running]]
        longer = [(*texts[one.source], one.token) for one in running]
        lives = tuple(Continuation(one.source, len(texts[one.source]), (one.token,)) for one in running)
        return Decision(lives, settled=self._settle(longer), counts=counts)

    def _go_back(self, place: int, texts: Sequence[Text], counts: Mapping[str, int]) -> Decision:
        """To how things were before a token was chosen at a place. A beam that has died since comes back from the
        living one that has most of its tokens."""
        state = self.states[place]
        self.states = {at: one for at, one in self.states.items() if at < place}
        self.book, self.products, self.is_back = state.book, state.products, True
        lives = []
        for text in state.texts:
            kept = [num_shared((text, other), 0) for other in texts]
            source = kept.index(max(kept))
            lives.append(Continuation(source, kept[source], text[kept[source] :]))
        counts = {**counts, "rollbacks": 1}
        return Decision(tuple(lives), settled=self.settled, counts=counts, facts={"back_to": place})

    def _settle(self, texts: Sequence[Text]) -> int:
        """How many tokens every answer has: those that all beams share where they can still go back to."""
        self.states = {at: one for at, one in self.states.items() if at >= self.past.first}
        shared, book = texts, self.book
        if self.past.first in self.states:
            shared, book = self.states[self.past.first].texts, self.states[self.past.first].book
        self.settled = num_shared([*shared, *(answer.tokens for answer in book.finished)], self.settled)
        return self.settled
