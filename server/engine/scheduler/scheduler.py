"""The scheduler hook: no more rows of edits run at once than there are slots, and a step's output says what we need.

Requests whose rows of edits, or whose conditions, would not fit beside those already admitted wait here, in order; a
request's sequences (see `groups`) wait together. Their KV blocks get their keys (`block_keys`) as they come.
"""

import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from whipstaff.server.engine.explanations import relay
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.scheduler.bans import NO_TOKEN_LEFT, is_banned
from whipstaff.server.engine.scheduler.block_keys import key_blocks
from whipstaff.server.engine.scheduler.group import companions
from whipstaff.server.engine.scheduler.groups import GroupedScheduling
from whipstaff.server.engine.scheduler.slots import Slots
from whipstaff.server.engine.step_notes import CacheUse, SlotUse, StepNotes, attach_notes
from whipstaff.server.plan import PLAN_KEY, PositionedPlan, RequestPlan, plan_of

PLAIN, STEERED, GUIDED = "plain", "steered", "guided"  # whose prompts are looked for in the prefix cache


class Unit(NamedTuple):
    """A request and its companions."""

    primary: Request
    companions: list[Request]
    plan: RequestPlan

    @property
    def sequences(self) -> list[Request]:
        return [self.primary, *self.companions]


class SteeredScheduling(GroupedScheduling):
    """Mixed into vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = kwargs.get("vllm_config") or args[0]
        self._layout = Layout.from_config(vllm_config.additional_config)
        if self._layout.looks_ahead:
            self.num_lookahead_tokens = 1  # where tokens are tried
        self._slots = Slots(self._layout)
        self._placed: dict[str, PositionedPlan] = {}  # admitted and held sequences with rows
        self._held: deque[Unit] = deque()  # waiting for slots
        self._held_since: dict[str, float] = {}  # by their primaries
        self._waits: list[float] = []  # seconds, of those that have slots since the last step
        self._cache_use = CacheUse(*(dict.fromkeys((PLAIN, STEERED, GUIDED), 0) for _ in range(2)))

    def add_request(self, request: Request) -> None:
        plan = plan_of(request)
        if plan is None or request.request_id in self.requests:
            super().add_request(request)
            return
        unit = Unit(request, companions(request, plan), plan)
        if any([self._place(sequence) for sequence in unit.sequences]):
            self._held.append(unit)
            self._admit()
            if self._held and self._held[-1] is unit:
                self._held_since[request.request_id] = time.monotonic()
        else:
            self._start(unit)

    def _place(self, request: Request) -> bool:
        """Key a sequence's blocks. Whether it needs slots."""
        plan = plan_of(request)
        if plan is None:
            return False
        placed = PositionedPlan(plan, request.num_prompt_tokens)
        key_blocks(request, placed, self.hash_block_size)
        if plan.steering is not None and plan.steering.forgets_cached_steps:
            request.skip_reading_prefix_cache = True
        if placed.rows:
            self._placed[request.request_id] = placed
        return bool(placed.rows)

    def _start(self, unit: Unit) -> None:
        """Hand a unit to vLLM."""
        if unit.companions:
            self.add_group(*unit)
        else:
            super().add_request(unit.primary)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        self._note_cache_use(output.scheduled_new_reqs)
        slot_use, self._waits = SlotUse(self._slots.num_used, len(self._held), self._waits), []
        attach_notes(output, StepNotes(self.stepping_groups, slot_use, self.group_use(), self._cache_use))
        return output

    def _note_cache_use(self, new: Iterable[Any]) -> None:
        """Count what requests found in the prefix cache when they were first scheduled, as vLLM tells the worker of
        them: as in vLLM's own counters, but by whose they are."""
        for told in new:
            request = self.requests[told.req_id]
            if request.num_preemptions or request.num_prompt_tokens == 1:
                continue  # comes again, or has nothing that could be there
            traffic = GUIDED if told.req_id in self._group_of else _traffic(request)
            self._cache_use.queries[traffic] += request.num_prompt_tokens
            self._cache_use.hits[traffic] += told.num_computed_tokens

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
            self._held_since.pop(unit.primary.request_id, None)
            for sequence in unit.sequences:
                self._placed.pop(sequence.request_id, None)
            unit.primary.status = finished_status
        finished: list[Request] = super().finish_requests(wanted, finished_status)
        return [*(unit.primary for unit in dropped), *finished]

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        found, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        if not found or not is_banned(request, found[-1]):
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
            unit = self._held.popleft()
            if (since := self._held_since.pop(unit.primary.request_id, None)) is not None:
                self._waits.append(time.monotonic() - since)
            self._start(unit)


def _traffic(request: Request) -> str:
    extra = request.sampling_params.extra_args if request.sampling_params else None
    plan = (extra or {}).get(PLAN_KEY)
    return STEERED if plan and plan["steering"] else PLAIN


class SteeredScheduler(SteeredScheduling, Scheduler):
    """For synchronous scheduling."""


class AsyncSteeredScheduler(SteeredScheduling, AsyncScheduler):
    """For asynchronous scheduling."""
