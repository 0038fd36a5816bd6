"""Slot tables: the edits of the rows in use, in persistent buffers that the model's sites read.

A site reads `mul[slot[t]]` and `add[slot[t]]` for token t. Slots are a cache of rows: a row keeps its slot until
another row needs the place and no token of the current step uses it. Nothing is counted per request, so nothing can
leak; the scheduler admits no more distinct rows at once than there are slots.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from whipstaff.steering.artifacts import Site, Vector
from whipstaff.steering.edits import Edit, compose
from whipstaff.steering.plan import Row

NO_SLOT = -1


class SiteSpec(NamedTuple):
    """One site in one layer. `first` and `width` are this process's slice of it (tensor parallelism)."""

    site: Site
    layer: int
    full_width: int
    first: int
    width: int


class SiteTables:
    """The tables of one site in all layers, float32 (layers, num_slots, width): written in place, never replaced."""

    def __init__(self, specs: Sequence[SiteSpec], num_slots: int, device: torch.device) -> None:
        """`specs` are alike but for their layer."""
        self._site, _, self._full_width, self._first, width = specs[0]
        self._layers = [spec.layer for spec in specs]
        self._mul = torch.ones(len(specs), num_slots, width, device=device)
        self._add = torch.zeros(len(specs), num_slots, width, device=device)
        self._mine = slice(self._first, self._first + width)
        self._written: set[int] = set()  # slots that may hold more than the identity

    def layer(self, row: int) -> tuple[Tensor, Tensor]:
        """(mul, add) of the row-th layer, each (num_slots, width), sharing memory."""
        return self._mul[row], self._add[row]

    def write(self, slot: int, edits: Sequence[Edit]) -> None:
        """Make `slot` hold the composed edits; the identity where none touches this site."""
        pair = compose(edits, self._site, self._layers, self._full_width)
        if pair is not None:
            self._mul[:, slot].copy_(pair[0][:, self._mine])
            self._add[:, slot].copy_(pair[1][:, self._mine])
            self._written.add(slot)
        elif slot in self._written:
            self._mul[:, slot] = 1.0
            self._add[:, slot] = 0.0
            self._written.remove(slot)


class SlotTables:
    """All tables of a model and the map from rows to slots."""

    def __init__(
        self, sites: Sequence[SiteSpec], num_slots: int, device: torch.device, vector_of: Callable[[str], Vector]
    ) -> None:
        self.places = [(spec.site, spec.layer) for spec in sites]
        alike: dict[tuple[Site, int, int, int], list[SiteSpec]] = {}
        for spec in sites:
            alike.setdefault((spec.site, spec.full_width, spec.first, spec.width), []).append(spec)
        self._tables = [SiteTables(specs, num_slots, device) for specs in alike.values()]
        self._at: dict[tuple[Site, int], tuple[Tensor, Tensor]] = {}
        for tables, specs in zip(self._tables, alike.values(), strict=True):
            self._at |= {(spec.site, spec.layer): tables.layer(row) for row, spec in enumerate(specs)}
        self.num_uploads = 0
        self._vector_of = vector_of
        self._slots: OrderedDict[Row, int] = OrderedDict()  # least recently used first
        self._free = list(range(num_slots))

    def at(self, site: Site, layer: int) -> tuple[Tensor, Tensor]:
        """(mul, add) that a site reads, each float32 (num_slots, width)."""
        return self._at[site, layer]

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
        for tables in self._tables:
            tables.write(slot, edits)
        self.num_uploads += 1
        self._slots[row] = slot
        return slot

    def _evict(self, in_use: dict[Row, None]) -> int:
        victim = next((row for row in self._slots if row not in in_use), None)
        if victim is None:
            raise RuntimeError("a step uses more steering rows than there are slots; the scheduler let too many in")
        return self._slots.pop(victim)
