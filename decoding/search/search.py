"""The contract of a search: a request that owns several living sequences, which fork, die and shrink.

A search method says how many sequences a request may own at most and starts a `Search`, the state of one request. In
every step in which the engine has computed all of a request's living sequences, `Search.step` sees the logits after
each one's last token, may *try* tokens that are not chosen (each is fed once, at the position where the next token will
stand, and leaves nothing behind), and decides which sequences live on: from which living one, keeping how many of its
tokens, followed by which new ones. Nothing else is said of keys and values, seats or blocks: the engine finds what it
has computed already, shares it and computes the rest.

A step is a generator, so that the tokens which several requests want tried can pass the model together: it yields what
it wants tried, gets what the model made of it, and returns its decision.
"""

from abc import abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from whipstaff.decoding.method import Method, Params, PromptFacts, Vocabulary

SearchNeed = Literal["attention", "hidden", "tries"]  # what a search reads beside logits: see `Living`, `Tried`


class Tried(NamedTuple):
    """What the model made of one token tried after each of S living sequences."""

    hidden: Tensor  # (S, H) last hidden states, after the final norm
    attention: Tensor | None = None  # (S, C + 1) as in `Living`, of the token that was tried


@dataclass
class Living:
    """A request's living sequences, in the order in which the last decision named them; at first one, the prompt."""

    generated: Sequence[Sequence[int]]  # (S,) the tokens of each after the prompt
    logits: Tensor  # (S, V) float32 after each one's last token, after mixes, rules and penalties
    hidden: Tensor | None = None
    """(S, H) last hidden states of these tokens, after the final norm; under the adapter that `SearchMethod.adapter`
    names, where it names one."""
    attention: Tensor | None = None
    """(S, C) float32: how much the last token of each looked at every position up to its own, in the model's last
    layer: the largest probability among the heads, so that a row need not sum to 1. C is the longest sequence's length;
    0 beyond a sequence's own."""
    random: torch.Generator | None = None  # on the CPU; of the request's seed, and the same in every rank


class Continuation(NamedTuple):
    """A sequence that lives on."""

    source: int  # which of the living ones it continues
    keep: int  # how many of that one's generated tokens it keeps
    tokens: tuple[int, ...]  # that follow; none where the last one it keeps is to be computed once more


class Hypothesis(NamedTuple):
    """A finished answer."""

    tokens: tuple[int, ...]  # generated, with the token that ended it
    score: float
    finish_reason: Literal["stop", "length"]


@dataclass(frozen=True)
class Decision:
    """What a step came to. Either some sequences live on, or the search is over and has answers."""

    living: tuple[Continuation, ...] = ()
    hypotheses: tuple[Hypothesis, ...] = ()  # best first, once the search is over; never none then
    settled: int = 0  # leading tokens that every answer will have; the first living sequence holds them
    counts: Mapping[str, int] = field(default_factory=dict)  # of this step, for metrics: rollbacks, tried ...
    facts: Mapping[str, Any] = field(default_factory=dict)  # plain JSON, for whoever asked to have the search explained


class SearchFacts(NamedTuple):
    """What a search is told when it starts."""

    num_prompt: int  # tokens of the prompt
    max_tokens: int  # that an answer may have
    eos: frozenset[int]  # tokens that end an answer; empty where the request ignores them
    heads: Mapping[str, Mapping[str, Tensor]] = {}  # head field -> part -> float32 tensor
    room: int | None = None  # the most tokens that a living sequence may have generated, where it may exceed an answer


Steps = Generator[Tensor, Tried, Decision]  # yields (S,) int64 tokens to try, one after each living sequence


class Search:
    """One request's search, on its way."""

    @abstractmethod
    def step(self, living: Living) -> Steps:
        """Decide how to go on. Every rank computes the same."""

    @abstractmethod
    def stop(self, living: Living) -> Decision:
        """Come to an end at once, in the place of a step that is not the first: with the best of the answers that are
        finished and of those that live, cut off where they are."""


class SearchParams(Params):
    """How much a search may take. Where that is over it ends with the best that it has."""

    max_time: float | None = Field(
        None, gt=0, le=1e6, allow_inf_nan=False, description="seconds since the request arrived; none: no limit"
    )
    max_computed_tokens: int | None = Field(
        None, ge=1, le=1 << 40, description="tokens computed after the prompts, with those tried; none: no limit"
    )


S = TypeVar("S", bound=SearchParams)


class SearchMethod(Method[S]):
    """A method that searches. A request has at most one."""

    stage = "search"
    needs: ClassVar[frozenset[SearchNeed]] = frozenset()
    sequences_field: ClassVar[str] = "method"  # the parameter that says how many sequences live
    adapter_field: ClassVar[str] = ""  # the parameter that may name a LoRA adapter by which hidden states are read
    explains: ClassVar[bool] = False  # whether `Decision.facts` say something of every token
    drafts: ClassVar[bool] = (
        True  # whether what lives is what answers may become, and every token follows what lived then
    )
    setting: ClassVar[type[BaseModel]]
    """What travels to the engine, if that is something else than the parameters."""

    @abstractmethod
    def num_sequences(self, params: S) -> int:
        """The most sequences that live at once."""

    def adapter(self, params: S) -> str | None:
        """The LoRA adapter under which `Living.hidden` is read, while logits stay the request's own; None: its own."""
        return getattr(params, self.adapter_field) if self.adapter_field else None

    def draws(self, params: S) -> bool:
        """Whether it draws tokens, by its own parameters and the request's seed."""
        return False

    def num_computed(self, params: S) -> int:
        """Tokens that are computed for each token of an answer, those tried aside, while nothing is taken back."""
        return self.num_sequences(params)

    def num_tried(self, params: S) -> int:
        """Tokens that are tried for each token of an answer, likewise."""
        return 0

    def num_answers(self, params: S) -> int:
        """The most answers that it comes to."""
        return 1

    def resolve(self, params: S, words: Vocabulary) -> BaseModel:
        """The parameters as the engine needs them. Raises: DecodingError."""
        return params

    def at_prompt(self, setting: Any, prompt: PromptFacts) -> BaseModel:
        """The setting for one prompt. Raises: DecodingError."""
        found: BaseModel = setting
        return found

    @abstractmethod
    def start(self, setting: Any, facts: SearchFacts) -> Search:
        """A search of one request."""
