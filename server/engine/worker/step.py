"""The steerer: one per worker, it turns each step's BatchView into an address per token.

worker.execute_model  -> note_requests    who came and went, with what plan
runner adapter        -> begin_step       what happens to this step's tokens
model (sites.py)      -> run_edits_       edits activations by the token table
model (composite.py)  -> note_logits      entropies, for schedules that follow them
lookahead             -> trying           what happens to tokens that are tried between a step and its draw
runner adapter        -> end_step
"""

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from whipstaff.cuda_ext import explain_rows
from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.server.engine.worker.edits.module_edits import ModuleEdits
from whipstaff.server.engine.worker.edits.soft_prompts import SoftRows
from whipstaff.server.engine.worker.logits.pipeline import Decoder
from whipstaff.server.plan import PositionedPlan
from whipstaff.steering.conditions import MAX_CONDITIONS, MAX_SCHEDULES
from whipstaff.steering.plan import EditSet
from whipstaff.steering.tables import NOTHING, Tables

MAX_KEPT, MAX_KEPT_NUMBERS = 256, 1 << 22  # sequences that are finished, and numbers, whose readings are kept
_ADDRESS, _POSITION, _COLUMNS = 0, 1, 2  # columns of the token table: see cuda_ext.run_edits_


class Kept(NamedTuple):
    """The readings of a finished sequence."""

    readings_id: str
    placed: PositionedPlan
    values: Tensor  # (conditions, positions) float32, on the device


class Piece(NamedTuple):
    """A stretch of the step's tokens that get the same row of edits."""

    batch_row: int
    first: int
    last: int  # exclusive
    position: int  # of the first token, absolute
    row: EditSet
    row_at_tokens: EditSet
    request: str
    placed: PositionedPlan


class Steerer:
    """Per-step state that the model's sites read.

    `tokens` (max_tokens, 2 + MAX_CONDITIONS) int32, `gains` (max_tokens, MAX_SCHEDULES) float32 and `history`
    (num_histories, max_len) float32 are on the model's device; their addresses never change, so captured graphs read
    them. `view` is None outside of real steps (profiling, warm-up, graph capture).
    """

    def __init__(
        self,
        max_tokens: int,
        device: torch.device,
        decoder: Decoder,
        num_histories: int = 0,
        max_len: int = 0,
    ) -> None:
        shape = (max_tokens, _COLUMNS + MAX_CONDITIONS)
        self.tokens = torch.full(shape, NOTHING, dtype=torch.int32, device=device)
        self.gains = torch.ones(max_tokens, MAX_SCHEDULES, device=device)
        self.history = torch.full((num_histories, max_len), torch.nan, device=device)
        self.meters = torch.zeros(0, 2, device=device)  # (places, 2): sum of lengths and number of rows measured
        self.view: BatchView | None = None
        self.decoder = decoder
        self.num_steps = 0
        self.groups: Mapping[str, Sequence[str | None]] = {}  # that take a common step: see `BatchView.in_groups`
        self.tables: Tables | None = None
        self.specials: ModuleEdits | None = None
        self.soft: SoftRows | None = None
        self._requests: dict[str, PositionedPlan] = {}
        self._histories: dict[str, list[int]] = {}  # by request, a row of `history` for each of its conditions
        self._free_histories = list(range(num_histories))
        self._reached: dict[str, int] = {}  # by request with conditions, how many positions were fed
        self._kept: OrderedDict[str, Kept] = OrderedDict()  # by finished sequence, the oldest first
        self._entropies: tuple[Tensor, Tensor, Tensor] | None = None  # logits row, history row and position to fill
        self._host = np.full(shape, NOTHING, dtype=np.int32)
        self._host_gains = np.ones((max_tokens, MAX_SCHEDULES), dtype=np.float32)
        self._was_asked = False  # whether the last step may have left something behind
        self._pieces_before: list[Piece] = []
        self._dirty = 0  # how many leading rows of `tokens` may differ from NOTHING
        self._differs = False  # whether the device decided about tokens that the host does not know

    @property
    def num_requests(self) -> int:
        """Requests with a plan that the worker has not seen finish."""
        return len(self._requests)

    @property
    def num_histories_used(self) -> int:
        return len(self.history) - len(self._free_histories)

    def note_requests(self, finished: Iterable[str], new: Iterable[tuple[str, PositionedPlan | None]]) -> None:
        """Keep the plans of unfinished requests. `finished` comes first: an id may finish and come back in one step."""
        if self._requests:
            for request_id in finished:
                self._keep_readings(request_id)
                self._requests.pop(request_id, None)
                self._free_histories += self._histories.pop(request_id, ())
        for request_id, plan in new:
            if plan is not None:
                self._requests[request_id] = plan
                if plan.num_columns and request_id not in self._histories:  # V2 says again who was preempted
                    self._histories[request_id] = rows = [self._free_histories.pop() for _ in range(plan.num_columns)]
                    self.history[rows] = torch.nan

    def readings_of(self, readings_id: str) -> list[dict[str, Any]]:
        """What the sequences with that ticket have read; see `worker.whipstaff_readings`. Waits for the device."""
        kept = [kept for kept in self._kept.values() if kept.readings_id == readings_id]
        kept += [self._read(name) for name in self._histories if self._requests[name].plan.readings_id == readings_id]
        return [
            {
                "positions": one.values.shape[1],
                "columns": [
                    [None if math.isnan(value) else value for value in column[: 1 if is_latched else None]]
                    for column, is_latched in zip(one.values.tolist(), one.placed.latched_columns, strict=True)
                ],
            }
            for one in kept
        ]

    def _read(self, request_id: str) -> Kept:
        """A copy on the device; nothing waits for it."""
        placed, num = self._requests[request_id], self._reached.get(request_id, 0)
        values = torch.stack([self.history[row, :num] for row in self._histories[request_id]])
        return Kept(placed.plan.readings_id, placed, values)

    def _keep_readings(self, request_id: str) -> None:
        if request_id in self._histories and self._requests[request_id].plan.readings_id:
            self._kept.pop(request_id, None)
            self._kept[request_id] = self._read(request_id)
            while (
                len(self._kept) > MAX_KEPT
                or sum(kept.values.numel() for kept in self._kept.values()) > MAX_KEPT_NUMBERS
            ):
                self._kept.popitem(last=False)
        self._reached.pop(request_id, None)

    def plan_of(self, request_id: str) -> PositionedPlan | None:
        return self._requests.get(request_id)

    @property
    def has_plans(self) -> bool:
        """Whether any unfinished request asks for anything; if not, the step may be given as NOBODY."""
        return bool(self._requests)

    def begin_step(self, view: BatchView, input_ids: Tensor | None) -> None:
        """Write what happens to the step's tokens."""
        self.view = view
        self.num_steps += 1
        self.decoder.begin_step(view, input_ids)
        self._entropies = None
        if not view.plans and not self._was_asked:
            return
        self._was_asked = bool(view.plans)
        pieces = self._pieces(view)
        if pieces or self._dirty:
            self._write_tokens(view, pieces, input_ids)
        if self.specials is not None:
            self.specials.begin_step(pieces, view.num_tokens)
        if self.soft is not None:
            self.soft.begin_step(view)

    @contextmanager
    def trying(self, view: BatchView, tokens: Tensor) -> Iterator[None]:
        """A forward pass beside the step's own, over a token for each row that may come next: it is steered as if it
        did, and nothing that was read or kept on the way stays.

        Args:
            view: the rows, each with its one token.
            tokens: (B,) ids.
        """
        pieces, reached, kept = self._pieces(view), dict(self._reached), self._kept_by(view)
        histories = [(row, piece.position) for piece in pieces for row in self._histories.get(piece.request, ())]
        rows, positions = (
            torch.tensor(histories, dtype=torch.int64, device=self.history.device).reshape(-1, 2).unbind(1)
        )
        cells = rows[:, None], torch.stack([positions, torch.zeros_like(positions)], 1)  # 0: where latches are
        read = self.history[cells]
        if pieces or self._dirty:
            self._write_tokens(view, pieces, tokens)
        if self.specials is not None:
            self.specials.begin_step(pieces, view.num_tokens)
        if self.soft is not None:
            self.soft.begin_step(view)
        try:
            yield
        finally:
            if self.specials is not None:
                self.specials.end_step()
            self.history[cells], self._reached = read, reached
            for buffer, before in kept:
                buffer[: len(before)] = before

    def _kept_by(self, view: BatchView) -> list[tuple[Tensor, Tensor]]:
        """The early layers' streams that a pass of those rows would write over, and copies of them."""
        plans = [placed.plan.steering for _, placed in view.planned()]
        layers = {layer for plan in plans if plan is not None for layer in plan.keeps}
        buffers = [self.tables.kept(layer) for layer in sorted(layers)] if self.tables is not None else []
        return [(buffer, buffer[: view.num_tokens].clone()) for buffer in buffers]

    def end_step(self) -> None:
        """After the forward pass: what follows until the next step is not a real step."""
        self.view = None
        self.decoder.end_forward()
        if self.specials is not None:
            self.specials.end_step()

    def note_logits(self, logits: Tensor) -> None:
        """Keep the entropies that schedules follow. The first logits after a forward pass are those to sample from, a
        row for each of the batch's."""
        if self._entropies is None:
            return
        rows, histories, positions = self._entropies
        self._entropies = None
        self.history[histories, positions] = explain_rows(logits[rows].contiguous()).entropy

    def _write_tokens(self, view: BatchView, pieces: list[Piece], input_ids: Tensor | None) -> None:
        if self._is_as_before(pieces):
            return
        num = max(view.num_tokens, self._dirty)
        before, gains_before = self._host[:num].copy(), self._host_gains[:num].copy()
        self._host[:num] = NOTHING
        addresses: dict[EditSet, int] = {}
        if pieces:
            assert self.tables is not None
            addresses = self.tables.acquire(row for piece in pieces for row in (piece.row, piece.row_at_tokens) if row)
            for piece in pieces:
                self._write_piece(piece, addresses)
        if self._differs or not np.array_equal(before, self._host[:num]):
            self.tokens[:num].copy_(torch.from_numpy(self._host[:num]), non_blocking=True)
        if not np.array_equal(gains_before, self._host_gains[:num]):
            self.gains[:num].copy_(torch.from_numpy(self._host_gains[:num]), non_blocking=True)
        self._differs = False
        for piece in pieces:
            if piece.row is not piece.row_at_tokens:
                assert input_ids is not None
                self._tell_tokens_apart(piece, addresses, input_ids)
        self._dirty = view.num_tokens if pieces else 0
        self._await_entropies(view)

    def _is_as_before(self, pieces: list[Piece]) -> bool:
        """Whether the tables on the device say already what this step needs: a batch that decodes, token by token."""
        before, self._pieces_before = self._pieces_before, pieces
        return len(before) == len(pieces) and all(
            new.first == old.first
            and new.last == old.last
            and new.row is old.row
            and new.row_at_tokens is new.row
            and not new.placed.follows_positions
            for new, old in zip(pieces, before, strict=True)
        )

    def _write_piece(self, piece: Piece, addresses: dict[EditSet, int]) -> None:
        plan = piece.placed.plan.steering
        assert plan is not None
        tokens = slice(piece.first, piece.last)
        self._host[tokens, _ADDRESS] = addresses.get(piece.row, NOTHING)
        if not plan.schedules and not plan.num_columns:
            return
        positions = np.arange(piece.position, piece.position + piece.last - piece.first)
        for lane, schedule in enumerate(plan.schedules):
            self._host_gains[tokens, lane] = schedule.gains(positions - piece.placed.prompt_len)
        if plan.num_columns:
            self._reached[piece.request] = max(self._reached.get(piece.request, 0), int(positions[-1]) + 1)
            self._host[tokens, _POSITION] = positions
            for column, row in enumerate(self._histories[piece.request]):
                self._host[tokens, _COLUMNS + column] = row

    def _tell_tokens_apart(self, piece: Piece, addresses: dict[EditSet, int], input_ids: Tensor) -> None:
        """Ids of tokens just sampled are on the device only, so it is the device that looks at them."""
        plan = piece.placed.plan.steering
        assert plan is not None
        ids = input_ids[piece.first : piece.last]
        wanted = torch.tensor(sorted(plan.token_ids), device=ids.device, dtype=ids.dtype)
        chosen = self.tokens[piece.first : piece.last, _ADDRESS]
        chosen.copy_(torch.where(torch.isin(ids, wanted), addresses.get(piece.row_at_tokens, NOTHING), chosen))
        self._differs = True

    def _await_entropies(self, view: BatchView) -> None:
        found: list[tuple[int, int, int]] = []
        drawn_for = dict(view.followers)  # companions' tokens come from the distributions of their primaries
        for index, placed in view.planned():
            plan, following = (
                placed.plan.steering,
                int(view.positions[index] + view.starts[index + 1] - view.starts[index]),
            )
            if plan is not None and plan.entropy_column >= 0 and placed.prompt_len <= following < self.history.shape[1]:
                histories = self._histories[view.requests[index]]
                found.append((drawn_for.get(index, index), histories[plan.entropy_column], following))
        if found:
            rows, histories_, positions = torch.tensor(found, device=self.history.device).unbind(1)
            self._entropies = rows, histories_, positions

    def _pieces(self, view: BatchView) -> list[Piece]:
        found: list[Piece] = []
        for index, placed in view.planned():
            token, position = int(view.starts[index]), int(view.positions[index])
            end = position + int(view.starts[index + 1]) - token
            for start, stop, row, row_at_tokens in placed.segments:
                first, last = max(start, position), end if stop is None else min(stop, end)
                if first < last:
                    tokens = token + first - position, token + last - position
                    found.append(Piece(index, *tokens, first, row, row_at_tokens, view.requests[index], placed))
        return found
