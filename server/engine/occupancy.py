"""How full the scheduler is: it tells the worker with each step, which is asked for it."""

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
