"""The token table: for every token of a step an address, by which all sites find what to do to it."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from whipstaff.server.engine.worker.requests import PlannedRequest
from whipstaff.server.plan import PositionedPlan
from whipstaff.steering.conditions import MAX_CONDITIONS, MAX_SCHEDULES
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
        self._dirty = 0  # how many leading rows of `tokens` may differ from NOTHING
        self._differs = False  # whether the device decided about tokens that the host does not know

    def write(self, spans: Sequence[EditedSpan], num_tokens: int, input_ids: Tensor | None, tables: Tables) -> None:
        """Say what happens to each of a step's tokens.

        Args:
            input_ids: (num_tokens,), on the device; needed where some of a span's tokens are told apart.
            tables: where the spans' rows of edits get their addresses.
        """
        if self._is_as_before(spans):
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

    def _is_as_before(self, spans: Sequence[EditedSpan]) -> bool:
        """Whether the tables on the device say already what this step needs: a batch that decodes, token by token."""
        before, self._before = self._before, spans
        return len(before) == len(spans) and all(
            new.first == old.first
            and new.last == old.last
            and new.row is old.row
            and new.row_at_tokens is new.row
            and not new.placed.follows_positions
            for new, old in zip(spans, before, strict=True)
        )

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
