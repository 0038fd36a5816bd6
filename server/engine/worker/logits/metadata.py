"""Decoding metadata: the rows of a step that become tokens, and what has to be done to which of them.

A batch that decodes keeps its rows from step to step, so what follows from who they are is worked out, and sent to the
device, once.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from whipstaff.decoding.method import LogitsRewriter, Stage
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.mix import MixedRow
from whipstaff.decoding.plan import DecodingPlan, SamplerSettings
from whipstaff.decoding.search.search import SearchMethod
from whipstaff.server.engine.worker.batch import ABSENT, Ints

_ORDER = {name: index for index, name in enumerate(METHODS)}
Turn = Stage | Literal["late temperature"]
"""A stage, or its place after truncation for requests that say temperature_last."""


class BoundMethod(NamedTuple):
    """One method of one request, ready to run."""

    method: LogitsRewriter[Any]
    setting: BaseModel
    streams: tuple[str, ...]
    heads: tuple[str, ...]
    early: tuple[int, ...]
    state: slice  # which of the request's floats are its own


@dataclass(eq=False)
class RequestState:
    """An unfinished request with a decoding plan."""

    plan: DecodingPlan
    num_prompt: int
    seed: int
    scores_prompt: bool
    bans: bool
    bound: list[BoundMethod]
    bias: Mapping[int, float] = field(default_factory=dict)  # that vLLM will add to the logits of some tokens
    slot: int = -1  # its row of the tables of tokens and floats; -1: it needs none
    history_slot: int = -1  # where its hidden states are kept; -1: they are not
    ends: frozenset[int] = frozenset()  # tokens that end an answer
    excess: Tensor | None = None  # (num_prompt,) by which told log-probabilities of its prompt are too low

    @property
    def tells_scores(self) -> bool:
        return any(one.method.tells_scores(one.setting) for one in self.bound)

    @cached_property
    def reads_attention(self) -> bool:
        """Whether its methods or its search ask what the last layer looks at."""
        search = None if self.plan.search is None else METHODS[self.plan.search.method]
        if isinstance(search, SearchMethod) and "attention" in search.needs:
            return True
        return any("attention" in one.method.needs for one in self.bound)

    @property
    def temperature(self) -> float:
        """The request's own, where a method asks for it."""
        assert self.plan.draw is not None
        return self.plan.draw.temperature

    @property
    def is_tempered_late(self) -> bool:
        return self.plan.draw is not None and self.plan.draw.is_temperature_last


class ActiveRow(NamedTuple):
    """A row of logits that belongs to a request with a plan."""

    row: int
    request: RequestState


class MethodCall(NamedTuple):
    """One method on the rows that use it with the same streams, heads and place among the request's floats."""

    method: LogitsRewriter[Any]
    streams: tuple[str, ...]
    heads: tuple[str, ...]
    state: slice
    active: list[ActiveRow]
    indices: list[int]  # of these rows among all that are active
    rows: Tensor  # (n,) int64 of the logits
    slots: Tensor | None  # (n,) int64; None where the requests need none
    settings: list[BaseModel]
    early: list[tuple[int, ...]]  # (n,) which early layers each row reads


class Tempered(NamedTuple):
    """Rows that get their request's own temperature."""

    rows: Tensor  # (n,) int64
    temperature: Tensor  # (n,) float32


class Biased(NamedTuple):
    """Rows to which vLLM will add a logit bias."""

    rows: Tensor  # (n,) int64
    which: Tensor  # (m,) int64 of these rows
    tokens: Tensor  # (m,) int64 the token whose logit there
    values: Tensor  # (m,) float32 what is added


class Truncated(NamedTuple):
    """Rows that get their request's own truncation: see `draw.apply_top_k_top_p_min_p`."""

    rows: Tensor  # (n,) int64
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None


class DecodingMetadata:
    """What `active` need done, on the device of their logits.

    Args:
        active: in the order of their rows.
        most_early: how many rows of early layers' logits may be there at once; a call beyond that becomes several.
        is_prompt: whether the rows are a prompt's, to be scored and not drawn from.
    """

    def __init__(
        self, active: Sequence[ActiveRow], device: torch.device, most_early: int, is_prompt: bool = False
    ) -> None:
        self.active, self.is_prompt, self._sent = active, is_prompt, partial(sent, device=device)
        self.num_prompt = np.array([active_row.request.num_prompt for active_row in active], np.int64)
        self._calls = self._grouped(most_early)
        mixes = ((index, active_row.row, active_row.request.plan.mix) for index, active_row in enumerate(active))
        self._mixes = [(index, row, mix, 1 + mix.num_companions) for index, row, mix in mixes if mix is not None]
        plans = [(active_row, active_row.request.plan) for active_row in active]
        self.explained = [row for row, plan in plans if plan.explain is not None and plan.search is None]
        self.scored_base = self._rows(lambda request: request.plan.scores_base)
        self.banning = self._rows(lambda request: request.bans)
        self.biased = self._biased()
        self.tempered = {is_late: self._tempered(is_late) for is_late in (False, True)}
        self.truncated = self._truncated()
        self.changes_draw = any(active_row.request.bound or active_row.request.plan.draw for active_row in active)

    def calls(self, *turns: Turn) -> list[MethodCall]:
        """In the order in which they run."""
        return [call for turn in turns for call in self._calls.get(turn, ())]

    def mixed(self, num_generated: Ints, companions: Mapping[int, tuple[int, ...]]) -> list[MixedRow]:
        """The rows whose mixes can be made: of sequences that are all there. A mix ends with the first that leaves."""
        found = []
        for index, row, mix, num in self._mixes:
            now, rows = mix.at(int(num_generated[index])), (row, *companions.get(row, ()))
            if now is not None and len(rows) >= num and ABSENT not in rows[:num]:
                found.append(MixedRow(row, now, rows))
        return found

    def _grouped(self, most_early: int) -> dict[Turn, list[MethodCall]]:
        found: dict[Any, list[tuple[int, BoundMethod]]] = {}
        for index, (_, request) in enumerate(self.active):
            for one in request.bound:
                is_late = one.method.stage == "temperature" and request.is_tempered_late
                turn: Turn = "late temperature" if is_late else one.method.stage
                key = turn, one.method, one.streams, one.heads, one.state.start
                found.setdefault(key, []).append((index, one))
        calls: dict[Turn, list[MethodCall]] = {}
        for (turn, *_), users in sorted(found.items(), key=lambda item: _ORDER[item[0][1].name]):
            calls.setdefault(turn, []).extend(self._call(part) for part in _parts(users, most_early))
        return calls

    def _call(self, users: Sequence[tuple[int, BoundMethod]]) -> MethodCall:
        indices, bound = [index for index, _ in users], [one for _, one in users]
        active = [self.active[index] for index in indices]
        slots = [request.slot for _, request in active]
        method, _, streams, heads, _, state = bound[0]
        return MethodCall(
            method,
            streams,
            heads,
            state,
            active,
            indices,
            self._sent([row for row, _ in active]),
            self._sent(slots) if slots[0] >= 0 else None,
            [one.setting for one in bound],
            [one.early for one in bound],
        )

    def _rows(self, wanted: Any) -> Tensor | None:
        rows = [row for row, request in self.active if wanted(request)]
        return self._sent(rows) if rows else None

    def _biased(self) -> Biased | None:
        found = [(row, request.bias) for row, request in self.active if request.bias]
        if not found:
            return None
        said = [(index, token, float(by)) for index, (_, bias) in enumerate(found) for token, by in bias.items()]
        return Biased(self._sent([row for row, _ in found]), *map(self._sent, zip(*said, strict=True)))

    def _drawn(self) -> Iterator[tuple[int, RequestState, SamplerSettings]]:
        for row, request in self.active:
            if request.plan.draw is not None:
                yield row, request, request.plan.draw

    def _tempered(self, is_late: bool) -> Tempered | None:
        found = [
            (row, draw.temperature)
            for row, request, draw in self._drawn()
            if draw.is_temperature_last == is_late
            and draw.temperature != 1
            and not any(one.method.stage == "temperature" for one in request.bound)
        ]
        return Tempered(*map(self._sent, zip(*found, strict=True))) if found else None

    def _truncated(self) -> Truncated | None:
        found = [(row, draw) for row, _, draw in self._drawn() if draw.truncates]
        if not found:
            return None
        rows, draws = zip(*found, strict=True)
        return Truncated(
            self._sent(rows),
            self._sent([draw.top_k for draw in draws]) if any(draw.top_k for draw in draws) else None,
            self._sent([draw.top_p for draw in draws]) if any(draw.top_p < 1 for draw in draws) else None,
            self._sent([draw.min_p for draw in draws]) if any(draw.min_p for draw in draws) else None,
        )


def sent(numbers: Any, device: torch.device) -> Tensor:
    """Numbers from the host, on the device, without waiting for it; floats become float32."""
    made = torch.as_tensor(numbers)
    if made.dtype == torch.float64:
        made = made.to(torch.float32)
    return made.to(device, non_blocking=True)


def _parts(users: Sequence[tuple[int, BoundMethod]], most_early: int) -> Iterator[Sequence[tuple[int, BoundMethod]]]:
    """A call's rows, in parts that read no more than `most_early` early streams, or one row's."""
    first = num_early = 0
    for index, (_, one) in enumerate(users):
        num_early += len(one.early)
        if index > first and num_early > most_early:
            yield users[first:index]
            first, num_early = index, len(one.early)
    yield users[first:]
