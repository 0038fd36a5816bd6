"""Edits that are no programs: of the expert router and of attention. Each is there where this server installed it.

A row of a request's edits names them as `ModuleEdit`; which tokens get which row is the step's business. Here a row
becomes a slot of the router's tables, and objects that the attention layers obey.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from whipstaff.server.engine.worker.edits.attention import AttentionEdits, AttentionSpan, LayerEdit
from whipstaff.server.engine.worker.edits.routing import RoutingTables, install_routing, routing_of
from whipstaff.server.engine.worker.edits.token_table import EditedSpan
from whipstaff.steering.kinds.attention import ATTENTION
from whipstaff.steering.kinds.kind import Kind
from whipstaff.steering.kinds.router import ROUTER
from whipstaff.steering.plan import EditSet, ModuleEdit
from whipstaff.steering.served import ModuleAbilities
from whipstaff.steering.vector_file import Vector

NO_SLOT = -1
MAX_HELD = 256  # attention edits kept between steps


class ModuleEdits:
    """What one worker's model obeys beside programs."""

    def __init__(
        self,
        model: nn.Module,
        max_tokens: int,
        device: torch.device,
        vector_of: Callable[[str], Vector],
        num_slots: int,
        edits_router: bool,
        edits_attention: bool,
    ) -> None:
        """Raises: UnsupportedEngine where the model cannot be edited so."""
        self.slots = torch.full((max_tokens,), NO_SLOT, dtype=torch.int32, device=device)
        self.routing = install_routing(model, self.slots, num_slots) if edits_router else None
        self.attention = AttentionEdits(model) if edits_attention else None
        self._vector_of = vector_of
        self._routes = _Routes(self.routing, num_slots, vector_of) if self.routing else None
        self._made: OrderedDict[tuple[ModuleEdit, int], tuple[LayerEdit, ...]] = OrderedDict()
        self._host = np.full(max_tokens, NO_SLOT, dtype=np.int32)
        self._dirty = 0

    @property
    def abilities(self) -> ModuleAbilities:
        """What the model obeys."""
        routing = {layer: self.routing.scheme(layer) for layer in self.routing.layers} if self.routing else {}
        return ModuleAbilities(None if self.attention is None else self.attention.abilities, routing)

    def facts(self) -> dict[str, Any]:
        """The same as plain data, for admission."""
        return self.abilities.to_wire()

    def forget(self, digest: str) -> None:
        """Drop what was made of a vector."""
        for key in [key for key in self._made if key[0].digest == digest]:
            del self._made[key]
        if self._routes is not None:
            self._routes.forget(digest)

    def begin_step(self, spans: Sequence[EditedSpan], num_tokens: int) -> None:
        """Say what the step's tokens ask for: `spans` are those with edits of modules."""
        if self.attention is not None:
            self.attention.begin_step(one for span in spans for one in self._attention_spans(span))
        if self._routes is not None and (spans or self._dirty):
            self._write_slots(spans, num_tokens)

    def end_step(self) -> None:
        if self.attention is not None:
            self.attention.end_step()

    def _write_slots(self, spans: Sequence[EditedSpan], num_tokens: int) -> None:
        assert self._routes is not None
        num = max(num_tokens, self._dirty)
        self._host[:num] = NO_SLOT
        routes = {span.row: self._routes_in(span.row) for span in spans}
        slots = self._routes.acquire([route for route in routes.values() if route])
        for span in spans:
            self._host[span.first : span.last] = slots.get(routes[span.row], NO_SLOT)
        self.slots[:num].copy_(torch.from_numpy(self._host[:num]), non_blocking=True)
        self._dirty = num_tokens if slots else 0

    def _routes_in(self, row: EditSet) -> tuple[ModuleEdit, ...]:
        return tuple(self._of_kind(ROUTER, row))

    def _of_kind(self, kind: Kind, row: EditSet) -> Iterator[ModuleEdit]:
        """The edits of a row that one kind serves."""
        for item in row:
            if isinstance(item, ModuleEdit) and self._vector_of(item.digest).method.kind is kind:
                yield item

    def _attention_spans(self, span: EditedSpan) -> Iterator[AttentionSpan]:
        for item in self._of_kind(ATTENTION, span.row):
            for edit in self._attention_edits(item, span.placed.prompt_len):
                yield AttentionSpan(span.batch_row, span.first, span.last, span.position, edit)

    def _attention_edits(self, item: ModuleEdit, prompt_len: int) -> tuple[LayerEdit, ...]:
        """What an edit comes to for prompts of one length; learned rows are the same for all."""
        assert self.attention is not None
        vector = self._vector_of(item.digest)
        key = item, prompt_len if ATTENTION.is_relative(vector) else 0
        if key not in self._made:
            if len(self._made) == MAX_HELD:
                self._made.popitem(last=False)
            self._made[key] = tuple(map(self.attention.made, ATTENTION.edits(vector, item, prompt_len)))
        self._made.move_to_end(key)
        return self._made[key]


class _Routes:
    """Slots of the router's tables by what they hold; least recently used first."""

    def __init__(
        self,
        tables: RoutingTables,
        num_slots: int,
        vector_of: Callable[[str], Vector],
    ) -> None:
        self._tables, self._vector_of = tables, vector_of
        self._slots: OrderedDict[tuple[ModuleEdit, ...], int] = OrderedDict()
        self._free = list(range(num_slots))

    def acquire(self, routes: Iterable[tuple[ModuleEdit, ...]]) -> dict[tuple[ModuleEdit, ...], int]:
        """A slot for each; the scheduler admits no more rows at once than there are."""
        wanted = dict.fromkeys(routes)
        for route in wanted:
            if route in self._slots:
                self._slots.move_to_end(route)
        for route in wanted:
            if route not in self._slots:
                slot = self._free.pop() if self._free else self._evict(wanted)
                self._tables.write(slot, routing_of(route, self._vector_of))
                self._slots[route] = slot
        return {route: self._slots[route] for route in wanted}

    def forget(self, digest: str) -> None:
        """Free the slots that name a vector."""
        for route in [route for route in self._slots if any(item.digest == digest for item in route)]:
            self._free.append(self._slots.pop(route))

    def _evict(self, in_use: dict[tuple[ModuleEdit, ...], None]) -> int:
        return self._slots.pop(next(route for route in self._slots if route not in in_use))
