"""What the scheduler tells the worker with each step, beside what vLLM's says: `StepNotes`, which vLLM's scheduler
output carries as `whipstaff_notes`."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class GroupUse(NamedTuple):
    """How groups are doing."""

    num_companions: int = 0  # running now
    num_steps_held: int = 0  # since the start, steps in which a group with running members did not advance together
    num_half_scheduled: int = 0  # since the start; anything but 0 is a bug, and stops the engine


class SlotUse(NamedTuple):
    """Slots taken by admitted requests, and requests that wait for some."""

    num_used: int = 0
    num_waiting: int = 0


class StepNotes(NamedTuple):
    """Of one step."""

    groups: Mapping[str, Sequence[str | None]]
    """By the primary's id, the companions of each group that takes a common step, in order; None: was dropped."""
    slot_use: SlotUse  # for metrics, which ask the worker
    group_use: GroupUse
