"""The worker's unfinished requests that ask for something: one map, which every part of a step reads."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from whipstaff.server.engine.worker.logits.metadata import RequestState
from whipstaff.server.plan import PositionedPlan, RequestPlan


class CapturedRows(NamedTuple):
    """Activations of one request at hook points that are equally wide."""

    rows: Tensor  # (points, positions, width), on the host
    seen: npt.NDArray[np.bool_]  # (positions,) which of them were there already


class Arrival(NamedTuple):
    """A request that a worker hears of, for the first time or again."""

    request_id: str
    placed: PositionedPlan | None  # None: a plain one
    prompt: Sequence[int] = ()
    seed: int | None = None
    scores_prompt: bool = False  # whether log-probabilities of its prompt are wanted
    bans: bool = False  # whether vLLM may ban tokens after rules: a grammar, lists of tokens or words, a least length
    bias: Mapping[int, float] = {}  # what vLLM will add to the logits of some tokens
    ends: frozenset[int] = frozenset()  # tokens that end an answer


def arrival(new: Any, plan: RequestPlan) -> Arrival:
    """What vLLM's scheduler tells of a new request with a plan."""
    parameters, placed = new.sampling_params, PositionedPlan(plan, int(new.prompt_len))
    scores_prompt = parameters.prompt_logprobs is not None
    bans = parameters.structured_outputs, parameters.allowed_token_ids, parameters.bad_words, parameters.min_tokens
    ids, bias = new.prompt_token_ids or (), parameters.logit_bias or {}
    ends = frozenset({parameters.eos_token_id, *(parameters.stop_token_ids or ())} - {None})
    return Arrival(new.req_id, placed, ids, parameters.seed, scores_prompt, any(bans), bias, ends)


@dataclass(eq=False)
class PlannedRequest:
    """An unfinished request with a plan."""

    request_id: str
    placed: PositionedPlan
    decoding: RequestState | None = None  # set by `LogitsPipeline.add`; None: its plan says nothing of decoding
    histories: list[int] = field(default_factory=list)  # set by `Histories.add`: a row for each of its conditions
    captured: list[CapturedRows] = field(default_factory=list)  # set by `Captures.add`
    num_read: int = 0  # set by `Histories`: how many of its positions were fed, if it has conditions


class Requests(dict[str, PlannedRequest]):
    """By id."""

    def __init__(self, found: Mapping[str, PlannedRequest] = MappingProxyType({})) -> None:
        super().__init__(found)
        self._of_batch: tuple[list[str], list[PositionedPlan | None]] = [], []  # as `plans_of` said last

    def plans_of(self, request_ids: Sequence[str]) -> Sequence[PositionedPlan | None]:
        """What each of a batch's rows asks for; None: nothing. The same object as long as the rows and what is known of
        them are the same."""
        names, plans = self._of_batch
        if names != request_ids:
            names = list(request_ids)
            plans = [None if (request := self.get(name)) is None else request.placed for name in names]
            self._of_batch = names, plans
        return plans

    @cached_property
    def have_companions(self) -> bool:
        """Whether any of them is drawn for together with others."""
        return any(request.placed.plan.companions for request in self.values())

    @cached_property
    def need_auxiliaries(self) -> bool:
        """Whether auxiliary models run on any of them."""
        return any(request.placed.auxiliaries for request in self.values())

    def _forget(self) -> None:
        """What was found out about all of them, since they are others now."""
        self._of_batch = [], []
        for name in ("have_companions", "need_auxiliaries"):
            self.__dict__.pop(name, None)

    def decoding_of(self, request_id: str) -> RequestState | None:
        """What the logits pipeline keeps of it, if it keeps anything."""
        request = self.get(request_id)
        return None if request is None else request.decoding

    def like(self, source: str, target: str) -> tuple[PlannedRequest, PlannedRequest] | None:
        """A request and another that is made like it, if it is not there yet. None: it is a plain one."""
        found = self.get(source)
        if found is None:
            return None
        self._forget()
        return found, self.setdefault(target, PlannedRequest(target, found.placed))

    def finish(self, request_ids: Iterable[str]) -> Iterator[PlannedRequest]:
        """Forget requests, and say who they were. Before `take`: an id may finish and come back in one step."""
        for request_id in request_ids:
            if (request := self.pop(request_id, None)) is not None:
                self._forget()
                yield request

    def take(self, arrivals: Iterable[Arrival]) -> Iterator[tuple[PlannedRequest, Arrival]]:
        """Keep what came with a plan. Who is there already keeps what was made for it: Model Runner V2 hears again of a
        request that was preempted, and prompts of one token come twice (see `groups`), the second time shorter."""
        for arrival in arrivals:
            if arrival.placed is not None:
                self._forget()
                request = self.setdefault(arrival.request_id, PlannedRequest(arrival.request_id, arrival.placed))
                request.placed = arrival.placed
                yield request, arrival
