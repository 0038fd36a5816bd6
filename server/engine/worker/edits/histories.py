"""Histories: what a request's conditions read, position by position, for edits that are gated by it.

Sites write most readings themselves (`run_edits_`); entropies come with the logits, a forward pass later. Readings of
finished sequences are kept for a while, for who asks by `readings_id`.
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whipstaff.cuda_ext import explain_rows
from whipstaff.server.engine.explanations import READINGS
from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.server.engine.worker.edits.token_table import EditedSpan
from whipstaff.server.engine.worker.requests import PlannedRequest, Requests
from whipstaff.server.plan import PositionedPlan

MAX_KEPT, MAX_KEPT_NUMBERS = 256, 1 << 22  # sequences that are finished, and numbers, whose readings are kept


class Kept(NamedTuple):
    """The readings of a sequence."""

    name: str  # the engine's
    readings_id: str
    placed: PositionedPlan
    values: Tensor  # (conditions, positions) float32, on the device

    def to_json(self) -> dict[str, Any]:
        """Waits for the device."""
        return {
            "name": self.name,
            "positions": self.values.shape[1],
            "columns": [
                [None if math.isnan(value) else value for value in column[: 1 if is_latched else None]]
                for column, is_latched in zip(self.values.tolist(), self.placed.latched_columns, strict=True)
            ],
        }


class AwaitedEntropies(NamedTuple):
    """Where the entropies of a step's distributions go."""

    logits_rows: Tensor  # (n,) int64
    histories: Tensor  # (n,) int64 rows of `Histories.values`
    positions: Tensor  # (n,) int64 of the tokens that are drawn from them


class ToldStops(NamedTuple):
    """Who ends with the tokens that a step was given, by what was read of them; still on the device."""

    requests: Sequence[str]
    holds: Tensor  # (n,) bool

    def on_host(self) -> frozenset[str]:
        """Waits for the device."""
        return frozenset(name for name, holds in zip(self.requests, self.holds.tolist(), strict=True) if holds)


class ToldReadings(NamedTuple):
    """What was read of the last tokens of sequences whose clients are told as it comes; still on the device."""

    requests: Sequence[str]
    positions: Sequence[int]
    nums: Sequence[int]  # readings of each
    values: Tensor  # (sum of nums,)

    def to_json(self) -> dict[str, dict[str, Any]]:
        """By request. Waits for the device."""
        values = iter([None if math.isnan(value) else value for value in self.values.tolist()])
        return {
            name: {READINGS: {"position": position, "values": [next(values) for _ in range(num)]}}
            for name, position, num in zip(self.requests, self.positions, self.nums, strict=True)
        }


class Telling(NamedTuple):
    """The last token of a sequence whose client is told what is read of it."""

    request_id: str
    position: int
    histories: Sequence[int]  # rows of `Histories.values`


class Watched(NamedTuple):
    """The last token of a sequence that may end there."""

    request_id: str
    history: int  # row of `Histories.values`
    position: int
    sign: int
    on: float


class Histories:
    """`values` (num_histories, max_len) float32 is on the model's device, NaN where nothing was read; its address never
    changes, so captured graphs read it."""

    def __init__(self, requests: Requests, num_histories: int, max_len: int, device: torch.device) -> None:
        self.values = torch.full((num_histories, max_len), torch.nan, device=device)
        self._requests = requests
        self._free = list(range(num_histories))
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # by finished sequence, the oldest first
        self.awaited: AwaitedEntropies | None = None  # for which the step's logits are to be noted
        self.watched: list[Watched] = []  # of this step
        self.telling: list[Telling] = []  # likewise

    @property
    def num_used(self) -> int:
        return len(self.values) - len(self._free)

    def add(self, request: PlannedRequest) -> None:
        """Find room for what its conditions will read. A request that comes again keeps what it has read, which may
        stand in cached blocks."""
        if not request.histories:
            request.histories = [self._free.pop() for _ in range(request.placed.num_columns)]
            self.values[request.histories] = torch.nan

    def remove(self, request: PlannedRequest) -> None:
        """Free its room, and keep its readings if somebody may ask for them."""
        if request.placed.plan.readings_id:
            self._kept.pop(request.request_id, None)
            self._kept[request.request_id] = self._read(request)
            while (
                len(self._kept) > MAX_KEPT
                or sum(kept.values.numel() for kept in self._kept.values()) > MAX_KEPT_NUMBERS
            ):
                self._kept.popitem(last=False)
        self._free += request.histories

    def copy(self, pairs: Sequence[tuple[PlannedRequest, PlannedRequest]]) -> None:
        """What the first of each pair has read, the second has read, too; all at once."""
        rows = [row for pair in pairs for row in zip(pair[0].histories, pair[1].histories, strict=True)]
        num_read = [(target, source.num_read) for source, target in pairs]
        for target, num in num_read:
            target.num_read = num
        if rows:
            sources, targets = torch.tensor(rows, device=self.values.device).unbind(1)
            self.values[targets] = self.values[sources]

    def readings_of(self, readings_id: str) -> list[dict[str, Any]]:
        """What the sequences of that `readings_id` have read, see `worker.whipstaff_readings`. Waits for the device."""
        kept = [kept for kept in self._kept.values() if kept.readings_id == readings_id]
        kept += [
            self._read(one)
            for one in self._requests.values()
            if one.histories and one.placed.plan.readings_id == readings_id
        ]
        return [one.to_json() for one in kept]

    def _read(self, request: PlannedRequest) -> Kept:
        """A copy on the device; nothing waits for it."""
        values = torch.stack([self.values[row, : request.num_read] for row in request.histories])
        return Kept(request.request_id, request.placed.plan.readings_id, request.placed, values)

    def begin_step(self, view: BatchView, spans: Iterable[EditedSpan]) -> None:
        """Count the positions that are fed, and await the entropies that schedules follow."""
        self.awaited, self.watched, self.telling = None, list(self._ending(view)), list(self._telling(view))
        for span in spans:
            if span.request.histories:
                span.request.num_read = max(span.request.num_read, span.position + span.last - span.first)
        if found := list(self._following(view)):
            self.awaited = AwaitedEntropies(*torch.tensor(found, device=self.values.device).unbind(1))

    def stops(self) -> ToldStops:
        """Who of those that are watched ends with this step, once it has run."""
        requests, histories, positions, signs, on = zip(*self.watched, strict=True)
        self.watched = []
        at = torch.tensor([histories, positions], device=self.values.device)
        limits = torch.tensor([signs, on], dtype=torch.float32, device=self.values.device)
        return ToldStops(requests, self.values[at[0], at[1]] * limits[0] > limits[1])

    def take_told(self) -> ToldReadings:
        """What clients are told of this step, once it has run."""
        told, self.telling = self.telling, []
        cells = [(row, one.position) for one in told for row in one.histories]
        rows, positions = torch.tensor(cells, device=self.values.device).unbind(1)
        return ToldReadings(
            [one.request_id for one in told],
            [one.position for one in told],
            [len(one.histories) for one in told],
            self.values[rows, positions],
        )

    def _telling(self, view: BatchView) -> Iterator[Telling]:
        """Each position that is fed before a token is drawn comes by once; the prompt's others are told at the end."""
        for row, placed in view.planned():
            plan = placed.plan.steering
            if plan is not None and plan.told and view.draws[row]:
                last = int(view.positions[row] + view.starts[row + 1] - view.starts[row]) - 1
                histories = self._requests[view.requests[row]].histories
                yield Telling(view.requests[row], last, [histories[column] for column in plan.told])

    def _ending(self, view: BatchView) -> Iterator[Watched]:
        """Sequences whose last generated token is read in this step; a prompt's tokens end nothing."""
        companions = {row for row, _ in view.companion_rows}
        for row, placed in view.planned():
            stop = placed.plan.steering.stop if placed.plan.steering is not None else None
            if stop is None or row in companions or not view.draws[row]:
                continue
            last = int(view.positions[row] + view.starts[row + 1] - view.starts[row]) - 1
            if last >= placed.prompt_len:
                histories = self._requests[view.requests[row]].histories
                yield Watched(view.requests[row], histories[stop.condition_index], last, stop.sign, stop.on)

    def _following(self, view: BatchView) -> Iterator[tuple[int, int, int]]:
        drawn_for = dict(view.companion_rows)  # companions' tokens come from the distributions of their primaries
        for row, placed in view.planned():
            plan = placed.plan.steering
            if plan is None or plan.entropy_column < 0:
                continue
            following = int(view.positions[row] + view.starts[row + 1] - view.starts[row])
            if placed.prompt_len <= following < self.values.shape[1]:
                histories = self._requests[view.requests[row]].histories
                yield drawn_for.get(row, row), histories[plan.entropy_column], following

    def note_logits(self, logits: Tensor) -> None:
        """Keep the entropies that are awaited. The first logits after a forward pass are those to sample from, a row
        for each of the batch's."""
        assert self.awaited is not None
        (rows, histories, positions), self.awaited = self.awaited, None
        self.values[histories, positions] = explain_rows(logits[rows].contiguous()).entropy

    @contextmanager
    def untouched(self, spans: Sequence[EditedSpan]) -> Iterator[None]:
        """What is read in here of the tokens of these spans, one each, is forgotten."""
        cells = [(row, span.position) for span in spans for row in span.request.histories]
        rows, positions = torch.tensor(cells, dtype=torch.int64, device=self.values.device).reshape(-1, 2).unbind(1)
        at = rows[:, None], torch.stack([positions, torch.zeros_like(positions)], 1)  # 0: where latches are
        read = self.values[at]
        try:
            yield
        finally:
            self.values[at] = read
