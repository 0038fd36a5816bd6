"""A group: a request, called its primary, and the further sequences that are made here.

Companions emit the same tokens. A search's sequences have seats: requests like the primary, with companions of their
own where it has some. What lives in which seat changes as the search decides.
"""

import hashlib
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from whipstaff.server.engine.searches import SearchStep, companion_id, seat_id
from whipstaff.server.plan import PLAN_KEY, STEPS_AHEAD, CompanionPlan, RequestPlan, configuration

NOWHERE = -2  # the client index of companions: what vLLM would say of them goes to nobody
MEMBER_CONTEXT, KV_CACHE = "member_context", "kv_cache"  # stop reasons of groups that had to end before `max_tokens`
MAX_TIME, MAX_COMPUTED_TOKENS = "max_time", "max_computed_tokens"  # of searches, likewise


class Group:
    """A primary and its companions."""

    def __init__(self, primary: Request, companions: Sequence[Request], plan: RequestPlan) -> None:
        self.primary = primary
        self.members = [primary, *companions]  # those who were not dropped
        self.names: tuple[str | None, ...] = tuple(companion.request_id for companion in companions)
        self._untils = {
            companion.request_id: until
            for companion, until in zip(companions, plan.untils, strict=True)
            if until is not None
        }
        self._max_tokens = primary.max_tokens  # what the request asked for
        self.limited_by = ""  # why it cannot have that many

    @property
    def sequences(self) -> Sequence[Request]:
        """All that end with the primary."""
        return self.members

    @property
    def num_seats(self) -> int:
        """How many sequences may run at once."""
        return len(self.members)

    @property
    def stepping(self) -> dict[str, tuple[str | None, ...]]:
        """What the worker is told when they take a step together: see `StepNotes.groups`."""
        return {self.primary.request_id: self.names}

    @property
    def awaits_decision(self) -> bool:
        """Whether nothing can be computed before the last step's output has come."""
        return False

    @property
    def num_running(self) -> int:
        return sum(member.status == RequestStatus.RUNNING for member in self.members)

    @property
    def is_half_admitted(self) -> bool:
        return 0 < self.num_running < len(self.members)

    def num_tokens_until(self, max_len: int) -> int:
        """How many tokens can be generated before one of the companions has `max_len`."""
        room = [max_len - companion.num_prompt_tokens for companion in self.members[1:]]
        untils = [self._untils.get(companion.request_id) for companion in self.members[1:]]
        lasting = [n for n, until in zip(room, untils, strict=True) if until is None or until + STEPS_AHEAD > n]
        return min(lasting, default=max_len)

    def limit(self, *limits: tuple[int, str]) -> None:
        """Let the group end after at most so many tokens as the least of (tokens, reason)."""
        num, self.limited_by = min([(self._max_tokens, ""), *limits])
        for member in self.sequences:
            member.max_tokens = num

    def drop_due(self) -> list[Request]:
        """Let go of the members whose time is over: as many tokens as they were there for have been delivered."""
        if not self._untils:
            return []
        due = {name for name, until in self._untils.items() if self.primary.num_output_tokens >= until}
        dropped = [member for member in self.members if member.request_id in due]
        if dropped:
            self.members = [member for member in self.members if member.request_id not in due]
            self.names = tuple(None if name in due else name for name in self.names)
            for name in due:
                del self._untils[name]
        return dropped


class SearchGroup(Group):
    """A request that searches. A row is a sequence and its companions; its first member's id names the seat."""

    def __init__(self, rows: Sequence[Sequence[Request]], plan: RequestPlan) -> None:
        """`rows`: all that may live at once; the primary's is the first, and lives alone until the search forks."""
        assert plan.decoding is not None and plan.decoding.search is not None
        self.rows = {row[0].request_id: list(row) for row in rows}
        self.living = [rows[0][0].request_id]  # seats, in the order of the last decision
        self.num_told = 0  # tokens that the client has
        self.room = 0  # the most tokens that a living sequence may have generated, for another to follow
        self.counts: Counter[str] = Counter()
        self.facts: list[dict[str, Any]] = []  # that its client is told with the next tokens
        self.num_tried = 0  # tokens
        self.ended_by = ""  # the budget that was used up
        self.tells_drafts = plan.decoding.search.tells_drafts
        self._plan, self._arrived, self.label = plan.decoding.search, time.monotonic(), plan.label
        super().__init__(rows[0][0], rows[0][1:], plan)
        self._untils = {}  # a companion that is not needed any more costs a seat that is kept anyway

    @property
    def sequences(self) -> Sequence[Request]:
        return [member for row in self.rows.values() for member in row]

    @property
    def num_seats(self) -> int:
        return len(self.rows) * len(self.rows[self.primary.request_id])

    @property
    def stepping(self) -> dict[str, tuple[str | None, ...]]:
        return {seat: tuple(one.request_id for one in self.rows[seat][1:]) for seat in self.living}

    @property
    def awaits_decision(self) -> bool:
        return any(member.num_in_flight_tokens for member in self.members)

    def take_step(self) -> SearchStep:
        """What the worker is told of a step in which all that live get their next token."""
        return SearchStep(
            tuple(self.living), tuple(self.rows), self.primary.max_tokens, self.room, bool(self._note_budgets())
        )

    def _note_budgets(self) -> str:
        """The budget that is used up once the step is taken, which ends the search; "": none. With its first step a
        search comes to answers that have a token."""
        if not self.rows[self.living[0]][0].num_output_tokens:
            return ""
        computed, plan = self.counts["tokens_computed"] + self.num_tried, self._plan
        if plan.max_computed_tokens is not None and computed >= plan.max_computed_tokens:
            self.ended_by = MAX_COMPUTED_TOKENS
        elif plan.max_time is not None and time.monotonic() - self._arrived >= plan.max_time:
            self.ended_by = MAX_TIME
        self.limited_by = self.ended_by or self.limited_by
        return self.ended_by

    def origin_of(self, name: str) -> str:
        """The member of the primary's row that stands where this one does in its own."""
        origins = self.rows[self.primary.request_id]
        found: str = next(
            origin.request_id
            for row in self.rows.values()
            for origin, member in zip(origins, row, strict=True)
            if member.request_id == name
        )
        return found

    def settle(self, living: Sequence[str]) -> tuple[list[Request], list[Request]]:
        """Let these seats live from now on. Who wakes, and who does not live any more."""
        before = self.members
        self.living = list(living)
        self.members = [member for seat in living for member in self.rows[seat]]
        return [one for one in self.members if one not in before], [one for one in before if one not in self.members]


def search_rows(primary: Request, own: Sequence[Request], plan: RequestPlan) -> list[list[Request]]:
    """The rows of a request that searches: its own with its companions, and those of its further seats."""
    assert plan.decoding is not None and plan.decoding.search is not None
    seats = [_seat(primary, index) for index in range(1, plan.decoding.search.num_sequences)]
    return [[primary, *own], *([seat, *companions(seat, plan)] for seat in seats)]


def _seat(primary: Request, index: int) -> Request:
    return Request(
        request_id=seat_id(primary.request_id, index),
        prompt_token_ids=list(primary.prompt_token_ids),
        sampling_params=primary.sampling_params,
        pooling_params=None,
        client_index=NOWHERE,
        arrival_time=primary.arrival_time,
        mm_features=list(primary.mm_features),
        lora_request=primary.lora_request,
        cache_salt=primary.cache_salt,
        priority=primary.priority,
        block_hasher=primary._block_hasher,
    )


def companions(primary: Request, plan: RequestPlan) -> list[Request]:
    """The requests of a plan's companions. They sample nothing themselves, so nothing about sampling is theirs."""
    return [_companion(primary, index, own, plan.plan_of(index)) for index, own in enumerate(plan.companions, 1)]


def _companion(primary: Request, index: int, own: CompanionPlan, plan: RequestPlan | None) -> Request:
    return Request(
        request_id=companion_id(primary.request_id, index),
        prompt_token_ids=list(own.prompt),
        sampling_params=SamplingParams(
            temperature=0,
            max_tokens=primary.max_tokens,
            ignore_eos=True,
            detokenize=False,
            extra_args={PLAN_KEY: plan.to_wire()} if plan else None,
        ),
        pooling_params=None,
        client_index=NOWHERE,
        arrival_time=primary.arrival_time,
        lora_request=LoRARequest(*own.adapter) if own.adapter else primary.lora_request,
        cache_salt=_salt(primary, own),
        priority=primary.priority,
        block_hasher=primary._block_hasher,
    )


def _salt(primary: Request, own: CompanionPlan) -> str | None:
    """Edits that follow the entropy of what tokens are drawn from depend on everything that the primary asks for."""
    salt: str | None = primary.cache_salt
    if own.steering is None or own.steering.entropy_column < 0:
        return salt
    asked = (primary.sampling_params.extra_args or {}).get(PLAN_KEY) if primary.sampling_params else None
    said = [salt, primary.prompt_token_ids, configuration(asked or {})]
    return hashlib.sha256(repr(said).encode()).hexdigest()
