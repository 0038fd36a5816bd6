"""The scheduler hook: steered KV blocks get keys of their own, and no more rows run at once than there are slots.

Prefix cache. A block's key must hold whatever changed the KV in it. An edit changes KV from its first position on, in
later layers there and everywhere after through attention; a request that needs auxiliary models must not take blocks
that were filled while those were skipped. So blocks from a request's first affected position on are keyed with a digest
of its plan, and blocks before it are shared with plain traffic.

Slots. Requests whose rows of edits, or whose conditions, would not fit beside those already admitted wait here, in
order.
"""

import hashlib
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request, RequestStatus

from whipstaff.server.engine.explain import relay
from whipstaff.server.engine.layout import Layout
from whipstaff.server.engine.request import PlacedPlan, RequestPlan
from whipstaff.steering.plan import Row, num_slots

Hasher = Callable[[Request], list[bytes]]


class SlotUse(NamedTuple):
    """Slots taken by admitted requests, and requests that wait for some."""

    num_used: int = 0
    num_waiting: int = 0


class SteeredScheduling:
    """Mixed into vLLM's schedulers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        vllm_config = kwargs.get("vllm_config") or args[0]
        self._layout = Layout.from_config(vllm_config.additional_config)
        self._rows_in_use: Counter[Row] = Counter()  # how many admitted requests may need each row
        self._slots_in_use = self._histories_in_use = 0
        self._placed: dict[str, PlacedPlan] = {}  # admitted and held requests with rows
        self._held: deque[Request] = deque()  # waiting for slots

    def add_request(self, request: Request) -> None:
        parameters = request.sampling_params
        plan = RequestPlan.from_wire(parameters.extra_args if parameters else None)
        if plan is None or request.request_id in self.requests:  # type: ignore[attr-defined]
            super().add_request(request)  # type: ignore[misc]
            return
        placed = PlacedPlan(plan, request.num_prompt_tokens)
        key_blocks(request, placed, self.hash_block_size)  # type: ignore[attr-defined]
        if plan.steering is not None and plan.steering.forgets_cached_steps:
            request.skip_reading_prefix_cache = True
        if not placed.rows:
            super().add_request(request)  # type: ignore[misc]
            return
        self._placed[request.request_id] = placed
        self._held.append(request)
        self._admit()

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        output.whipstaff_slots = SlotUse(self._slots_in_use, len(self._held))  # for metrics, by way of the worker
        return output

    def update_from_output(self, scheduler_output: Any, model_runner_output: Any) -> Any:
        outputs = super().update_from_output(scheduler_output, model_runner_output)  # type: ignore[misc]
        relay(model_runner_output, outputs)
        return outputs

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus) -> list[Request]:
        wanted = [request_ids] if isinstance(request_ids, str) else request_ids
        wanted = None if wanted is None else set(wanted)
        dropped = [request for request in self._held if wanted is None or request.request_id in wanted]
        for request in dropped:
            self._held.remove(request)
            del self._placed[request.request_id]
            request.status = finished_status
        finished: list[Request] = super().finish_requests(wanted, finished_status)  # type: ignore[misc]
        return [*dropped, *finished]

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()  # type: ignore[misc]
        return running, waiting + len(self._held)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        freed = super()._free_request(request, *args, **kwargs)  # type: ignore[misc]
        placed = self._placed.pop(request.request_id, None)
        if placed is not None:
            self._rows_in_use -= Counter(placed.rows)
            self._slots_in_use -= self._slots_of(placed)
            self._histories_in_use -= placed.num_columns
            self._admit()
        return freed

    def _slots_of(self, placed: PlacedPlan) -> int:
        """What a request's rows take beside those in use."""
        num_layers = self._layout.shape.num_layers
        return sum(num_slots(row, num_layers) for row in placed.rows if row not in self._rows_in_use)

    def _admit(self) -> None:
        """Hand held requests to vLLM, first come first served, while their rows fit."""
        while self._held:
            placed = self._placed[self._held[0].request_id]
            slots = self._slots_in_use + self._slots_of(placed)
            histories = self._histories_in_use + placed.num_columns
            if slots > self._layout.num_slots or histories > self._layout.num_histories:
                return
            self._slots_in_use, self._histories_in_use = slots, histories
            self._rows_in_use.update(placed.rows)
            super().add_request(self._held.popleft())  # type: ignore[misc]


class SteeredScheduler(SteeredScheduling, Scheduler):
    """For synchronous scheduling."""


class AsyncSteeredScheduler(SteeredScheduling, AsyncScheduler):
    """For asynchronous scheduling."""


def key_blocks(request: Request, placed: PlacedPlan, block_size: int) -> None:
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


def _digest(placed: PlacedPlan) -> bytes:
    """Of everything in the plan that changes KV: where which edits are, and which auxiliary models run."""
    steering = placed.plan.steering
    said: list[object] = [placed.edited, placed.auxiliaries]
    if steering is not None:
        said += [sorted(steering.token_ids), steering.schedules, steering.inserts]
        if steering.entropy_column >= 0:  # edits follow the distributions that tokens were drawn from
            said.append(placed.plan.decoding)
    return hashlib.sha256(repr(said).encode()).digest()
