"""The scheduler hook: no more rows of edits run at once than there are slots, and a step's output says what we need.

Requests whose rows of edits, conditions or hidden states would not fit beside those already admitted wait here, in
order; a request's sequences (see `groups`) wait together. Their KV blocks get their keys (`block_keys`) as they come.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from whipstaff.server.engine.explanations import relay
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.scheduler.bans import NO_TOKEN_LEFT, is_banned
from whipstaff.server.engine.scheduler.block_keys import key_blocks
from whipstaff.server.engine.scheduler.group import Group, SearchGroup, companions, search_rows
from whipstaff.server.engine.scheduler.search_scheduling import SearchScheduling
from whipstaff.server.engine.scheduler.slots import Slots
from whipstaff.server.engine.step_notes import SlotUse, StepNotes, attach_notes
from whipstaff.server.plan import PositionedPlan, RequestPlan, plan_of


class Unit(NamedTuple):
    """A request and its further sequences."""

    primary: Request
    group: Group | None  # None: it has none

    @property
    def sequences(self) -> Sequence[Request]:
        return self.group.sequences if self.group is not None else [self.primary]


def unit_of(request: Request, plan: RequestPlan) -> Unit:
    own = companions(request, plan)
    if plan.decoding is not None and plan.decoding.search is not None:
        return Unit(request, SearchGroup(search_rows(request, own, plan), plan))
    return Unit(request, Group(request, own, plan) if own else None)


class SteeredScheduling(SearchScheduling):
    """Mixed into vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = kwargs.get("vllm_config") or args[0]
        self._layout = Layout.from_config(vllm_config.additional_config)
        self._max_search_seqs = self._layout.max_search_seqs
        if self._layout.looks_ahead:
            self.num_lookahead_tokens = 1  # where tokens are tried
        self._slots = Slots(self._layout)
        self._placed: dict[str, PositionedPlan] = {}  # admitted and held sequences that need slots
        self._held: deque[Unit] = deque()  # waiting for slots

    def add_request(self, request: Request) -> None:
        plan = plan_of(request)
        if plan is None or request.request_id in self.requests:
            super().add_request(request)
            return
        unit = unit_of(request, plan)
        if any([self._place(sequence) for sequence in unit.sequences]):
            self._held.append(unit)
            self._admit()
        else:
            self._start(unit)

    def _place(self, request: Request) -> bool:
        """Key a sequence's blocks. Whether it needs slots."""
        plan = plan_of(request)
        if plan is None:
            return False
        placed = PositionedPlan(plan, request.num_prompt_tokens)
        key_blocks(request, placed, self.hash_block_size)
        if placed.keeps_hidden or (plan.steering is not None and plan.steering.forgets_cached_steps):
            request.skip_reading_prefix_cache = True
        if placed.needs_slots:
            self._placed[request.request_id] = placed
        return placed.needs_slots

    def _start(self, unit: Unit) -> None:
        """Hand a unit to vLLM."""
        if unit.group is not None:
            self.add_group(unit.group)
        else:
            super().add_request(unit.primary)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        slot_use = SlotUse(self._slots.num_used, len(self._held))
        groups = self.stepping_groups, slot_use, self.group_use()
        attach_notes(output, StepNotes(*groups, self.stepping_searches, self.told_seats, self.search_use()))
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        relay(model_runner_output, outputs)
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        wanted = [request_ids] if isinstance(request_ids, str) else request_ids
        wanted = None if wanted is None else set(wanted)
        dropped = [unit for unit in self._held if wanted is None or unit.primary.request_id in wanted]
        for unit in dropped:
            self._held.remove(unit)
            for sequence in unit.sequences:
                self._placed.pop(sequence.request_id, None)
            unit.primary.status = finished_status
        finished: list[Request] = super().finish_requests(wanted, finished_status)
        return [*(unit.primary for unit in dropped), *finished]

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        found, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        if not found or self.is_searching(request) or not is_banned(request, found[-1]):
            return found, stopped
        request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, NO_TOKEN_LEFT
        return found[:-1], True

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._held)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)
        placed = self._placed.pop(request.request_id, None)
        if placed is not None:
            self._slots.free(placed)
            self._admit()
        return freed

    def _admit(self) -> None:
        """Hand held units to vLLM, first come first served, while their rows fit."""
        while self._held:
            placed = [self._placed.get(sequence.request_id) for sequence in self._held[0].sequences]
            if not self._slots.take([one for one in placed if one is not None]):
                return
            self._start(self._held.popleft())


class SteeredScheduler(SteeredScheduling, Scheduler):
    """For synchronous scheduling."""


class AsyncSteeredScheduler(SteeredScheduling, AsyncScheduler):
    """For asynchronous scheduling."""
