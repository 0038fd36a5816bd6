"""What the scheduler tells the worker with each step, beside what vLLM's says: `StepNotes`, which vLLM's scheduler
output carries as `whipstaff_notes`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from whipstaff.server.engine.searches import SearchStep


class GroupUse(NamedTuple):
    """How groups are doing."""

    num_companions: int = 0  # running now
    num_steps_held: int = 0  # since the start, steps in which a group with running members did not advance together
    num_half_scheduled: int = 0  # since the start; anything but 0 is a bug, and stops the engine
    num_steps_together: int = 0  # since the start, steps that a group took as one
    num_preempted: int = 0  # since the start


class SlotUse(NamedTuple):
    """Slots taken by admitted requests, and requests that wait for some."""

    num_used: int = 0
    num_waiting: int = 0
    waits: Sequence[float] = ()  # seconds, of the requests that waited for slots and have them since the last step


class CacheUse(NamedTuple):
    """Tokens of prompts since the start, by whose they are: plain, steered or guided requests'."""

    queries: dict[str, int]  # looked for in the prefix cache
    hits: dict[str, int]  # and found


class SearchUse(NamedTuple):
    """How searches are doing. All but the first two since the start."""

    num_searches: int = 0  # running now
    num_living: int = 0  # sequences of theirs, likewise
    forks: int = 0  # sequences that began as another's continuation
    rollbacks: int = 0  # sequences that gave up tokens
    moved_seats: int = 0  # sequences whose tokens the worker had to be told anew
    copied_blocks: int = 0
    recomputed_tokens: int = 0  # that a sequence kept, and whose keys and values it could not take over
    computed: Mapping[str, int] = {}  # tokens after prompts, without those that were tried; by the request's label


class StepNotes(NamedTuple):
    """Of one step, and of those that follow until there are others."""

    groups: Mapping[str, Sequence[str | None]]
    """By the primary's id, the companions of each group that takes a common step, in order; None: was dropped."""
    slot_use: SlotUse  # for metrics, which ask the worker
    group_use: GroupUse
    cache_use: CacheUse
    searches: Mapping[str, SearchStep] = {}  # by the primary's id, of each search that takes a step
    seats: Mapping[str, str] = {}
    """Sequences of searches whose tokens are told anew, and the member of the primary's row that each is like: Model
    Runner V1 has no other way to hear of a request with tokens that it generated elsewhere."""
    search_use: SearchUse = SearchUse()
