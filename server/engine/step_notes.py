"""What the scheduler tells the worker with each step, beside what vLLM's says."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


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


class StepNotes(NamedTuple):
    """Of one step."""

    groups: Mapping[str, Sequence[str | None]]
    """By the primary's id, the companions of each group that takes a common step, in order; None: was dropped."""
    slot_use: SlotUse  # for metrics, which ask the worker
    group_use: GroupUse
    cache_use: CacheUse


def attach_notes(output: Any, notes: StepNotes) -> None:
    """Let vLLM's scheduler output carry them."""
    output.whipstaff_notes = notes


def notes_of(output: Any) -> StepNotes | None:
    """None for warm-up, which comes from no scheduler of ours."""
    found: StepNotes | None = getattr(output, "whipstaff_notes", None)
    return found
