"""BatchView: who is in one engine step and where their tokens stand. Plain data, the same from both model runners."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from whipstaff.server.plan import PositionedPlan

Ints = npt.NDArray[np.integer]
Flags = npt.NDArray[np.bool_]
ABSENT = -1  # the row of a companion that takes no part any more


class TokenSpan(NamedTuple):
    """Some of one row's tokens: [first, last) of the step."""

    batch_row: int
    first: int
    last: int
    position: int  # of the first, absolute


@dataclass(frozen=True)
class BatchView:
    """One step's rows. Row r owns tokens starts[r] to starts[r + 1] of the step, at positions[r] onwards.

    Positions are absolute in the request (0 is the first prompt token), so a token recomputed after a preemption has
    the position it had before.
    """

    plans: Sequence[PositionedPlan | None]  # (B,) what each row asks for; None = plain
    starts: Ints  # (B + 1,) first token of each row within the step
    positions: Ints  # (B,) absolute position of each row's first token
    requests: Sequence[str] = ()  # (B,) whose row it is
    draws: Flags = field(default_factory=lambda: np.zeros(0, np.bool_))  # (B,) whether its next token is drawn
    companions: Mapping[int, tuple[int, ...]] = field(
        default_factory=dict
    )  # row that is drawn for -> its companions' rows
    companion_rows: Sequence[tuple[int, int]] = ()  # (a companion's row, the row whose token it is given)
    num_drafts: Ints | None = None  # (B,) how many of each row's tokens, its last, are drafts; None: nobody's are

    def in_groups(self, groups: Mapping[str, Sequence[str | None]]) -> "BatchView":
        """With the rows of coupled sequences.

        Args:
            groups: by a primary's id, its companions' ids in order, None for those that were dropped.

        Raises: RuntimeError where a token would be drawn without a companion that it needs.
        """
        coupled = [(row, placed) for row, placed in self.planned() if placed.plan.companions and self.draws[row]]
        if not coupled:
            return self
        row_of = {name: row for row, name in enumerate(self.requests)}
        companions, companion_rows = {}, []
        for row, placed in coupled:
            names = groups.get(self.requests[row], [None] * len(placed.plan.companions))
            rows = [ABSENT if name is None else row_of.get(name, ABSENT) for name in names]
            companion_rows += [(other, row) for other in rows if other != ABSENT]
            companions[row] = self._taking_part(row, placed, rows)
        return replace(self, companions=companions, companion_rows=companion_rows)

    def _taking_part(self, row: int, placed: PositionedPlan, rows: Sequence[int]) -> tuple[int, ...]:
        """Companions leave when tokens have been delivered, which may be some steps after they were needed."""
        num_generated = int(self.positions[row] + self.starts[row + 1] - self.starts[row]) - placed.prompt_len
        taking = [
            other if until is None or num_generated < until else None
            for until, other in zip(placed.plan.untils, rows, strict=True)
        ]
        if ABSENT in taking:
            raise RuntimeError(f"{self.requests[row]} would get token {num_generated} without all of its sequences")
        return tuple(ABSENT if other is None else other for other in taking)

    @property
    def drawn_logits(self) -> Ints | None:
        """(B,) which of the step's logits come after each row's last token: before them stand those that verify its
        drafts. None where there are no others."""
        return None if self.num_drafts is None else np.cumsum(self.num_drafts + 1) - 1

    @property
    def num_tokens(self) -> int:
        return int(self.starts[-1])

    def planned(self) -> Iterator[tuple[int, PositionedPlan]]:
        """The rows that ask for something."""
        return ((row, plan) for row, plan in enumerate(self.plans) if plan is not None)

    def tokens_at(self, row: int, start: int, end: int | None) -> TokenSpan | None:
        """The step's tokens of a row whose positions are in [start, end); None where there are none."""
        token, position = int(self.starts[row]), int(self.positions[row])
        after = position + int(self.starts[row + 1]) - token
        first, last = max(start, position), after if end is None else min(end, after)
        return TokenSpan(row, token + first - position, token + last - position, first) if first < last else None

    def token_positions(self) -> npt.NDArray[np.int64]:
        """(T,) the absolute position of every token, for tests and debugging."""
        lengths = np.diff(self.starts)
        offsets = np.arange(self.num_tokens) - np.repeat(self.starts[:-1], lengths)
        positions: npt.NDArray[np.int64] = np.repeat(self.positions, lengths) + offsets
        return positions


NOBODY = BatchView((), np.zeros(1, np.int32), np.zeros(0, np.int32))  # a step in which every row is plain
