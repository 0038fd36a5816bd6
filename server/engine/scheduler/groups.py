"""Groups: one request's sequences that differ in their prompts and emit the same token at every step.

The front end knows a group's primary only; its companions are made here. Each has blocks, keys and edits of its own, so
whatever holds for a plain request (chunked prefill, prefix caching, recomputation) holds for each member. What couples
them is who may run:

admission    one group at a time passes from waiting to running, when seats and blocks for all of it are free, and
             nobody else does until all of it has: no two half-admitted groups can wait for each other
prefill      alone, a member computes all but its last known token, so that it never samples
release      when all members lack just that last token, all get it in the same step, before anybody else
preemption   whole groups, latest arrival first, before vLLM looks at the step; in it, blocks for everybody who runs are
             there, so vLLM preempts nobody
end          with the primary, whatever ended it; companions stop for no reason of their own

A prompt of one token has nothing to compute alone. Such a member is given its token twice until it is released, and is
then introduced to the worker anew, with the one.
"""

import time
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.request import Request, RequestStatus

from whipstaff.server.engine.compat import fail_request
from whipstaff.server.engine.scheduler.group import KV_CACHE, MEMBER_CONTEXT, NOWHERE, Group
from whipstaff.server.engine.step_notes import GroupUse


class GroupedScheduling(Scheduler):
    """Mixed into vLLM's schedulers. Without groups it only looks whether there are any."""

    running: list[Request]
    max_num_active_reqs: int
    _pause_state: PauseState

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._groups: dict[str, Group] = {}  # by the primary's id
        self._group_of: dict[str, Group] = {}  # by any member's id
        self._released: set[str] = set()  # members that take this step's common token
        self._entering: Group | None = None  # the group that was last let in
        self._ended: list[Request] = []  # companions whose primary is gone
        self._is_stepping = False
        self.stepping_groups: dict[str, tuple[str | None, ...]] = {}  # of the last step: see `StepNotes.groups`
        self._steps_held = self._steps_together = self._num_preempted = self._half_scheduled = 0
        self._most_running = self.max_num_active_reqs

    # -- who comes and goes ------------------------------------------------------------------------------------------

    def add_group(self, group: Group) -> None:
        """Take a request and its further sequences. One that cannot run at all ends with an error."""
        name = group.primary.request_id
        self._limit(group)
        if group.num_seats > self._most_running:
            fail_request(self, name, f"{group.num_seats} sequences at once are more than the engine runs")
        elif group.primary.max_tokens < 1:
            fail_request(self, name, "the KV cache has no room for a token after the request's prompts")
        self._group_of.update({one.request_id: group for one in group.sequences})
        for member in group.members:
            super().add_request(member)
        self._groups[name] = group

    def _limit(self, group: Group) -> None:
        context, blocks = group.num_tokens_until(self.max_model_len), self._num_affordable(group)
        group.limit((context, MEMBER_CONTEXT), (blocks, KV_CACHE))

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        has_groups = bool(self._group_of)  # before: where all end, as those of an engine that does, none is left
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        if not has_groups:
            return finished
        self._end_companions()
        return [request for request in finished if request.client_index != NOWHERE]

    def update_from_output(self, *args: Any, **kwargs: Any) -> dict[int, EngineCoreOutputs]:
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(*args, **kwargs)
        if self._ended:
            self._end_companions()
        hidden = outputs.pop(NOWHERE, None)
        if hidden is not None and hidden.scheduler_stats is not None:
            seen = next(iter(outputs.values()), None) or outputs.setdefault(0, EngineCoreOutputs())
            seen.scheduler_stats = hidden.scheduler_stats
        return outputs

    def _end_companions(self) -> None:
        ended, self._ended = self._ended, []
        super().finish_requests([request.request_id for request in ended], RequestStatus.FINISHED_ABORTED)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        group = self._groups.pop(request.request_id, None)
        if group is not None:
            self._ended += [one for one in group.sequences if one is not request and not one.is_finished()]
            if request.status == RequestStatus.FINISHED_LENGTH_CAPPED and group.limited_by:
                request.stop_reason = group.limited_by
        freed = super()._free_request(request, *args, **kwargs)
        self._group_of.pop(request.request_id, None)
        return freed

    def group_use(self) -> GroupUse:
        num = sum(request.client_index == NOWHERE for request in self.running) if self._groups else 0
        return GroupUse(num, self._steps_held, self._half_scheduled, self._steps_together, self._num_preempted)

    # -- one step ----------------------------------------------------------------------------------------------------

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        paused, self.stepping_groups = self._pause_state, {}
        if not self._groups or paused == PauseState.PAUSED_ALL:
            return super().schedule(*args, **kwargs)
        self._drop_due()
        if paused == PauseState.PAUSED_NEW:
            self._withdraw_half_admitted()
        released = self._release()
        if self._make_room() and paused == PauseState.UNPAUSED:
            self._pause_state = PauseState.PAUSED_NEW  # as vLLM does: who was just preempted does not come back at once
        released = [group for group in released if all(map(_is_ready, group.members))]
        members = [member for group in released for member in group.members]
        self._released = {member.request_id for member in members}
        anew = _single(members)
        self.max_num_active_reqs = self._most_running - self._num_reserved()
        self._is_stepping = True
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self._pause_state, self._is_stepping, self.max_num_active_reqs = paused, False, self._most_running
        self._steps_together += len(released)
        self._introduce(output, anew)
        self._check(output, released)
        for group in released:
            self.stepping_groups |= group.stepping
        self._note_released(output, released)
        return output

    def _note_released(self, output: Any, released: Sequence[Group]) -> None:
        """Groups took a step together."""

    def _num_reserved(self) -> int:
        """Seats that groups which were let in may take yet."""
        return sum(group.num_seats - len(group.members) for group in self._groups.values() if group.num_running)

    def _drop_due(self) -> None:
        for group in list(self._groups.values()):
            dropped = group.drop_due()
            if dropped:
                super().finish_requests([member.request_id for member in dropped], RequestStatus.FINISHED_ABORTED)
                self._limit(group)
                if len(group.members) == 1:
                    del self._groups[group.primary.request_id], self._group_of[group.primary.request_id]

    def _release(self) -> list[Group]:
        """Choose the groups whose members all lack just their last token, as many as the step has room for, and put
        their members in front of everybody who runs."""
        budget, found = self.max_num_scheduled_tokens, []
        for group in self._groups.values():
            if group.awaits_decision:
                continue
            if all(map(_is_ready, group.members)) and len(group.members) <= budget:
                budget -= len(group.members)
                found.append(group)
            elif group.num_running:
                self._steps_held += 1
        members = [member for group in found for member in group.members]
        self._released = {member.request_id for member in members}
        self.running = members + [request for request in self.running if request.request_id not in self._released]
        return found

    def _reserve_prefill_lookahead(self, request: Request, num_computed_tokens: int, num_new_tokens: int) -> int:
        num: int = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        if request.request_id not in self._group_of or request.request_id in self._released:
            return num
        return max(0, min(num, _num_known(request) - 1 - num_computed_tokens))

    def _check(self, output: Any, released: list[Group]) -> None:
        for group in released:
            num = sum(member.request_id in output.num_scheduled_tokens for member in group.members)
            self._half_scheduled += num < len(group.members)
            assert num == len(group.members), f"{num} of a group's {len(group.members)} sequences were scheduled"

    def _introduce(self, output: Any, anew: list[Request]) -> None:
        """Tell the worker of members with prompts of one token as of new requests: of those that come in, with their
        token twice; of those in `anew`, with the one."""
        cached = output.scheduled_cached_reqs
        if not self.use_v2_model_runner:  # V2 is told all tokens anyway, and resumed requests are new ones there
            for new in output.scheduled_new_reqs:
                if new.req_id in self._group_of and _is_doubled(self.requests[new.req_id]):
                    new.prompt_token_ids = new.prompt_token_ids * 2
                    new.sampling_params = new.sampling_params.clone()
                    new.sampling_params.prompt_logprobs = None  # there is nothing before the first token
            resumed = [self.requests[name] for name in cached.resumed_req_ids if name in self._group_of]
            anew = anew + [request for request in resumed if _is_doubled(request)]
        for request in anew:
            if request.request_id in output.num_scheduled_tokens:
                take_out(cached, request.request_id)
                output.scheduled_new_reqs.append(self._as_new(request))

    def _as_new(self, request: Request, num_computed: int = 0) -> NewRequestData:
        """`num_computed`: tokens that were computed before this step."""
        blocks = self.kv_cache_manager.get_blocks(request.request_id).get_block_ids()
        tokens = list(request._all_token_ids)
        new = NewRequestData.from_request(request, blocks, tokens if self.use_v2_model_runner else None)
        new.num_computed_tokens = num_computed
        if not self.use_v2_model_runner:
            new.prompt_token_ids = tokens
        return new

    # -- who may run -------------------------------------------------------------------------------------------------

    def _handle_blocked_waiting_request(self, request: Request) -> bool:
        if not super()._handle_blocked_waiting_request(request):
            return False
        if not self._groups:
            return True
        group = self._group_of.get(request.request_id)
        if self._entering is not None and self._entering.is_half_admitted:
            return group is self._entering
        if group is None:
            return True
        if not all(map(_is_waiting, group.members)):
            return False
        if not self._has_room(group):
            self.max_num_active_reqs = 0  # nobody overtakes a group that waits for room: vLLM lets in no more
            return False
        self._entering = group
        self.max_num_active_reqs -= group.num_seats - len(group.members)
        return True

    def _has_room(self, group: Group) -> bool:
        """Whether all of a waiting group can run."""
        num_running = len(self.running) + self.num_waiting_for_streaming_input
        if num_running + self._num_reserved() + group.num_seats > self._most_running:
            return False
        for member in group.members:
            if member.num_tokens == 1:
                member._all_token_ids.append(member._all_token_ids[0])
        wanted = 0
        for member in group.members:
            blocks, num_cached, *_ = self._get_local_prefix_cache_hit(member)
            wanted += self._num_blocks_to_allocate(member, member.num_tokens, num_cached, blocks)
        free: int = self.kv_cache_manager.block_pool.get_num_free_blocks() - self.kv_cache_manager.watermark_blocks
        return wanted <= free - int(self._inflight_prefill_reserved_blocks())

    def _get_local_prefix_cache_hit(self, request: Request, *limit: Any) -> Any:
        blocks, num_tokens, boundary, has_diverged = super()._get_local_prefix_cache_hit(request, *limit)
        if request.request_id in self._group_of and num_tokens and num_tokens >= request.num_tokens - 1:
            num_tokens = (num_tokens - 1) // self.block_size * self.block_size  # not all but the token to be held back
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_tokens)
        return blocks, num_tokens, boundary, has_diverged

    def _make_room(self) -> bool:
        """Preempt until the step's running requests are sure to get their blocks. Whether anybody was."""
        free, managers = self.kv_cache_manager.block_pool, self.kv_cache_manager.coordinator.single_type_managers
        steps = sum(self.max_num_scheduled_tokens // manager.block_size for manager in managers)
        if free.get_num_free_blocks() >= 2 * len(managers) * len(self.running) + steps:
            return False  # enough for any step
        was_short = False
        while self._num_blocks_of_step() > free.get_num_free_blocks():
            unit = self._unit_of(max(self.running, key=self._age))
            if len(unit) == len(self.running):
                self._make_do(unit)
                break  # who runs alone fits
            self._preempt_unit(unit)
            was_short = True
        return was_short

    def _make_do(self, unit: Sequence[Request]) -> None:
        """Let go of blocks that those who run alone can do without."""

    def _num_blocks_of_step(self) -> int:
        """The most blocks that those who run can take in one step."""
        budget, num = self.max_num_scheduled_tokens, 0
        for request in self.running:
            new = min(self._num_wanted(request), budget)
            num_computed = request.num_computed_tokens
            num += self._num_blocks_to_allocate(request, num_computed + new, num_computed) if new else 0
            budget -= new if new == 1 or self._gives_whole_chunks else 0
        return num

    def _num_wanted(self, request: Request) -> int:
        """How many tokens of a running request can be computed."""
        if _is_ending(request):
            return 0
        is_held = request.request_id in self._group_of and request.request_id not in self._released
        num: int = _num_known(request) - request.num_computed_tokens - is_held
        return max(0, num)

    @property
    def _gives_whole_chunks(self) -> bool:
        """Whether a running request gets all the tokens that it wants and the step has left."""
        is_alone = self.parallel_config.data_parallel_size == 1 and not self.max_num_encoder_input_tokens
        threshold = self.scheduler_config.long_prefill_token_threshold
        return is_alone and not threshold and not self.need_mamba_block_aligned_split

    def _num_blocks_to_allocate(
        self, request: Request, num_tokens: int, num_computed: int, cached: KVCacheBlocks | None = None
    ) -> int:
        """What a sequence of that length takes, of which so many tokens are computed, in blocks of its own or
        `cached` ones; with the place where tokens are tried."""
        manager = self.kv_cache_manager
        num: int = manager.coordinator.get_num_blocks_to_allocate(
            request_id=request.request_id,
            num_tokens=min(num_tokens + self.num_lookahead_tokens, self.max_model_len),
            new_computed_blocks=(cached or manager.empty_kv_cache_blocks).blocks,
            num_encoder_tokens=0,
            total_computed_tokens=num_computed,
            num_local_computed_tokens=num_computed,
            num_tokens_main_model=num_tokens,
            prefill_end=max(request.num_prompt_tokens, request.num_tokens - 1),
        )
        return num

    def _age(self, request: Request) -> tuple[int, float, str]:
        """Orders units by who is preempted last."""
        priority = request.priority if self.policy == SchedulingPolicy.PRIORITY else 0
        group = self._group_of.get(request.request_id)
        return priority, request.arrival_time, (group.primary if group else request).request_id

    def _unit_of(self, request: Request) -> list[Request]:
        """Those who run and are preempted together with a running request."""
        group = self._group_of.get(request.request_id)
        if group is None:
            return [request]
        return [member for member in group.members if member.status == RequestStatus.RUNNING]

    def _withdraw_half_admitted(self) -> None:
        """Nobody new is let in for now, so a group that came in half would wait, and hold its blocks, for ever."""
        if self._entering is not None and self._entering.is_half_admitted:
            self._preempt_unit(self._unit_of(self._entering.members[0]))

    def _preempt_unit(self, unit: list[Request]) -> None:
        now, gone = time.monotonic(), {request.request_id for request in unit}
        self._num_preempted += unit[0].request_id in self._group_of
        self.running = [request for request in self.running if request.request_id not in gone]
        for request in reversed(unit):
            self._preempt_request(request, now)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        assert not self._is_stepping, "vLLM preempted in the middle of a step with groups"
        super()._preempt_request(request, *args, **kwargs)

    # -- sizes -------------------------------------------------------------------------------------------------------

    def _num_blocks(self, num_tokens: int) -> int:
        """What a sequence takes that shares nothing."""
        return sum(-(-num_tokens // m.block_size) for m in self.kv_cache_manager.coordinator.single_type_managers)

    def _num_affordable(self, group: Group) -> int:
        """How many tokens a group could generate if it had the KV cache to itself."""
        manager = self.kv_cache_manager
        blocks = manager.block_pool.num_gpu_blocks - 1 - manager.watermark_blocks

        def wanted(num_generated: int) -> int:
            return sum(self._num_blocks(one.num_prompt_tokens + num_generated) for one in group.sequences)

        return bisect_right(range(1, self.max_model_len), blocks, key=wanted)


def _num_known(request: Request) -> int:
    """Tokens of a sequence, those that are still being sampled and those that were drafted included."""
    return int(request.num_tokens_with_spec + request.num_output_placeholders)


def _is_ending(request: Request) -> bool:
    """Whether vLLM computes no more of a request: it is sure to end with a token that is being sampled."""
    after = request.num_computed_tokens + 2 - request.num_output_placeholders
    return bool(request.num_output_placeholders and after >= request.num_prompt_tokens + request.max_tokens)


def _is_waiting(member: Request) -> bool:
    """Whether a member may be let in: its grammar is there, and all tokens that were being sampled have come."""
    is_settled = member.num_stale_output_tokens == 0 or member.drop_stale_output
    return bool(is_settled and member.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED))


def _is_ready(member: Request) -> bool:
    """Whether a member lacks just its last token."""
    if member.status != RequestStatus.RUNNING or _is_ending(member):
        return False
    return bool(_num_known(member) == member.num_computed_tokens + 1)


def _is_doubled(member: Request) -> bool:
    """Whether a member has its only token twice."""
    return bool(member.num_tokens > member.num_prompt_tokens + member.num_output_tokens)


def _single(members: list[Request]) -> list[Request]:
    """Let those who have their only token twice have it once, to be computed again. Who they were."""
    doubled = [member for member in members if _is_doubled(member)]
    for member in doubled:
        del member._all_token_ids[1:]
        member.num_computed_tokens = 0
    for member in members:
        member.is_prefill_chunk = False
    return doubled


def take_out(cached: Any, request_id: str) -> None:
    """Remove a request from the running ones of a scheduler's output."""
    if request_id not in cached.req_ids:
        return
    index = cached.req_ids.index(request_id)
    for column in (cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, cached.num_output_tokens):
        del column[index]
    if cached.new_token_ids:
        del cached.new_token_ids[index]
    cached.resumed_req_ids.discard(request_id)
    cached.all_token_ids.pop(request_id, None)
