"""Edits that are no programs: of the expert router and of attention. Each is there where this server installed it.

A row of a request's edits names them as `ModuleEdit`; which tokens get which row is the steerer's business. Here a row
becomes a slot of the router's tables, and objects that the attention layers obey.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from whipstaff.server.engine.worker.edits.attention import (
    AttentionEdit,
    AttentionEdits,
    RowOverride,
    ScoreBias,
    Stretch,
    outside,
)
from whipstaff.server.engine.worker.edits.routing import RoutingTables, install_routing, routing_of
from whipstaff.server.plan import PositionedPlan
from whipstaff.steering.methods.attention import AttentionOverride, OverrideParams, Pasta, PastaParams
from whipstaff.steering.methods.mote import MoTE
from whipstaff.steering.methods.side_attention import SideAttention
from whipstaff.steering.methods.virtual_tokens import PrefixKV
from whipstaff.steering.plan import EditSet, ModuleEdit
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import resolve_window

NO_SLOT = -1
MAX_HELD = 256  # attention edits kept between steps


class Asked(Protocol):
    """A stretch of the step's tokens [first, last) and the row of edits that it gets."""

    @property
    def batch_row(self) -> int: ...
    @property
    def first(self) -> int: ...
    @property
    def last(self) -> int: ...
    @property
    def position(self) -> int:
        """Of the first token, absolute."""

    @property
    def row(self) -> EditSet: ...
    @property
    def placed(self) -> PositionedPlan: ...


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
        self._made: OrderedDict[tuple[ModuleEdit, int], tuple[AttentionEdit, ...]] = OrderedDict()
        self._host = np.full(max_tokens, NO_SLOT, dtype=np.int32)
        self._dirty = 0

    def facts(self) -> dict[str, Any]:
        """Plain data for admission: what attention obeys, and how each layer's router selects."""
        routing = (
            {}
            if self.routing is None
            else {layer: asdict(replace(self.routing.scheme(layer), bias=None)) for layer in self.routing.layers}
        )
        return {"attention": None if self.attention is None else self.attention.facts(), "routing": routing}

    def forget(self, digest: str) -> None:
        """Drop what was made of a vector."""
        for key in [key for key in self._made if key[0].digest == digest]:
            del self._made[key]
        if self._routes is not None:
            self._routes.forget(digest)

    def begin_step(self, asked: Iterable[Asked], num_tokens: int) -> None:
        """Say what the step's tokens ask for."""
        found = [one for one in asked if any(isinstance(item, ModuleEdit) for item in one.row)]
        if self.attention is not None:
            self.attention.begin_step(stretch for one in found for stretch in self._stretches(one))
        if self._routes is not None and (found or self._dirty):
            self._write_slots(found, num_tokens)

    def end_step(self) -> None:
        if self.attention is not None:
            self.attention.end_step()

    def _write_slots(self, found: list[Asked], num_tokens: int) -> None:
        assert self._routes is not None
        num = max(num_tokens, self._dirty)
        self._host[:num] = NO_SLOT
        routes = {one.row: self._routes_in(one.row) for one in found}
        slots = self._routes.acquire([route for route in routes.values() if route])
        for one in found:
            self._host[one.first : one.last] = slots.get(routes[one.row], NO_SLOT)
        self.slots[:num].copy_(torch.from_numpy(self._host[:num]), non_blocking=True)
        self._dirty = num_tokens if slots else 0

    def _routes_in(self, row: EditSet) -> tuple[ModuleEdit, ...]:
        return tuple(
            item
            for item in row
            if isinstance(item, ModuleEdit) and isinstance(self._vector_of(item.digest).method, MoTE)
        )

    def _stretches(self, one: Asked) -> Iterator[Stretch]:
        for item in one.row:
            if isinstance(item, ModuleEdit):
                for edit in self._attention_edits(item, one.placed.prompt_len):
                    yield Stretch(one.batch_row, one.first, one.last, one.position, edit)

    def _attention_edits(self, special: ModuleEdit, prompt_len: int) -> tuple[AttentionEdit, ...]:
        """What a special comes to for prompts of one length; learned rows are the same for all."""
        is_relative = isinstance(self._vector_of(special.digest).method, AttentionOverride | Pasta)
        key = special, prompt_len if is_relative else 0
        if key not in self._made:
            if len(self._made) == MAX_HELD:
                self._made.popitem(last=False)
            self._made[key] = tuple(self._make(special, prompt_len))
        self._made.move_to_end(key)
        return self._made[key]

    def _make(self, special: ModuleEdit, prompt_len: int) -> Iterator[AttentionEdit]:
        assert self.attention is not None
        vector = self._vector_of(special.digest)
        params: Any = vector.method.params.model_validate_json(special.setting)
        layers = {place.layer: tensors for place, tensors in vector.tensors.items()}
        if isinstance(vector.method, AttentionOverride):
            yield from attention_rows(params, prompt_len)
        elif isinstance(vector.method, Pasta):
            yield from score_biases(params, prompt_len)
        elif isinstance(vector.method, SideAttention):
            made = self.attention.side_attention(
                {layer: tensors["tokens"] for layer, tensors in layers.items()},
                {layer: tensors["gate"] for layer, tensors in layers.items()},
            )
            yield made.scaled(params.scale)
        elif isinstance(vector.method, PrefixKV):
            yield self.attention.prefix_kv(
                {layer: (tensors["key"], tensors["value"]) for layer, tensors in layers.items()}
            )


def attention_rows(params: OverrideParams, prompt_len: int) -> Iterator[RowOverride]:
    """The heads' new attention, keys as absolute positions."""
    for edit in params.edits:
        keys = tuple(key + prompt_len if key < 0 else key for key in edit.keys)
        yield RowOverride(edit.layer, edit.head, keys, tuple(edit.weights or [1 / len(keys)] * len(keys)))


def score_biases(params: PastaParams, prompt_len: int) -> Iterator[ScoreBias]:
    """PASTA's additions to scores, one per span as in the release; they add up."""
    for start, end in params.spans:
        span = resolve_window(start, end, prompt_len)
        windows = outside(span, prompt_len) if params.scale_position == "exclude" else [span]
        amounts = tuple((first, last, float(np.log(params.alpha))) for first, last in windows)
        for layer, heads in params.heads.items():
            yield ScoreBias(layer, tuple(heads), amounts)


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
        for route in [route for route in self._slots if any(special.digest == digest for special in route)]:
            self._free.append(self._slots.pop(route))

    def _evict(self, in_use: dict[tuple[ModuleEdit, ...], None]) -> int:
        return self._slots.pop(next(route for route in self._slots if route not in in_use))
