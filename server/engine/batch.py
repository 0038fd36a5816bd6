"""BatchView: who is in one engine step and where their tokens stand. Plain data, the same from both model runners."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from whipstaff.server.engine.request import PlacedPlan

Ints = npt.NDArray[np.integer]
Flags = npt.NDArray[np.bool_]
ABSENT = -1  # the row of a member that takes no part any more


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
    members: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # by a primary's row that is to be sampled,
    # the rows of its plan's members: their logits are of the same token
    followers: Sequence[tuple[int, int]] = ()  # (row of a companion, row of the primary whose token it is given)

    def in_groups(self, groups: Mapping[str, Sequence[str | None]]) -> "BatchView":
        """With the rows of `groups`: by a primary's id, its companions' ids in member order, None for dropped ones."""
        if not groups:
            return self
        row_of = {name: row for row, name in enumerate(self.requests)}
        rows = {row_of[name]: tuple(row_of.get(n or "", ABSENT) for n in names) for name, names in groups.items()}
        followers = [(row, primary) for primary, others in rows.items() for row in others if row != ABSENT]
        members = {primary: self._taking_part(primary, others) for primary, others in rows.items()}
        return replace(self, members=members, followers=followers)

    def _taking_part(self, primary: int, rows: tuple[int, ...]) -> tuple[int, ...]:
        """Members are dropped once tokens have been delivered, which may be some steps after they were needed."""
        placed = self.plans[primary]
        assert placed is not None
        num_tokens = int(self.positions[primary] + self.starts[primary + 1] - self.starts[primary])
        num_generated = num_tokens - placed.prompt_len
        is_over = [member.until is not None and num_generated >= member.until for member in placed.plan.members]
        return tuple(ABSENT if over else row for row, over in zip(rows, is_over, strict=True))

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
