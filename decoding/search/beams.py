"""The book that beam search keeps: which beams run, what they score, and which answers are finished.

As transformers 5 keeps it for one prompt (`GenerationMixin._beam_search`): of all continuations of all beams the best
C are looked at, C enough that K of them do not end an answer; those of the first K that end one are answers; the best K
of the others run on. An answer's score is the sum of its log-probabilities over its length (with the token that ended
it) to the power of `length_penalty`. A book is never changed: a search that goes back takes up an earlier one.

Where continuations score the same, the earlier beam comes first, then the lower token; transformers leaves it to
`torch.topk`, which says nothing of ties. A continuation of probability 0 is none, so that fewer than K beams may run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from torch import Tensor

from whipstaff.decoding.search.search import Hypothesis

EarlyStopping = bool | Literal["never"]


class Candidate(NamedTuple):
    """A beam and a token that may follow it."""

    source: int
    token: int
    score: float  # of the beam with the token


@dataclass(frozen=True)
class Rules:
    """What holds for a whole search."""

    num_beams: int
    max_tokens: int
    eos: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: EarlyStopping = False

    @property
    def num_candidates(self) -> int:
        """How many continuations are looked at, so that `num_beams` of them end no answer."""
        return max(2, 1 + len(self.eos)) * self.num_beams

    def score(self, total: float, num_tokens: int) -> float:
        return total / math.pow(num_tokens, self.length_penalty)

    def answer(self, one: Candidate, generated: Sequence[Sequence[int]]) -> Hypothesis:
        """What a candidate comes to that ends an answer, or is the last that may be said."""
        text = (*generated[one.source], one.token)
        return Hypothesis(text, self.score(one.score, len(text)), "stop" if one.token in self.eos else "length")

    def cut(self, generated: Sequence[Sequence[int]], scores: Sequence[float]) -> list[Hypothesis]:
        """What beams that run come to where they stand."""
        return [
            Hypothesis(tuple(text), self.score(score, len(text)), "length")
            for text, score in zip(generated, scores, strict=True)
        ]

    def best_possible(self, total: float, num_tokens: int) -> float:
        """What a beam may come to score, as transformers guesses: exact with early_stopping "never"."""
        is_hopeful = self.early_stopping == "never" and self.length_penalty > 0
        return self.score(total, self.max_tokens if is_hopeful else num_tokens)


@dataclass(frozen=True)
class Book:
    """A search after some tokens."""

    rules: Rules
    scores: tuple[float, ...] = (0.0,)  # of the beams that run, best first
    finished: tuple[Hypothesis, ...] = ()  # at most `num_beams`, best first
    is_over: bool = False

    def advance(self, log_probs: Tensor, generated: Sequence[Sequence[int]]) -> tuple["Book", list[Candidate]]:
        """The book one token later, and what runs on.

        Args:
            log_probs: (S, V) float32 of the token after each beam.
            generated: (S,) each beam's tokens.
        """
        rules = self.rules
        totals = log_probs + log_probs.new_tensor(self.scores)[:, None]
        candidates = best_candidates(totals, rules.num_candidates)
        num_tokens = len(generated[0]) + 1
        is_last = num_tokens >= rules.max_tokens
        ended = [
            rules.answer(one, generated) for one in candidates[: rules.num_beams] if is_last or one.token in rules.eos
        ]
        finished = best_of(self.finished, ended, rules.num_beams)
        running = [] if is_last else [one for one in candidates if one.token not in rules.eos][: rules.num_beams]
        is_over = not running or self._is_settled(finished, running[0].score, num_tokens)
        book = replace(self, scores=tuple(one.score for one in running), finished=finished, is_over=is_over)
        return book, running

    def answers_now(self, generated: Sequence[Sequence[int]]) -> tuple[Hypothesis, ...]:
        """The best answers where the beams are cut off."""
        return best_of(self.finished, self.rules.cut(generated, self.scores), self.rules.num_beams)

    def _is_settled(self, finished: Sequence[Hypothesis], best: float, num_tokens: int) -> bool:
        """Whether no beam is thought to become a better answer than the worst of enough finished ones."""
        rules = self.rules
        if len(finished) < rules.num_beams:
            return False
        return rules.early_stopping is True or rules.best_possible(best, num_tokens) <= finished[-1].score


def best_candidates(scores: Tensor, num: int) -> list[Candidate]:
    """The best `num` of (S, V) scores, best first; of equal ones the first, and none that is -inf."""
    vocab, flat = scores.shape[1], scores.flatten()
    best = flat.topk(min(num + 1, len(flat)))
    values, places = best.values.tolist(), best.indices.tolist()
    if len(values) > num and values[num - 1] == values[num] > -math.inf:  # which of the equal ones are there is unsaid
        places = (flat >= values[num]).nonzero()[:, 0].tolist()
        values = flat[places].tolist()
    found = sorted((-value, place) for value, place in zip(values, places, strict=True) if value > -math.inf)
    return [Candidate(place // vocab, place % vocab, -value) for value, place in found[:num]]


def best_of(finished: Sequence[Hypothesis], more: Sequence[Hypothesis], num: int) -> tuple[Hypothesis, ...]:
    """The best answers, best first; of equal ones the first."""
    return tuple(sorted((*finished, *more), key=lambda answer: -answer.score)[:num])


def num_shared(texts: Sequence[Sequence[int] | str], known: int) -> int:
    """How many leading tokens, or characters, all texts have in common, given that they have `known`."""
    first, shortest = texts[0], min(map(len, texts))
    while known < shortest and all(text[known] == first[known] for text in texts):
        known += 1
    return known
