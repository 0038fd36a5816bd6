"""The scheduler hook: no more rows of edits run at once than there are slots, and a step's output says what we need.

Requests whose rows of edits, conditions or hidden states would not fit beside those already admitted wait here, in
order; a request's sequences (see `groups`) wait together. Their KV blocks get their keys (`block_keys`) as they come.

While nobody asks for anything of ours the scheduler is of another class, which overrides next to nothing of vLLM's.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from whipstaff.server.engine import causes
from whipstaff.server.engine.explanations import relay
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.patch import become
from whipstaff.server.engine.scheduler.bans import without_banned
from whipstaff.server.engine.scheduler.block_keys import key_blocks
from whipstaff.server.engine.scheduler.group import Group, SearchGroup, companions, search_rows
from whipstaff.server.engine.scheduler.search_scheduling import SearchScheduling
from whipstaff.server.engine.step_notes import CacheUse, GroupUse, SlotUse, StepNotes
from whipstaff.server.plan import PLAN_KEY, PositionedPlan, RequestPlan, plan_of
from whipstaff.steering.plan import EditSet, num_slots

STOP_WHEN = "stop_when"  # the stop reason of a request that its own field of that name ended
NOBODY: frozenset[str] = frozenset()
PLAIN, STEERED, GUIDED = "plain", "steered", "guided"  # whose prompts are looked for in the prefix cache


class Unit(NamedTuple):
    """A request and its further sequences."""

    primary: Request
    group: Group | None  # None: it has none

    @property
    def sequences(self) -> Sequence[Request]:
        return self.group.sequences if self.group is not None else [self.primary]


class Slots:
    """What is taken of an engine's room: of rows of edits, conditions, kept hidden states and captured activations.
    Rows that several sequences share are counted once."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._rows: Counter[EditSet] = Counter()  # how many sequences may need each row
        self.num_used = self._num_histories = self._num_hidden = self._num_captured = 0

    def take(self, plans: Sequence[PositionedPlan]) -> bool:
        """Take what sequences need, if all of it is free."""
        rows = [row for placed in plans for row in placed.rows]
        slots = self.num_used + self._num_more(rows)
        histories = self._num_histories + sum(placed.num_columns for placed in plans)
        hidden = self._num_hidden + sum(placed.keeps_hidden for placed in plans)
        layout = self._layout
        captured = self._num_captured + sum(placed.capture_bytes(layout.shape) for placed in plans)
        if slots > layout.num_slots or histories > layout.num_histories or hidden > layout.num_hidden_states:
            return False
        if captured > layout.max_capture_bytes:
            return False
        self.num_used, self._num_histories, self._num_hidden = slots, histories, hidden
        self._num_captured = captured
        self._rows.update(rows)
        return True

    def free(self, placed: PositionedPlan) -> None:
        """What one sequence took."""
        self._rows -= Counter(placed.rows)
        self.num_used -= self._num_more(placed.rows)
        self._num_histories -= placed.num_columns
        self._num_hidden -= placed.keeps_hidden
        self._num_captured -= placed.capture_bytes(self._layout.shape)

    def _num_more(self, rows: Iterable[EditSet]) -> int:
        """Slots that rows take beside those in use."""
        num_layers = self._layout.shape.num_layers
        return sum(num_slots(row, num_layers) for row in set(rows) if row not in self._rows)


def unit_of(request: Request, plan: RequestPlan) -> Unit:
    own = companions(request, plan) if plan.companions else []
    if plan.decoding is not None and plan.decoding.search is not None:
        return Unit(request, SearchGroup(search_rows(request, own, plan), plan))
    return Unit(request, Group(request, own, plan) if own else None)


class IdleScheduling(Scheduler):
    """Mixed into vLLM's schedulers while nobody asks for anything of ours."""

    _awake: type["SteeredScheduling"]  # what it is otherwise
    _notes: StepNotes  # as the worker was told last
    _cache_use: CacheUse

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        super().update_draft_token_ids(draft_token_ids)
        _drop_drafts(self, filter(partial(_is_sampled, self), draft_token_ids.req_ids))

    def add_request(self, request: Request) -> None:
        if plan_of(request) is None:
            super().add_request(request)
        else:
            become(self, self._awake)
            self.add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        if output.scheduled_spec_decode_tokens:
            _take_padding(self, output, partial(_is_sampled, self))
        if output.scheduled_new_reqs:  # else there is no news
            _note_cache_use(self, output.scheduled_new_reqs)
            output.whipstaff_notes = self._notes
        return output

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        found, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        return without_banned(request, found, stopped) if found and _has_bans(request) else (found, stopped)


class SteeredScheduling(SearchScheduling):
    """Mixed into vLLM's schedulers while somebody does."""

    _idle: type[IdleScheduling]  # what it is otherwise

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        causes.tell()
        super().__init__(*args, **kwargs)
        vllm_config = kwargs.get("vllm_config") or args[0]
        self._layout = Layout.from_config(vllm_config.additional_config)
        self._max_search_seqs = self._layout.max_search_seqs
        if self._layout.looks_ahead:
            self.num_lookahead_tokens = 1  # where tokens are tried
        self._slots = Slots(self._layout)
        self._placed: dict[str, PositionedPlan] = {}  # admitted and held sequences that need slots
        self._held: deque[Unit] = deque()  # waiting for slots
        self._held_since: dict[str, float] = {}  # by their primaries
        self._waits: list[float] = []  # seconds, of those that have slots since the last step
        self._stops = NOBODY  # who ends by what was read of the tokens that are being taken in
        self._asking: set[str] = set()  # requests that ask for anything of ours
        self._undrafted: set[str] = set()  # of those, who take no drafts
        self._had_news = False
        self._cache_use = CacheUse(*(dict.fromkeys((PLAIN, STEERED, GUIDED), 0) for _ in range(2)))
        self._notes = StepNotes({}, SlotUse(), GroupUse(), self._cache_use)  # as the worker was told last

    def add_request(self, request: Request) -> None:
        plan = plan_of(request)
        if plan is None or request.request_id in self.requests:
            super().add_request(request)
            return
        self._asking.add(request.request_id)
        if self.num_spec_tokens and plan.undrafted_by is not None:
            self._undrafted.add(request.request_id)
        unit = unit_of(request, plan)
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
        if placed.keeps_hidden or (plan.steering is not None and plan.steering.forgets_cached_steps):
            request.skip_reading_prefix_cache = True
        if placed.needs_slots:
            self._placed[request.request_id] = placed
        return placed.needs_slots

    def _get_local_prefix_cache_hit(self, request: Request, *limit: Any) -> Any:
        """Not from the first position on whose activations are captured: what is not computed is not seen."""
        blocks, num_tokens, boundary, has_diverged = super()._get_local_prefix_cache_hit(request, *limit)
        placed = self._placed.get(request.request_id)
        first = None if placed is None else placed.first_captured
        if first is not None and num_tokens > first:
            num_tokens = first // self.block_size * self.block_size
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, num_tokens)
        return blocks, num_tokens, boundary, has_diverged

    def _start(self, unit: Unit) -> None:
        """Hand a unit to vLLM."""
        if unit.group is not None:
            self.add_group(unit.group)
        else:
            super().add_request(unit.primary)

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)
        if output.scheduled_spec_decode_tokens:
            _take_padding(self, output, self._is_undrafted)
        if output.scheduled_new_reqs:
            _note_cache_use(self, output.scheduled_new_reqs)
        has_news = self._has_news(output)
        if has_news or self._had_news:  # once more: what was is over
            self._notes = output.whipstaff_notes = self._notes_now()
        elif not (self._placed or self._asking):
            self._awake = type(self)
            become(self, self._idle)
        self._had_news = has_news
        return output

    def _has_news(self, output: Any) -> bool:
        """Whether the worker has to hear anything that it was not told with the step before."""
        if self._groups or self._held or self._waits or output.scheduled_new_reqs:
            return True
        return self._slots.num_used != self._notes.slot_use.num_used

    def _notes_now(self) -> StepNotes:
        slot_use, self._waits = SlotUse(self._slots.num_used, len(self._held), self._waits), []
        return StepNotes(
            self.stepping_groups,
            slot_use,
            self.group_use(),
            self._cache_use,
            self.stepping_searches,
            self.told_seats,
            self.search_use(),
        )

    def update_draft_token_ids(self, draft_token_ids: Any) -> None:
        super().update_draft_token_ids(draft_token_ids)
        _drop_drafts(self, filter(self._is_undrafted, draft_token_ids.req_ids))

    def _is_undrafted(self, name: str) -> bool:
        return name in self._undrafted or name in self._group_of or _is_sampled(self, name)

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        self._stops = getattr(model_runner_output, "whipstaff_stops", NOBODY)
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        if hasattr(model_runner_output, "whipstaff_explanations"):
            relay(model_runner_output.whipstaff_explanations, outputs)
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        wanted = [request_ids] if isinstance(request_ids, str) else request_ids
        wanted = None if wanted is None else set(wanted)
        dropped = [unit for unit in self._held if wanted is None or unit.primary.request_id in wanted]
        for unit in dropped:
            self._held.remove(unit)
            self._held_since.pop(unit.primary.request_id, None)
            self._asking.discard(unit.primary.request_id)
            self._undrafted.discard(unit.primary.request_id)
            for sequence in unit.sequences:
                self._placed.pop(sequence.request_id, None)
            unit.primary.status = finished_status
        finished: list[Request] = super().finish_requests(wanted, finished_status)
        return [*(unit.primary for unit in dropped), *finished]

    def _update_request_with_output(
        self, request: Request, new_token_ids: list[int], *args: Any, **kwargs: Any
    ) -> tuple[list[int], bool]:
        found, stopped = super()._update_request_with_output(request, new_token_ids, *args, **kwargs)
        if found and request.request_id in self._stops and _has_enough(request):
            request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, STOP_WHEN
            return [], True  # the token before these was the last
        if not found or not _has_bans(request) or self.is_searching(request):
            return found, stopped
        return without_banned(request, found, stopped)

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()
        return running, waiting + len(self._held)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)
        self._asking.discard(request.request_id)
        self._undrafted.discard(request.request_id)
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


def _is_sampled(scheduler: Any, name: str) -> bool:
    """Whether a request draws at random: beside drafts stock vLLM 0.32 on a CPU draws from another distribution."""
    request = scheduler.requests.get(name)
    return request is not None and request.sampling_params is not None and request.sampling_params.temperature > 0


def _drop_drafts(scheduler: Any, names: Iterable[str]) -> None:
    for name in names:
        if name in scheduler.requests:
            scheduler.requests[name].spec_token_ids = []


def _take_padding(scheduler: Any, output: Any, is_undrafted: Callable[[str], bool]) -> None:
    """vLLM pads the single token of who comes in with drafts that are none; those who take none do without."""
    drafts = output.scheduled_spec_decode_tokens
    for name in list(filter(is_undrafted, drafts)):
        num = len(drafts.pop(name))
        output.num_scheduled_tokens[name] -= num
        output.total_num_scheduled_tokens -= num
        scheduler.requests[name].num_computed_tokens -= num


def _note_cache_use(scheduler: Any, new: Iterable[Any]) -> None:
    """Count what requests found in the prefix cache when they were first scheduled, as vLLM tells the worker of
    them: as in vLLM's own counters, but by whose they are."""
    use: CacheUse = scheduler._cache_use
    for told in new:
        request = scheduler.requests[told.req_id]
        if request.num_preemptions or request.num_output_tokens or request.num_prompt_tokens == 1:
            continue  # comes again, or has nothing that could be there
        traffic = GUIDED if told.req_id in scheduler._group_of else _traffic(request)
        use.queries[traffic] += request.num_prompt_tokens
        use.hits[traffic] += told.num_computed_tokens


def _traffic(request: Request) -> str:
    extra = request.sampling_params.extra_args if request.sampling_params else None
    plan = (extra or {}).get(PLAN_KEY)
    return STEERED if plan and plan["steering"] else PLAIN


def _has_enough(request: Request) -> bool:
    """Whether it has its `min_tokens` without the one that was drawn last."""
    params = request.sampling_params
    return params is None or request.num_output_tokens > params.min_tokens


def _has_bans(request: Request) -> bool:
    """Whether vLLM may be left with no token to draw."""
    params = request.sampling_params
    return params is not None and (params.allowed_token_ids is not None or bool(params.bad_words_token_ids))


class IdleScheduler(IdleScheduling, Scheduler):
    """For synchronous scheduling."""


class AsyncIdleScheduler(IdleScheduling, AsyncScheduler):
    """For asynchronous scheduling."""


class SteeredScheduler(SteeredScheduling, Scheduler):
    """For synchronous scheduling."""

    _idle = IdleScheduler


class AsyncSteeredScheduler(SteeredScheduling, AsyncScheduler):
    """For asynchronous scheduling."""

    _idle = AsyncIdleScheduler
