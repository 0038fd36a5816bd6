"""BatchView: who is in one engine step and where their tokens stand. Plain data, the same from both model runners."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from whipstaff.server.engine.request import PlacedPlan

Ints = npt.NDArray[np.integer]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class BatchView:
    """One step's rows. Row r owns tokens starts[r] to starts[r + 1] of the step, at positions[r] onwards.

    Positions are absolute in the request (0 is the first prompt token), so a token recomputed after a preemption has
    the position it had before.
    """

    plans: Sequence[PlacedPlan | None]  # (B,) what each row asks for; None = plain
    starts: Ints  # (B + 1,) first token of each row within the step
    positions: Ints  # (B,) absolute position of each row's first token
    requests: Sequence[str] = ()  # (B,) whose row it is
    draws: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))  # (B,) whether its next token is drawn
    members: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # row -> rows of its coupled sequences

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    def planned(self) -> Iterator[tuple[int, PlacedPlan]]:
        """The rows that ask for something."""
        return ((row, plan) for row, plan in enumerate(self.plans) if plan is not None)

    def token_positions(self) -> npt.NDArray[np.int64]:
        """(T,) the absolute position of every token, for tests and debugging."""
        lengths = np.diff(self.starts)
        offsets = np.arange(self.num_tokens) - np.repeat(self.starts[:-1], lengths)
        positions: npt.NDArray[np.int64] = np.repeat(self.positions, lengths) + offsets
        return positions


NOBODY = BatchView((), np.zeros(1, np.int32), np.zeros(0, np.int32))  # a step in which every row is plain
