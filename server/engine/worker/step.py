"""One engine step, as a worker sees it. Who calls what, in order:

    schedule   worker.execute_model          note_schedule           who came and went, which groups step together
    run        runner adapter                begin                   what happens to this step's tokens
               model (edits/sites.py)        run_edits_              edits activations by the token table
               model (logits/model_hook.py)  needed_auxiliaries      which auxiliary models run beside it
               runner adapter                end_forward             what follows is no real step, or its draw
    logits     model (logits/model_hook.py)  decode, decode_prompt   stages mix and rule; `lookahead` tries tokens
               model (logits/model_hook.py)  note_logits             entropies, for schedules that follow them
    sample     runner's sampler              before_draw             stages penalty, temperature and truncation
               runner's sampler              after_draw              methods with state learn what was drawn
               runner adapter                give_to_companions_     the primary's token becomes theirs
    tell       worker.sample_tokens          tell                    explanations travel with the step's output

`pipeline` (logits/pipeline.py) does what concerns logits, `edits` (edits/step_edits.py) what concerns activations. Both
read one map of the requests.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from whipstaff.server.engine.explanations import attach
from whipstaff.server.engine.step_notes import CacheUse, GroupUse, SlotUse, StepNotes, notes_of
from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.server.engine.worker.edits.step_edits import StepEdits
from whipstaff.server.engine.worker.logits.pipeline import LogitsPipeline
from whipstaff.server.engine.worker.requests import Arrival, Requests, arrival
from whipstaff.server.engine.worker.token_copies import TokenCopies

MAX_WAITS = 1024  # that are kept until somebody asks


class WorkerStep:
    """What one worker does in every step beside vLLM's own."""

    def __init__(self, requests: Requests, edits: StepEdits, pipeline: LogitsPipeline) -> None:
        self.requests, self.edits, self.pipeline = requests, edits, pipeline
        self.num_steps = 0
        self.notes = StepNotes({}, SlotUse(), GroupUse(), CacheUse({}, {}))  # as the scheduler told them last
        self.num_slot_waits = 0
        self.slot_waits: deque[float] = deque(maxlen=MAX_WAITS)  # seconds, the last of them
        self._companion_rows: Sequence[tuple[int, int]] = ()  # of the step to be sampled
        self._copies = TokenCopies()

    @property
    def groups(self) -> Mapping[str, Sequence[str | None]]:
        """That take this step together: see `BatchView.in_groups`."""
        return self.notes.groups

    def note_schedule(self, scheduler_output: Any) -> None:
        """Learn who came and went, and what else vLLM's scheduler output carries of ours."""
        self.note_requests(scheduler_output.finished_req_ids, map(arrival, scheduler_output.scheduled_new_reqs))
        if (notes := notes_of(scheduler_output)) is None:
            self.notes = self.notes._replace(groups={})
            return
        self.notes = notes
        self.num_slot_waits += len(notes.slot_use.waits)
        self.slot_waits.extend(notes.slot_use.waits)

    def note_requests(self, finished: Iterable[str], arrivals: Iterable[Arrival]) -> None:
        """`finished` comes first: an id may finish and come back in one step."""
        for request in self.requests.finish(finished):
            self.edits.histories.remove(request)
            self.pipeline.remove(request)
        for request, new in self.requests.take(arrivals):
            self.edits.histories.add(request)
            self.pipeline.add(request, new)

    def begin(self, view: BatchView, input_ids: Tensor | None) -> None:
        """A real step's forward pass begins. Profiling, warm-up and graph capture are none."""
        self.num_steps += 1
        self._companion_rows = view.companion_rows
        self.pipeline.begin_step(view, input_ids)
        self.edits.begin_step(view, input_ids)

    def end_forward(self) -> None:
        self.pipeline.end_forward()
        self.edits.end_step()

    def give_to_companions_(self, sampled: Tensor) -> None:
        """(B, 1) token ids: companions' become those of their primaries."""
        self._copies.apply_(sampled, self._companion_rows)

    def tell(self, output: Any) -> Any:
        """The step's output, with its explanations."""
        return attach(output, self.pipeline.take_explanations())
