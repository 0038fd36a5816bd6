"""The token table: for every token of a step an address, by which all sites find what to do to it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from whipstaff.server.engine.worker.requests import PlannedRequest
from whipstaff.server.plan import PositionedPlan
from whipstaff.steering.conditions import MAX_CONDITIONS, MAX_SCHEDULES, Schedule
from whipstaff.steering.plan import EditSet
from whipstaff.steering.tables import NOTHING, Tables

_ADDRESS, _POSITION, _COLUMNS = 0, 1, 2  # columns of the token table: see cuda_ext.run_edits_


class EditedSpan(NamedTuple):
    """A stretch of the step's tokens [first, last) that get the same row of edits."""

    batch_row: int
    first: int
    last: int
    position: int  # of the first token, absolute
    row: EditSet
    row_at_tokens: EditSet  # the same for tokens of some ids
    request: PlannedRequest
    placed: PositionedPlan


class _Followers(NamedTuple):
    """Of spans that follow their positions, one token each: what their gains come from."""

    spans: Sequence[int]  # which of the step's spans
    tokens: npt.NDArray[np.int64]  # (n,) of the step
    prompt_lens: npt.NDArray[np.int64]  # (n,)
    gains: Sequence[tuple[Schedule, int, npt.NDArray[np.int64]]]  # a schedule, its column, and whose it is, of the n
    reading: npt.NDArray[np.int64]  # those whose conditions look at their positions, of the n

    @classmethod
    def among(cls, spans: Sequence[EditedSpan]) -> "_Followers | None":
        """None where a span has several tokens, as prompts have."""
        found = [(index, span) for index, span in enumerate(spans) if span.placed.follows_positions]
        if any(span.last - span.first != 1 for _, span in found):
            return None
        plans = [span.placed.plan.steering for _, span in found]
        scheduled: dict[tuple[Schedule, int], list[int]] = {}
        for which, plan in enumerate(plans):
            for column, schedule in enumerate(plan.schedules if plan is not None else ()):
                scheduled.setdefault((schedule, column), []).append(which)
        return cls(
            [index for index, _ in found],
            np.array([span.first for _, span in found], np.int64),
            np.array([span.placed.prompt_len for _, span in found], np.int64),
            [(*key, np.array(whose, np.int64)) for key, whose in scheduled.items()],
            np.flatnonzero([plan is not None and plan.num_columns > 0 for plan in plans]),
        )


class TokenTable:
    """`tokens` (max_tokens, 2 + MAX_CONDITIONS) int32 and `gains` (max_tokens, MAX_SCHEDULES) float32 are on the
    model's device; their addresses never change, so captured graphs read them."""

    def __init__(self, max_tokens: int, device: torch.device) -> None:
        shape = (max_tokens, _COLUMNS + MAX_CONDITIONS)
        self.tokens = torch.full(shape, NOTHING, dtype=torch.int32, device=device)
        self.gains = torch.ones(max_tokens, MAX_SCHEDULES, device=device)
        self._host = np.full(shape, NOTHING, dtype=np.int32)
        self._host_gains = np.ones((max_tokens, MAX_SCHEDULES), dtype=np.float32)
        self._before: Sequence[EditedSpan] = ()  # what it says now
        self._followers: _Followers | None = None  # of those
        self._dirty = 0  # how many leading rows of `tokens` may differ from NOTHING
        self._differs = False  # whether the device decided about tokens that the host does not know

    def write(self, spans: Sequence[EditedSpan], num_tokens: int, input_ids: Tensor | None, tables: Tables) -> None:
        """Say what happens to each of a step's tokens.

        Args:
            input_ids: (num_tokens,), on the device; needed where some of a span's tokens are told apart.
            tables: where the spans' rows of edits get their addresses.
        """
        if self._is_as_before(spans):
            self._move_on(spans, num_tokens)
            return
        num = max(num_tokens, self._dirty)
        before, gains_before = self._host[:num].copy(), self._host_gains[:num].copy()
        self._host[:num] = NOTHING
        rows = (row for span in spans for row in (span.row, span.row_at_tokens) if row)
        addresses = tables.acquire(rows) if spans else {}
        for span in spans:
            self._write_span(span, addresses)
        if self._differs or not np.array_equal(before, self._host[:num]):
            self.tokens[:num].copy_(torch.from_numpy(self._host[:num]), non_blocking=True)
        if not np.array_equal(gains_before, self._host_gains[:num]):
            self.gains[:num].copy_(torch.from_numpy(self._host_gains[:num]), non_blocking=True)
        self._differs = False
        for span in spans:
            if span.row is not span.row_at_tokens:
                assert input_ids is not None
                self._tell_tokens_apart(span, addresses, input_ids)
        self._dirty = num_tokens if spans else 0
        self._followers = _Followers.among(spans)

    def _is_as_before(self, spans: Sequence[EditedSpan]) -> bool:
        """Whether the tables on the device say already what this step needs, but for what follows from positions: a
        batch that decodes, token by token."""
        before, self._before = self._before, spans
        return (
            len(before) == len(spans)
            and self._followers is not None
            and not self._differs
            and all(
                new.first == old.first
                and new.last == old.last
                and new.row is old.row
                and new.row_at_tokens is new.row
                and (new.request is old.request or not (new.placed.follows_positions or old.placed.follows_positions))
                for new, old in zip(spans, before, strict=True)
            )
        )

    def _move_on(self, spans: Sequence[EditedSpan], num_tokens: int) -> None:
        """The same edits at later positions."""
        assert self._followers is not None
        whose, tokens, prompt_lens, scheduled, reading = self._followers
        if not whose:
            return
        positions = np.array([spans[index].position for index in whose], np.int64)
        for schedule, column, chosen in scheduled:
            self._host_gains[tokens[chosen], column] = schedule.gains(positions[chosen] - prompt_lens[chosen])
        if scheduled:
            self.gains[:num_tokens].copy_(torch.from_numpy(self._host_gains[:num_tokens]), non_blocking=True)
        if len(reading):
            self._host[tokens[reading], _POSITION] = positions[reading]
            self.tokens[:num_tokens].copy_(torch.from_numpy(self._host[:num_tokens]), non_blocking=True)

    def _write_span(self, span: EditedSpan, addresses: dict[EditSet, int]) -> None:
        plan = span.placed.plan.steering
        assert plan is not None
        tokens = slice(span.first, span.last)
        self._host[tokens, _ADDRESS] = addresses.get(span.row, NOTHING)
        if not span.placed.follows_positions:
            return
        positions = np.arange(span.position, span.position + span.last - span.first)
        for index, schedule in enumerate(plan.schedules):
            self._host_gains[tokens, index] = schedule.gains(positions - span.placed.prompt_len)
        if plan.num_columns:
            self._host[tokens, _POSITION] = positions
            for column, row in enumerate(span.request.histories):
                self._host[tokens, _COLUMNS + column] = row

    def _tell_tokens_apart(self, span: EditedSpan, addresses: dict[EditSet, int], input_ids: Tensor) -> None:
        """Ids of tokens just sampled are on the device only, so it is the device that looks at them."""
        plan = span.placed.plan.steering
        assert plan is not None
        ids = input_ids[span.first : span.last]
        wanted = torch.tensor(sorted(plan.token_ids), device=ids.device, dtype=ids.dtype)
        chosen = self.tokens[span.first : span.last, _ADDRESS]
        chosen.copy_(torch.where(torch.isin(ids, wanted), addresses.get(span.row_at_tokens, NOTHING), chosen))
        self._differs = True
