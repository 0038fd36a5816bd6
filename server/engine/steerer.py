"""The steerer: one per worker, it turns each step's BatchView into slots per token and weights per row.

worker.execute_model  -> note_requests    who came and went, with what plan
runner adapter        -> begin_step       slots of this step's tokens, auxiliary models needed
model (sites.py)      -> diag_edit_       edits activations by the slots
model (auxiliary.py)  -> row_weights      mixes the streams' logits
runner adapter        -> end_step
"""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from whipstaff.server.engine.batch import BatchView
from whipstaff.server.engine.request import PlacedPlan
from whipstaff.steering.plan import Row
from whipstaff.steering.slots import NO_SLOT, SlotTables

NOBODY = BatchView((), np.zeros(1, np.int32), np.zeros(0, np.int32))  # a step in which every row is plain


@dataclass
class Counters:
    """What happened since the worker started, for metrics."""

    steps: int = 0
    auxiliary_steps_run: dict[str, int] = field(default_factory=dict)
    auxiliary_steps_skipped: dict[str, int] = field(default_factory=dict)


class Steerer:
    """Per-step state that the model's sites and the auxiliary models read.

    `slots` is (max_tokens,) int32 on the model's device, NO_SLOT where a token is plain; its address never changes, so
    captured graphs read it. `view` is None outside of real steps (profiling, warm-up, graph capture).
    """

    def __init__(self, max_tokens: int, device: torch.device, auxiliaries: Iterable[str]) -> None:
        self.slots = torch.full((max_tokens,), NO_SLOT, dtype=torch.int32, device=device)
        self.view: BatchView | None = None
        self.counters = Counters()
        self.tables: SlotTables | None = None
        self._auxiliaries = tuple(auxiliaries)
        self._requests: dict[str, PlacedPlan] = {}
        self._host = np.full(max_tokens, NO_SLOT, dtype=np.int32)
        self._dirty = 0  # how many leading entries of `slots` may differ from NO_SLOT

    @property
    def num_requests(self) -> int:
        """Requests with a plan that the worker has not seen finish."""
        return len(self._requests)

    def note_requests(self, finished: Iterable[str], new: Iterable[tuple[str, PlacedPlan | None]]) -> None:
        """Keep the plans of unfinished requests. `finished` comes first: an id may finish and come back in one step."""
        if self._requests:
            for request_id in finished:
                self._requests.pop(request_id, None)
        for request_id, plan in new:
            if plan is not None:
                self._requests[request_id] = plan

    def plan_of(self, request_id: str) -> PlacedPlan | None:
        return self._requests.get(request_id)

    @property
    def has_plans(self) -> bool:
        """Whether any unfinished request asks for anything; if not, the step may be given as NOBODY."""
        return bool(self._requests)

    def begin_step(self, view: BatchView) -> None:
        """Write the step's slots and remember who asks for auxiliary models."""
        self.view = view
        self.counters.steps += 1
        if view.plans or self._dirty:
            self._write_slots(view)

    def end_step(self) -> None:
        """After the forward pass: what follows until the next step is not a real step."""
        self.view = None

    def needed_auxiliaries(self) -> list[str]:
        """The auxiliary models this step must run: all of them outside of real steps, so that they are profiled,
        compiled and captured like the base."""
        if self.view is None:
            return list(self._auxiliaries)
        wanted = {name for _, plan in self.view.planned() for name in plan.auxiliaries}
        for name in self._auxiliaries:
            counts = self.counters.auxiliary_steps_run if name in wanted else self.counters.auxiliary_steps_skipped
            counts[name] = counts.get(name, 0) + 1
        return [name for name in self._auxiliaries if name in wanted]

    def row_weights(self, names: list[str]) -> Tensor:
        """(B, len(names)) float32, on the host: the weight that each row of the step gives each auxiliary model."""
        assert self.view is not None
        weights = torch.zeros(len(self.view.plans), len(names))
        for row, placed in self.view.planned():
            for name, weight in placed.plan.mix.weights.items() if placed.plan.mix else ():
                weights[row, names.index(name)] = weight
        return weights

    def token_rows(self) -> Tensor:
        """(T,) int64, on the host: the row of the step that each token belongs to."""
        assert self.view is not None
        lengths = np.diff(self.view.starts)
        return torch.from_numpy(np.repeat(np.arange(len(lengths)), lengths))

    def _write_slots(self, view: BatchView) -> None:
        pieces = self._pieces(view)
        if not pieces and not self._dirty:
            return
        num = max(view.num_tokens, self._dirty)
        before = self._host[:num].copy()
        self._host[:num] = NO_SLOT
        if pieces:
            assert self.tables is not None
            slot_of = self.tables.acquire(row for _, _, row in pieces)
            for first, last, row in pieces:
                self._host[first:last] = slot_of[row]
        if not np.array_equal(before, self._host[:num]):
            self.slots[:num].copy_(torch.from_numpy(self._host[:num]), non_blocking=True)
        self._dirty = view.num_tokens if pieces else 0

    def _pieces(self, view: BatchView) -> list[tuple[int, int, Row]]:
        """Stretches of the step's tokens that get a row of edits, as (first token, last token + 1, row)."""
        found: list[tuple[int, int, Row]] = []
        for index, placed in view.planned():
            token, position = int(view.starts[index]), int(view.positions[index])
            end = position + int(view.starts[index + 1]) - token
            for start, stop, row in placed.segments:
                first, last = max(start, position), end if stop is None else min(stop, end)
                if first < last:
                    found.append((token + first - position, token + last - position, row))
        return found
