"""The scheduler hook: steered KV blocks get keys of their own, and no more rows run at once than there are slots.

Prefix cache. A block's key must hold whatever changed the KV in it. An edit changes KV from its first position on, in
later layers there and everywhere after through attention; a request that needs auxiliary models must not take blocks
that were filled while those were skipped. So blocks from a request's first affected position on are keyed with a digest
of its plan, and blocks before it are shared with plain traffic.

Slots. Requests whose rows of edits, or whose conditions, would not fit beside those already admitted wait here, in
order; a request's sequences (see `groups`) wait together.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from whipstaff.decoding.method import LogitsRewriter
from whipstaff.decoding.methods import METHODS
from whipstaff.server.engine.explanations import relay
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.occupancy import SlotUse
from whipstaff.server.engine.scheduler.groups import GroupedScheduling, companions
from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.steering.plan import EditSet, num_slots

NO_TOKEN_LEFT = "no_token_left"  # the stop reason of requests whose bans left nothing to say
Hasher = Callable[[Request], list[bytes]]


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
        self._rows_in_use: Counter[EditSet] = Counter()  # how many admitted sequences may need each row
        self._slots_in_use = self._histories_in_use = 0
        self._placed: dict[str, PositionedPlan] = {}  # admitted and held sequences with rows
        self._held: deque[Unit] = deque()  # waiting for slots

    def add_request(self, request: Request) -> None:
        plan = _plan_of(request)
        if plan is None or request.request_id in self.requests:
            super().add_request(request)
            return
        unit = Unit(request, companions(request, plan), plan)
        if any([self._place(sequence) for sequence in unit.sequences]):
            self._held.append(unit)
            self._admit()
        else:
            self._start(unit)

    def _place(self, request: Request) -> bool:
        """Key a sequence's blocks. Whether it needs slots."""
        plan = _plan_of(request)
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
        # for metrics, by way of the worker
        output.whipstaff_use = SlotUse(self._slots_in_use, len(self._held)), self.group_use()
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
            self._rows_in_use -= Counter(placed.rows)
            self._slots_in_use -= self._slots_of(placed.rows)
            self._histories_in_use -= placed.num_columns
            self._admit()
        return freed

    def _slots_of(self, rows: Iterable[EditSet]) -> int:
        """What rows take beside those in use."""
        num_layers = self._layout.shape.num_layers
        return sum(num_slots(row, num_layers) for row in set(rows) if row not in self._rows_in_use)

    def _admit(self) -> None:
        """Hand held units to vLLM, first come first served, while their rows fit."""
        while self._held:
            unit = self._held[0]
            placed = [self._placed[s.request_id] for s in unit.sequences if s.request_id in self._placed]
            rows = [row for one in placed for row in one.rows]
            slots = self._slots_in_use + self._slots_of(rows)
            histories = self._histories_in_use + sum(one.num_columns for one in placed)
            if slots > self._layout.num_slots or histories > self._layout.num_histories:
                return
            self._slots_in_use, self._histories_in_use = slots, histories
            self._rows_in_use.update(rows)
            self._start(self._held.popleft())


class SteeredScheduler(SteeredScheduling, Scheduler):
    """For synchronous scheduling."""


class AsyncSteeredScheduler(SteeredScheduling, AsyncScheduler):
    """For asynchronous scheduling."""


def is_banned(request: Request, token: int) -> bool:
    """Whether the token that was drawn last is one that the request bans: what vLLM draws where nothing else is left.

    Methods that say what was banned do so on purpose.
    """
    params = request.sampling_params
    if params is None or (params.allowed_token_ids is None and not params.bad_words_token_ids):
        return False
    if params.allowed_token_ids is not None and token not in _allowed(request, params.allowed_token_ids):
        return not _revives(request)
    words, said = params.bad_words_token_ids or (), request.output_token_ids
    return any(list(said[-len(word) :]) == word for word in words) and not _revives(request)


def _allowed(request: Request, ids: Iterable[int]) -> frozenset[int]:
    """The same as a set that is made once; a list may be as long as the vocabulary."""
    if not hasattr(request, "whipstaff_allowed"):
        request.whipstaff_allowed = frozenset(ids)
    found: frozenset[int] = request.whipstaff_allowed
    return found


def _revives(request: Request) -> bool:
    plan = _plan_of(request)
    rewrites = plan.decoding.rewrites if plan is not None and plan.decoding is not None else ()
    return any(isinstance(method := METHODS[one.method], LogitsRewriter) and method.revives for one in rewrites)


def key_blocks(request: Request, placed: PositionedPlan, block_size: int) -> None:
    """Give `request`'s KV blocks keys that hold its plan, from the first position on whose KV the plan changes."""
    hasher: Hasher | None = request._block_hasher
    if hasher is None:  # prefix caching is off
        return
    first = 0 if placed.auxiliaries else placed.first_edited
    if first is None:
        return
    digest, generated = _digest(placed), b""
    if placed.plan.steering is not None and placed.plan.steering.counts_from_prompt_end:
        generated = str(placed.prompt_len).encode()

    plain: list[bytes] = []  # keys without the plan: each is made of the one before, however many come at once

    def keyed(request: Request) -> list[bytes]:
        ends = range(block_size * (len(plain) + 1), 1 << 62, block_size)
        mine, request.block_hashes = request.block_hashes, plain
        found = hasher(request)
        request.block_hashes = mine
        plain.extend(found)
        return [
            hashlib.sha256(key + digest + (generated if end > placed.prompt_len else b"")).digest()
            if end > first
            else key
            for key, end in zip(found, ends, strict=False)
        ]

    request._block_hasher = keyed
    request.block_hashes = []
    request.update_block_hashes()


def _plan_of(request: Request) -> RequestPlan | None:
    return RequestPlan.from_wire(request.sampling_params.extra_args if request.sampling_params else None)


def _digest(placed: PositionedPlan) -> bytes:
    """Of everything in the plan that changes KV: where which edits are, and which auxiliary models run."""
    steering = placed.plan.steering
    said: list[object] = [placed.edited, placed.auxiliaries]
    if steering is not None:
        said += [sorted(steering.token_ids), steering.schedules, steering.inserts]
        if steering.entropy_column >= 0:  # edits follow the distributions that tokens were drawn from
            said += [placed.plan.decoding, placed.plan.companions]
    return hashlib.sha256(repr(said).encode()).digest()
