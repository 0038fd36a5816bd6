"""Slots: how many rows of edits, and conditions, the requests that were let in may need at once."""

from collections import Counter
from collections.abc import Iterable, Sequence

from whipstaff.server.engine.layout import Layout
from whipstaff.server.plan import PositionedPlan
from whipstaff.steering.plan import EditSet, num_slots


class Slots:
    """What is taken of an engine's room. Rows that several sequences share are counted once."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._rows: Counter[EditSet] = Counter()  # how many sequences may need each row
        self.num_used = self._num_histories = 0

    def take(self, plans: Sequence[PositionedPlan]) -> bool:
        """Take what sequences need, if all of it is free."""
        rows = [row for placed in plans for row in placed.rows]
        slots = self.num_used + self._num_more(rows)
        histories = self._num_histories + sum(placed.num_columns for placed in plans)
        if slots > self._layout.num_slots or histories > self._layout.num_histories:
            return False
        self.num_used, self._num_histories = slots, histories
        self._rows.update(rows)
        return True

    def free(self, placed: PositionedPlan) -> None:
        """What one sequence took."""
        self._rows -= Counter(placed.rows)
        self.num_used -= self._num_more(placed.rows)
        self._num_histories -= placed.num_columns

    def _num_more(self, rows: Iterable[EditSet]) -> int:
        """Slots that rows take beside those in use."""
        num_layers = self._layout.shape.num_layers
        return sum(num_slots(row, num_layers) for row in set(rows) if row not in self._rows)
