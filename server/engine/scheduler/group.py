"""A group: a request, called its primary, and the companions that are made here and emit the same tokens."""

import hashlib
from collections.abc import Sequence

from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request, RequestStatus

from whipstaff.server.plan import PLAN_KEY, STEPS_AHEAD, CompanionPlan, RequestPlan

NOWHERE = -2  # the client index of companions: what vLLM would say of them goes to nobody
MEMBER_CONTEXT, KV_CACHE = "member_context", "kv_cache"  # stop reasons of groups that had to end before `max_tokens`


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
        for member in self.members:
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


def companions(primary: Request, plan: RequestPlan) -> list[Request]:
    """The requests of a plan's companions. They sample nothing themselves, so nothing about sampling is theirs."""
    return [_companion(primary, index, own, plan.plan_of(index)) for index, own in enumerate(plan.companions, 1)]


def _companion(primary: Request, index: int, own: CompanionPlan, plan: RequestPlan | None) -> Request:
    return Request(
        request_id=f"{primary.request_id}/{index}",
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
    said = [salt, primary.prompt_token_ids, {**(asked or {}), "readings_id": ""}]
    return hashlib.sha256(repr(said).encode()).hexdigest()
