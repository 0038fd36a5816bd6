"""Slot tables: the edits of the rows in use, in persistent buffers that the model's sites read.

A site reads `mul[slot[t]]` and `add[slot[t]]` for token t. Slots are a cache of rows: a row keeps its slot until
another row needs the place and no token of the current step uses it. Nothing is counted per request, so nothing can
leak; the scheduler admits no more distinct rows at once than there are slots.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from whipstaff.steering.artifacts import Site, Vector
from whipstaff.steering.edits import compose
from whipstaff.steering.plan import Row

NO_SLOT = -1


@dataclass(frozen=True)
class SiteSpec:
    """One place in one layer. `first` and `width` are this process's slice of the site (tensor parallelism)."""

    site: Site
    layer: int
    full_width: int
    first: int
    width: int


class SiteTable:
    """The two tables of one site, float32 (num_slots, width): written in place, never replaced."""

    def __init__(self, spec: SiteSpec, num_slots: int, device: torch.device) -> None:
        self.spec = spec
        self.mul = torch.ones(num_slots, spec.width, device=device)
        self.add = torch.zeros(num_slots, spec.width, device=device)

    def write(self, slot: int, edits: Sequence[tuple[Vector, float, tuple[int, ...] | None]]) -> None:
        """Make `slot` hold the composed edits; the identity where none touches this site."""
        spec = self.spec
        pair = compose(edits, spec.site, spec.layer, spec.full_width)
        if pair is None:
            self.mul[slot].fill_(1.0)
            self.add[slot].zero_()
            return
        mine = slice(spec.first, spec.first + spec.width)
        self.mul[slot].copy_(pair[0][mine])
        self.add[slot].copy_(pair[1][mine])


class SlotTables:
    """All tables of a model and the map from rows to slots."""

    def __init__(
        self, sites: Iterable[SiteSpec], num_slots: int, device: torch.device, vector_of: Callable[[str], Vector]
    ) -> None:
        self.tables = {(spec.site, spec.layer): SiteTable(spec, num_slots, device) for spec in sites}
        self.num_uploads = 0
        self._vector_of = vector_of
        self._slots: OrderedDict[Row, int] = OrderedDict()  # least recently used first
        self._free = list(range(num_slots))

    @property
    def num_used(self) -> int:
        return len(self._slots)

    def acquire(self, rows: Iterable[Row]) -> dict[Row, int]:
        """A slot for every row of one step, written where the row is new.

        Raises: RuntimeError when the step needs more rows than there are slots, which the scheduler must prevent.
        """
        wanted = dict.fromkeys(rows)
        for row in wanted:
            if row in self._slots:
                self._slots.move_to_end(row)
        return {row: self._slots[row] if row in self._slots else self._place(row, wanted) for row in wanted}

    def _place(self, row: Row, in_use: dict[Row, None]) -> int:
        slot = self._free.pop() if self._free else self._evict(in_use)
        edits = [(self._vector_of(edit.digest), edit.scale, edit.layers) for edit in row]
        for table in self.tables.values():
            table.write(slot, edits)
        self.num_uploads += 1
        self._slots[row] = slot
        return slot

    def _evict(self, in_use: dict[Row, None]) -> int:
        victim = next((row for row in self._slots if row not in in_use), None)
        if victim is None:
            raise RuntimeError("a step uses more steering rows than there are slots; the scheduler let too many in")
        return self._slots.pop(victim)
