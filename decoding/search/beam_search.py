"""Beam search, as transformers defines it or as vLLM's `use_beam_search` does.

Of transformers: `beams`, and `groups` where they are to differ. Of vLLM: every beam brings its 2 K likeliest tokens;
those that end an answer make an answer, whatever its rank; of the others the best K run on, always to the end. An
answer's score is the sum of its log-probabilities over its length to the power of `length_penalty`, where the prompt
counts and the token that ends it does not. We stop where no beam can come before K answers any more, which changes none
of them. (vLLM also draws a token per beam, and that one, if it ends the answer, is an answer, too, however unlikely:
that is left out, at every temperature.)

With `normalize` off, the scores that are added up are the logits as they come: with `contrastive`, the objective that
Li et al. 2022 (arXiv:2210.15097) search with beams. (Of each step their code first takes the 2 K tokens that the expert
alone finds likeliest, whatever came before, and keeps the best K of these by the objective. We search all.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from whipstaff.decoding.method import DecodingError, Vocabulary
from whipstaff.decoding.search.beams import (
    Book,
    Candidate,
    EarlyStopping,
    Rules,
    best_candidates,
    best_of,
    num_shared,
)
from whipstaff.decoding.search.groups import BeamGroups
from whipstaff.decoding.search.search import (
    Continuation,
    Decision,
    Hypothesis,
    Living,
    Search,
    SearchFacts,
    SearchMethod,
    SearchParams,
    Steps,
)


class BeamSearchParams(SearchParams):
    """How many beams, when they stop, and how answers of different lengths compare."""

    method: Literal["beam_search"] = "beam_search"
    num_beams: int = Field(4, ge=1, le=64, description="sequences that are searched at once; 1 is off")
    length_penalty: float = Field(
        1.0, ge=-10, le=10, allow_inf_nan=False, description="exponent of the length by which scores are divided"
    )
    early_stopping: EarlyStopping = Field(
        False,
        description="true: once enough answers are there; false: by a heuristic; never: where none can improve",
    )
    num_beam_groups: int = Field(1, ge=1, le=64, description="groups of beams that avoid one another's tokens")
    diversity_penalty: float = Field(
        0.0,
        ge=0,
        le=1e4,
        allow_inf_nan=False,
        description="of tokens that groups before have said",
    )
    scoring: Literal["hf", "vllm"] = Field("hf", description="whose beam search: transformers' or vLLM's")
    normalize: bool = Field(True, description="whether scores are log-probabilities, or the logits as they are")

    @field_validator("scoring")
    @classmethod
    def _vllm_never_stops(cls, scoring: str, info: ValidationInfo) -> str:
        for name, usual in (("early_stopping", False), ("num_beam_groups", 1)):
            if scoring == "vllm" and info.data.get(name, usual) != usual:
                raise ValueError(f"vLLM's beam search has no {name}")
        return scoring

    @field_validator("normalize")
    @classmethod
    def _groups_are_normal(cls, normalize: bool, info: ValidationInfo) -> bool:
        if not normalize and info.data.get("num_beam_groups", 1) > 1:
            raise ValueError("groups of beams compare log-probabilities")
        return normalize


class BeamSearch(SearchMethod[BeamSearchParams]):
    name, paper = "beam_search", "Graves 2012, arXiv:1211.3711"
    params = BeamSearchParams
    shorthands: ClassVar[Mapping[str, str]] = {
        name: name for name in ("num_beams", "early_stopping", "num_beam_groups", "diversity_penalty")
    }
    switches = (frozenset({"num_beams"}),)
    sequences_field = "num_beams"
    shared: ClassVar[Mapping[str, str]] = {"length_penalty": "length_penalty"}

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> BeamSearchParams:
        return BeamSearchParams(num_beams=1)

    def is_off(self, params: BeamSearchParams) -> bool:
        return params.num_beams == 1 and params.scoring == "hf"

    def resolve(self, params: BeamSearchParams, words: Vocabulary) -> BeamSearchParams:
        num_beams, num_groups = params.num_beams, params.num_beam_groups
        if self.is_off(params):
            return params
        if num_beams % num_groups:
            raise DecodingError(f"{num_beams} beams do not make {num_groups} equal groups", "num_beam_groups")
        if num_groups > 1 and not params.diversity_penalty:
            raise DecodingError("without it all groups are the same", "diversity_penalty")
        if params.diversity_penalty and num_groups == 1:
            raise DecodingError("it is between groups; say num_beam_groups", "diversity_penalty")
        return params

    def num_sequences(self, params: BeamSearchParams) -> int:
        return params.num_beams

    def num_answers(self, params: BeamSearchParams) -> int:
        return params.num_beams

    def start(self, setting: BeamSearchParams, facts: SearchFacts) -> Search:
        if setting.scoring == "vllm":
            return _Beams(setting, _BookOfVllm(setting, facts))
        penalty, stopping = setting.length_penalty, setting.early_stopping
        rules = Rules(setting.num_beams, facts.max_tokens, facts.eos, penalty, stopping)
        if setting.num_beam_groups > 1:
            return BeamGroups(rules, setting.num_beam_groups, setting.diversity_penalty)
        return _Beams(setting, Book(rules))


class _Beams(Search):
    """Beams on their way."""

    def __init__(self, setting: BeamSearchParams, book: "Book | _BookOfVllm") -> None:
        self._setting, self._book, self._settled = setting, book, 0

    def step(self, living: Living) -> Steps:
        log_probs = living.logits.log_softmax(1) if self._setting.normalize else living.logits
        self._book, running = self._book.advance(log_probs, living.generated)
        answers = self._book.finished
        if self._book.is_over:
            return Decision(hypotheses=answers)
        texts = [(*living.generated[one.source], one.token) for one in running]
        self._settled = num_shared([*texts, *(answer.tokens for answer in answers)], self._settled)
        return Decision(
            tuple(Continuation(one.source, len(living.generated[one.source]), (one.token,)) for one in running),
            settled=self._settled,
        )
        yield  # nothing is tried

    def stop(self, living: Living) -> Decision:
        return Decision(hypotheses=self._book.answers_now(living.generated))


@dataclass(frozen=True)
class _BookOfVllm:
    """What `Book` is for vLLM's beam search."""

    setting: BeamSearchParams
    facts: SearchFacts
    scores: tuple[float, ...] = (0.0,)
    finished: tuple[Hypothesis, ...] = ()
    is_over: bool = False

    def advance(self, log_probs: Tensor, generated: Sequence[Sequence[int]]) -> tuple["_BookOfVllm", list[Candidate]]:
        num_beams, num_tokens = self.setting.num_beams, len(generated[0]) + 1
        candidates = [
            Candidate(source, one.token, self.scores[source] + one.score)
            for source in range(len(log_probs))
            for one in best_candidates(log_probs[source, None], 2 * num_beams)
        ]
        ended = [
            Hypothesis((*generated[one.source], one.token), self._score(one.score, num_tokens - 1), "stop")
            for one in candidates
            if one.token in self.facts.eos
        ]
        others = [one for one in candidates if one.token not in self.facts.eos]
        running = sorted(others, key=lambda one: -one.score)[:num_beams]
        if num_tokens >= self.facts.max_tokens:
            ended += [
                Hypothesis((*generated[one.source], one.token), self._score(one.score, num_tokens), "length")
                for one in running
            ]
            running = []
        finished = best_of(self.finished, ended, num_beams)
        is_over = not running or self._is_settled(finished, running[0].score, num_tokens)
        book = replace(self, scores=tuple(one.score for one in running), finished=finished, is_over=is_over)
        return book, running

    def answers_now(self, generated: Sequence[Sequence[int]]) -> tuple[Hypothesis, ...]:
        """The best answers where the beams are cut off."""
        cut = [
            Hypothesis(tuple(text), self._score(score, len(text)), "length")
            for text, score in zip(generated, self.scores, strict=True)
        ]
        return best_of(self.finished, cut, self.setting.num_beams)

    def _score(self, total: float, num_tokens: int) -> float:
        """Of an answer of so many tokens, the one that ended it aside."""
        return total / math.pow(max(1, self.facts.num_prompt + num_tokens), self.setting.length_penalty)

    def _is_settled(self, finished: Sequence[Hypothesis], best: float, num_tokens: int) -> bool:
        """Whether no beam can come before the worst of enough answers: log-probabilities only make sums smaller."""
        if len(finished) < self.setting.num_beams or not self.setting.normalize:
            return False
        return max(self._score(best, length) for length in (num_tokens, self.facts.max_tokens)) <= finished[-1].score
