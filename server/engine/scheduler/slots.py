"""Slots: how many rows of edits, conditions and kept hidden states the requests that were let in may need at once."""

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
        self.num_used = self._num_histories = self._num_hidden = 0

    def take(self, plans: Sequence[PositionedPlan]) -> bool:
        """Take what sequences need, if all of it is free."""
        rows = [row for placed in plans for row in placed.rows]
        slots = self.num_used + self._num_more(rows)
        histories = self._num_histories + sum(placed.num_columns for placed in plans)
        hidden = self._num_hidden + sum(placed.keeps_hidden for placed in plans)
        layout = self._layout
        if slots > layout.num_slots or histories > layout.num_histories or hidden > layout.num_hidden_states:
            return False
        self.num_used, self._num_histories, self._num_hidden = slots, histories, hidden
        self._rows.update(rows)
        return True

    def free(self, placed: PositionedPlan) -> None:
        """What one sequence took."""
        self._rows -= Counter(placed.rows)
        self.num_used -= self._num_more(placed.rows)
        self._num_histories -= placed.num_columns
        self._num_hidden -= placed.keeps_hidden

    def _num_more(self, rows: Iterable[EditSet]) -> int:
        """Slots that rows take beside those in use."""
        num_layers = self._layout.shape.num_layers
        return sum(num_slots(row, num_layers) for row in set(rows) if row not in self._rows)
