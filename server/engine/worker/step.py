"""One engine step, as a worker sees it. Who calls what, in order:

    schedule   worker.execute_model          note_schedule           who came and went, which groups step together
    run        runner adapter                begin                   what happens to this step's tokens
               model (edits/sites.py)        run_bound_edits_        edits activations by the token table
               model (logits/model_hook.py)  needed_auxiliaries      which auxiliary models run beside it
               runner adapter                end_forward             what follows is no real step, or its draw
    logits     model (logits/model_hook.py)  decode, decode_prompt   stages mix and rule; `lookahead` tries tokens
               model (logits/model_hook.py)  note_logits             entropies, for schedules that follow them
    sample     runner's sampler              before_draw             stages penalty, temperature and truncation
               runner's sampler              after_draw              searches decide; methods learn what was drawn
               runner adapter                give_to_companions_     the primary's token becomes theirs
    tell       worker.sample_tokens          tell                    explanations and verdicts go with the output;
                                                                     of rejected drafts nothing stays

`pipeline` (logits/pipeline.py) does what concerns logits, `edits` (edits/step_edits.py) what concerns activations. Both
read one map of the requests.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whipstaff.server.engine.explanations import Explanations, attach
from whipstaff.server.engine.patch import carry
from whipstaff.server.engine.searches import attach_verdicts
from whipstaff.server.engine.step_notes import CacheUse, GroupUse, SlotUse, StepNotes
from whipstaff.server.engine.worker.batch import NOBODY, BatchView, Ints
from whipstaff.server.engine.worker.edits.step_edits import StepEdits
from whipstaff.server.engine.worker.logits.pipeline import LogitsPipeline
from whipstaff.server.engine.worker.requests import Arrival, Requests, arrival
from whipstaff.server.engine.worker.search.searches import Copies
from whipstaff.server.plan import plan_of

MAX_WAITS = 1024  # that are kept until somebody asks


class WorkerStep:
    """What one worker does in every step beside vLLM's own."""

    def __init__(self, requests: Requests, edits: StepEdits, pipeline: LogitsPipeline) -> None:
        self.requests, self.edits, self.pipeline = requests, edits, pipeline
        self.num_steps = 0
        self.notes = StepNotes({}, SlotUse(), GroupUse(), CacheUse({}, {}))  # as the scheduler told them last
        self.num_slot_waits = 0
        self.slot_waits: deque[float] = deque(maxlen=MAX_WAITS)  # seconds, the last of them
        self.is_in_forward = False  # whether a real forward pass is under way: not profiling, warm-up or capture
        self.is_plain = False  # whether nobody in this step, or in the one before, asks for anything
        self._view = replace(NOBODY)  # so that the first step tells all parts that nobody asks for anything
        self._copied: Sequence[tuple[int, int]] = ()  # what `_rows` holds: (a companion's row, its primary's)
        self._rows = torch.empty(2, 0, dtype=torch.int64)  # on the device: who decodes keeps its rows

    @property
    def groups(self) -> Mapping[str, Sequence[str | None]]:
        """That take this step together: see `BatchView.in_groups`."""
        return self.notes.groups

    @property
    def drawn_logits(self) -> Ints | None:
        """Of this step: see `BatchView.drawn_logits`."""
        return self._view.drawn_logits

    def note_schedule(self, scheduler_output: Any) -> None:
        """Learn who came and went, and what else vLLM's scheduler output carries of ours."""
        arrivals: list[Arrival] = []
        if new := scheduler_output.scheduled_new_reqs:
            planned = ((one, plan_of(one)) for one in new)
            arrivals = [arrival(one, plan) for one, plan in planned if plan is not None]
        if arrivals or self.requests:
            self.note_requests(scheduler_output.finished_req_ids, arrivals)
        notes: StepNotes | None = getattr(scheduler_output, "whipstaff_notes", None)
        if notes is None:  # it is as it was, or this is warm-up
            return
        self.notes = notes
        self.pipeline.searches.expected = notes.searches
        if notes.slot_use.waits:
            self.num_slot_waits += len(notes.slot_use.waits)
            self.slot_waits.extend(notes.slot_use.waits)

    def note_requests(self, finished: Iterable[str], arrivals: Iterable[Arrival]) -> None:
        """`finished` comes first: an id may finish and come back in one step."""
        finished = list(finished)
        if self.pipeline.searches.running:
            finished += self.pipeline.searches.end(finished)
        for request in self.requests.finish(finished):
            if request.histories:
                self.edits.histories.remove(request)
            if request.captured:
                self.edits.captures.remove(request)
            self.pipeline.remove(request)
        for request, new in self.requests.take(arrivals):
            if request.placed.num_columns:
                self.edits.histories.add(request)
            if request.placed.captures or request.placed.attended:
                self.edits.captures.add(request)
            self.pipeline.add(request, new)

    def begin(self, view: BatchView, input_ids: Tensor | None) -> None:
        """A real step's forward pass begins. Profiling, warm-up and graph capture are none."""
        self.num_steps += 1
        self.is_in_forward, self.is_plain, self._view = True, view is NOBODY is self._view, view
        if not self.is_plain:
            self.pipeline.begin_step(view, input_ids)
            self.edits.begin_step(view, input_ids)
            if self.edits.captures.attention:
                self.edits.captures.begin_step()

    def end_forward(self) -> None:
        self.is_in_forward = False
        if not self.is_plain:
            self.pipeline.end_forward()
            self.edits.end_step()
            if self.edits.captures.num_asking:
                self.edits.captures.note(self._view)

    def give_to_companions_(self, sampled: Tensor) -> None:
        """(B, 1) token ids: companions' become those of their primaries."""
        if not self._view.companion_rows:
            return
        if self._view.companion_rows != self._copied or self._rows.device != sampled.device:
            self._copied = self._view.companion_rows
            rows = torch.tensor(self._copied, pin_memory=sampled.is_cuda).T.contiguous()
            self._rows = rows.to(sampled.device, non_blocking=True)
        companions, primaries = self._rows
        sampled[companions] = sampled[primaries]

    def tell(self, output: Any) -> Any:
        """The step's output, with its explanations and verdicts."""
        if self.is_plain:
            return output
        if self._view.num_drafts is not None:
            self._forget_rejected(self._view.num_drafts, output)
        if self.notes.searches:
            verdicts, copies = self.pipeline.searches.take()
            self._copy(copies)
            output = attach_verdicts(output, verdicts)
        if output is not None and self.edits.histories.watched:
            output = carry(output, "whipstaff_stops", self.edits.histories.stops().on_host)
        told: list[Explanations] = []
        if (explanations := self.pipeline.take_explanations()) is not None:
            told.append(explanations)
        if output is not None and self.edits.histories.telling:
            told.append(self.edits.histories.take_told())
        return output if output is None or not told else attach(output, told)

    def _forget_rejected(self, num_drafts: Ints, output: Any) -> None:
        """What was read or captured of drafts that are no tokens of their requests. Where these go on, the tokens that
        take their places are computed at the same positions."""
        for row in np.flatnonzero(num_drafts):
            request = self.requests.get(self._view.requests[row])
            if request is None or not (request.histories or request.captured):
                continue
            index = output.req_id_to_index[request.request_id]
            num = int(self._view.positions[row]) + len(output.sampled_token_ids[index])
            request.num_read = min(request.num_read, num)
            if request.captured:
                self.edits.captures.forget(request, num)

    def _copy(self, copies: Copies) -> None:
        """Sequences of searches go on in other seats, with what is kept of them."""
        found = [self.requests.like(source, target) for source, target in copies]
        pairs = [pair for pair in found if pair is not None]
        for _, target in pairs:
            if target.placed.num_columns:
                self.edits.histories.add(target)
        self.edits.histories.copy(pairs)
        self.pipeline.copy(pairs)
