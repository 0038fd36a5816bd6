"""Captures: activations that requests asked to be told, position by position.

A row of edits keeps what stands at its hook points, before its edits or after them, in rooms of fixed address that
captured graphs write (`steering.plan.Capture`). After the forward pass the rows that somebody asked for are taken from
there, all of one width in one gather, and put where their positions are: so a prompt may come in chunks, and what a
preemption computes again writes over itself. What heads look at is computed then, from queries that were kept
(`worker.attention_rows`). What finished sequences have is held until somebody takes it, by `captures_id`, or others
need the room.
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from whipstaff.server.engine.worker.attention_rows import AttentionRows
from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.requests import CapturedRows, PlannedRequest, Requests
from whipstaff.steering.method import HookPoint
from whipstaff.steering.tables import SiteSpec

_MOST = 1 << 24  # probabilities that are computed at once


class Arena(NamedTuple):
    """Room for the activations of a step at hook points that are equally wide."""

    points: dict[HookPoint, int]  # and which of the first dimension is whose
    rows: Tensor  # (points, max_tokens, width) in the model's type

    def kept(self, point: HookPoint) -> Tensor:
        """(max_tokens, width) of one of them, sharing memory."""
        return self.rows[self.points[point]]


def arenas_of(specs: Iterable[SiteSpec], max_tokens: int, dtype: torch.dtype, device: torch.device) -> list[Arena]:
    """Room for the activations at some hook points."""
    by_width: dict[int, list[HookPoint]] = {}
    for point, _, width in specs:
        by_width.setdefault(width, []).append(point)
    return [
        Arena(
            {point: index for index, point in enumerate(points)},
            torch.empty(len(points), max_tokens, width, dtype=dtype, device=device),
        )
        for width, points in by_width.items()
    ]


class _Taken(NamedTuple):
    """Rows of a gather, and where they go."""

    into: CapturedRows
    first: int  # of its positions
    num: int  # of them, for each of its points


class _Looking(NamedTuple):
    """Tokens of one request, of which it is told what some heads look at."""

    taken: _Taken
    row: int  # of the step
    token: int  # the first of them, in the step
    position: int  # and where it stands
    heads: list[int]  # of this rank
    size: int  # positions that the request can have

    def split(self, most: int) -> Iterator["_Looking"]:
        """In parts of at most so many tokens."""
        into, first, num = self.taken
        for start in range(0, num, most):
            taken = _Taken(into, first + start, min(most, num - start))
            yield self._replace(taken=taken, token=self.token + start, position=self.position + start)


class _Pending(NamedTuple):
    """What was gathered, on its way from the device."""

    rows: Tensor
    taken: list[_Taken]
    is_there: Any  # a CUDA event; None: it is there


class Held(NamedTuple):
    """What a finished sequence has."""

    captures_id: str
    captured: list[CapturedRows]

    @property
    def num_bytes(self) -> int:
        """That were written; the rest of the room was never touched, and takes no memory."""
        return sum(_written(one).nbytes for one in self.captured)


class Captures:
    """Of one worker."""

    def __init__(
        self,
        requests: Requests,
        arenas: Sequence[Arena],
        max_bytes: int,
        attention: Mapping[int, AttentionRows] | None = None,
    ) -> None:
        """
        Args:
            max_bytes: of finished sequences are held; the scheduler lets no more than as many run.
            attention: of the layers of which it can be told what their heads look at.
        """
        self._requests, self._arenas, self._max_bytes = requests, arenas, max_bytes
        self.attention = attention or {}
        self.num_asking = 0  # unfinished requests
        self._pending: deque[_Pending] = deque()
        self._held: OrderedDict[str, Held] = OrderedDict()  # by finished sequence, the oldest first
        self._taken: set[str] = set()  # unfinished sequences whose activations were told

    @property
    def num_held(self) -> int:
        """Sequences whose activations nobody took yet."""
        return len(self._held)

    def add(self, request: PlannedRequest) -> None:
        """Find room for what a request asks for. One that comes again keeps what it has."""
        placed = request.placed
        wanted = [one.num_positions for one in placed.places]
        if [len(one.seen) for one in request.captured] == wanted:
            return
        self.num_asking += not request.captured
        request.captured = []
        for one in placed.captures:
            arena, num = self._arenas[self._arena(one.points)], one.num_positions
            rows = torch.empty(len(one.points), num, arena.rows.shape[-1], dtype=arena.rows.dtype)  # not touched yet
            request.captured.append(CapturedRows(rows, np.zeros(num, np.bool_)))
        for looked in placed.attended:
            num, heads = looked.num_positions, self.attention[looked.layer].own(looked.heads)
            rows = torch.empty(1, num, len(heads) * looked.size)  # not touched yet
            request.captured.append(CapturedRows(rows, np.zeros(num, np.bool_)))

    def remove(self, request: PlannedRequest) -> None:
        """A request is finished: hold what it has, unless it was taken already."""
        self.num_asking -= 1
        if request.request_id in self._taken:
            self._taken.discard(request.request_id)
        elif request.placed.plan.captures_id:
            self._held[request.request_id] = Held(request.placed.plan.captures_id, request.captured)
            while sum(held.num_bytes for held in self._held.values()) > self._max_bytes:
                self._held.popitem(last=False)

    def begin_step(self) -> None:
        """Before a step's forward pass: let layers keep what will be asked of them, and the others nothing."""
        if not self.attention:
            return
        requests = self._requests.values() if self.num_asking else ()
        asked = {looked.layer for request in requests for looked in request.placed.attended}
        for layer, attention in self.attention.items():
            attention.expect(layer in asked)

    def note(self, view: BatchView) -> None:
        """Take what the step's forward pass has left; where nobody is asking, there is nothing."""
        self._settle(most=1)
        found: list[list[tuple[_Taken, Ints, int]]] = [[] for _ in self._arenas]
        for row, placed in view.planned():
            request = self._requests[view.requests[row]]
            for (points, intervals), into in zip(placed.captures, request.captured, strict=False):
                number, before = self._arena(points), 0
                at = np.array([self._arenas[number].points[point] for point in points])
                for start, end in intervals:
                    if (span := view.tokens_at(row, start, end)) is not None:
                        taken = _Taken(into, before + span.position - start, span.last - span.first)
                        found[number].append((taken, at, span.first))
                    before += end - start
        for arena, asked in zip(self._arenas, found, strict=True):
            if asked:
                self._gather(arena, asked)
        for layer, looking in self._looking(view).items():
            self._look(self.attention[layer], looking)

    def _looking(self, view: BatchView) -> dict[int, list[_Looking]]:
        """The step's tokens of which it is told what heads look at, by layer."""
        found: dict[int, list[_Looking]] = {}
        for row, placed in view.planned() if self.attention else ():
            captured = self._requests[view.requests[row]].captured[len(placed.captures) :]
            for (layer, heads, intervals, size), into in zip(placed.attended, captured, strict=True):
                before, own = 0, self.attention[layer].own(heads)
                for start, end in intervals:
                    if (span := view.tokens_at(row, start, end)) is not None:
                        taken = _Taken(into, before + span.position - start, span.last - span.first)
                        asked = _Looking(taken, row, span.first, span.position, own, size)
                        found.setdefault(layer, []).append(asked)
                    before += end - start
        return found

    def _look(self, attention: AttentionRows, looking: Sequence[_Looking]) -> None:
        """Compute what is asked for in one layer, as much at once as there is memory for."""
        longest = max(one.position + one.taken.num for one in looking)
        most = max(_MOST // (longest * attention.num_heads), 1)
        parts = deque(part for one in looking for part in one.split(most))
        while parts:
            some = [parts.popleft()]
            while parts and sum(one.taken.num for one in some) + parts[0].taken.num <= most:
                some.append(parts.popleft())
            along = [np.arange(one.taken.num) for one in some]
            tokens = np.concatenate([one.token + more for one, more in zip(some, along, strict=True)])
            positions = np.concatenate([one.position + more for one, more in zip(some, along, strict=True)])
            rows = np.repeat([one.row for one in some], [one.taken.num for one in some])
            found, first = attention.of_tokens(tokens, rows, positions), 0
            for one in some:
                own = found[first : first + one.taken.num][:, one.heads]
                padded = own.new_zeros(*own.shape[:2], one.size)
                padded[..., : own.shape[2]] = own[..., : one.size]
                self._send(padded.flatten(1), [one.taken])
                first += one.taken.num

    def forget(self, request: PlannedRequest, position: int) -> None:
        """What stands from that position on, where drafts stood that were rejected. Waits for the device."""
        self._settle(most=0)
        for one, into in zip(request.placed.places, request.captured, strict=True):
            before = 0
            for start, end in one.intervals:
                into.seen[before + min(max(position, start), end) - start : before + end - start] = False
                before += end - start

    def take(self, captures_id: str) -> dict[str, list[dict[str, Any]]]:
        """What the sequences of that `captures_id` have, see `worker.whipstaff_captures`; once. Waits for the
        device."""
        self._settle(most=0)
        found = {name: held.captured for name, held in self._held.items() if held.captures_id == captures_id}
        for name in found:
            del self._held[name]
        for name, request in self._requests.items():  # the worker hears of an end with the next step
            is_new = request.captured and name not in self._taken
            if is_new and request.placed.plan.captures_id == captures_id:
                found[name] = request.captured
                self._taken.add(name)
        return {name: [_told(one) for one in captured] for name, captured in found.items()}

    def _arena(self, points: Sequence[HookPoint]) -> int:
        """Which one these are in."""
        return next(number for number, arena in enumerate(self._arenas) if points[0] in arena.points)

    def _gather(self, arena: Arena, asked: Sequence[tuple[_Taken, Ints, int]]) -> None:
        max_tokens = arena.rows.shape[1]
        indices = [
            (at[:, None] * max_tokens + np.arange(first, first + taken.num)).ravel() for taken, at, first in asked
        ]
        index = torch.from_numpy(np.concatenate(indices)).to(arena.rows.device, non_blocking=True)
        self._send(arena.rows.flatten(0, 1).index_select(0, index), [taken for taken, _, _ in asked])

    def _send(self, rows: Tensor, taken: list[_Taken]) -> None:
        """Begin to bring rows to the host."""
        is_there = None
        if rows.is_cuda:
            rows = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True).copy_(rows, non_blocking=True)
            is_there = torch.cuda.Event()  # type: ignore[no-untyped-call]
            is_there.record()
        self._pending.append(_Pending(rows, taken, is_there))
        if is_there is None:
            self._settle(most=0)

    def _settle(self, most: int) -> None:
        """Put away what has come from the device, until at most so many gathers are left."""
        while len(self._pending) > most:
            rows, taken, is_there = self._pending.popleft()
            if is_there is not None:
                is_there.synchronize()
            begin = 0
            for into, first, num in taken:
                end = begin + into.rows.shape[0] * num
                into.rows[:, first : first + num] = rows[begin:end].view(len(into.rows), num, rows.shape[1])
                into.seen[first : first + num] = True
                begin = end


def _written(captured: CapturedRows) -> Tensor:
    """Its rows up to the last position that was seen."""
    seen = np.flatnonzero(captured.seen)
    return captured.rows[:, : int(seen[-1]) + 1 if len(seen) else 0]


def _told(captured: CapturedRows) -> dict[str, Any]:
    """As plain data, up to the last position that was seen."""
    rows = _written(captured).contiguous()
    return {
        "seen": captured.seen[: rows.shape[1]].tobytes(),
        "dtype": str(rows.dtype).removeprefix("torch."),
        "shape": list(rows.shape),
        "data": rows.view(torch.uint8).numpy().tobytes(),
    }
