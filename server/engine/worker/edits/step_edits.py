"""What happens to the activations of a step's tokens, and of tokens that are tried: by programs, by edits of modules,
by learned rows."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from torch import Tensor

from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.edits.captures import Captures
from whipstaff.server.engine.worker.edits.forms import Forms
from whipstaff.server.engine.worker.edits.histories import Histories
from whipstaff.server.engine.worker.edits.module_edits import ModuleEdits
from whipstaff.server.engine.worker.edits.sites import Sites
from whipstaff.server.engine.worker.edits.soft_prompts import NoSoftRows, SoftRows
from whipstaff.server.engine.worker.edits.token_table import EditedSpan, TokenTable
from whipstaff.server.engine.worker.requests import Requests
from whipstaff.server.plan import PositionedPlan
from whipstaff.steering.plan import ModuleEdit

TOKEN_TABLE = "token table"  # the part that most steps ask something of, and no other


class _Steady(NamedTuple):
    """Rows of one token each to whom the same happens for a while: what was said for them is said for the next step."""

    plans: Sequence[PositionedPlan | None]
    starts: Ints  # (B + 1,)
    first: Ints  # (B,) the positions from which on each row's token gets what it got,
    last: Ints  # (B,) and after which it does not

    @classmethod
    def of(cls, view: BatchView, spans: Sequence[EditedSpan]) -> "_Steady | None":
        """None where what happens to tokens follows from what only their step knows."""
        changes = any(span.placed.follows_positions or span.row is not span.row_at_tokens for span in spans)
        num = len(view.plans)
        if changes or not np.array_equal(view.starts, np.arange(num + 1)):
            return None
        first, last = np.zeros(num, np.int64), np.full(num, np.iinfo(np.int64).max)
        for row, placed in view.planned():
            position = int(view.positions[row])
            bounds = [bound for segment in placed.segments for bound in segment[:2] if bound is not None]
            first[row] = max((bound for bound in bounds if bound <= position), default=0)
            last[row] = min((bound for bound in bounds if bound > position), default=last[row]) - 1
        return cls(view.plans, np.array(view.starts), first, last)

    def holds(self, view: BatchView) -> bool:
        return (
            view.plans is self.plans
            and np.array_equal(view.starts, self.starts)
            and bool(((self.first <= view.positions) & (view.positions <= self.last)).all())
        )


class StepEdits:
    """Tells the parts that edit what a step's tokens get."""

    def __init__(
        self,
        requests: Requests,
        token_table: TokenTable,
        histories: Histories,
        sites: Sites,
        module_edits: ModuleEdits,
        soft_rows: SoftRows | NoSoftRows,
        captures: Captures,
        forms: Forms,
    ) -> None:
        self.token_table, self.histories, self.sites = token_table, histories, sites
        self.module_edits, self.soft_rows, self.captures, self.forms = module_edits, soft_rows, captures, forms
        self._requests = requests
        self._told: set[str] = set()  # the parts that the last step asked something of
        self._steady: _Steady | None = None

    def begin_step(self, view: BatchView, input_ids: Tensor | None) -> None:
        """Say what happens to the step's tokens."""
        if self._steady is not None and self._steady.holds(view):
            return
        spans = self._spans(view)
        if self._concerns("histories", any(placed.num_columns for _, placed in view.planned())):
            self.histories.begin_step(view, spans)
        self._write(view, spans, input_ids)
        self._steady = _Steady.of(view, spans) if self._told == {TOKEN_TABLE} else None

    def end_step(self) -> None:
        """After the forward pass: what follows until the next step is not a real step."""
        if "modules" in self._told:
            self.module_edits.end_step()

    @contextmanager
    def trying(self, view: BatchView, tokens: Tensor) -> Iterator[None]:
        """A forward pass beside the step's own, over a token for each row that may come next: it is steered as if it
        did, and nothing that was read or kept on the way stays.

        Args:
            view: the rows, each with its one token.
            tokens: (B,) ids.
        """
        self._steady, spans = None, self._spans(view)
        with self.histories.untouched(spans), self._streams_untouched(view):
            self._write(view, spans, tokens)
            try:
                yield
            finally:
                self.end_step()

    def _write(self, view: BatchView, spans: list[EditedSpan], input_ids: Tensor | None) -> None:
        if self._concerns(TOKEN_TABLE, bool(spans)):
            self.token_table.write(spans, view.num_tokens, input_ids, self.sites.tables)
        asking = [span for span in spans if any(isinstance(item, ModuleEdit) for item in span.row)]
        if self._concerns("modules", bool(asking)):
            self.module_edits.begin_step(asking, view.num_tokens)
        if self._concerns("soft rows", any(placed.inserts for _, placed in view.planned())):
            self.soft_rows.begin_step(view)
        self.forms.runs_plain = not self._told

    def _concerns(self, part: str, is_asked: bool) -> bool:
        """Whether a part has to hear of a step: something is asked of it, or was in the last, which has to go."""
        was_asked = part in self._told
        (self._told.add if is_asked else self._told.discard)(part)
        return is_asked or was_asked

    @contextmanager
    def _streams_untouched(self, view: BatchView) -> Iterator[None]:
        """The early layers' streams that the step kept, over which a pass of those rows writes."""
        plans = [placed.plan.steering for _, placed in view.planned()]
        layers = {layer for plan in plans if plan is not None for layer in plan.keeps}
        buffers = [self.sites.tables.kept(layer) for layer in sorted(layers)]
        before = [buffer[: view.num_tokens].clone() for buffer in buffers]
        try:
            yield
        finally:
            for buffer, kept in zip(buffers, before, strict=True):
                buffer[: len(kept)] = kept

    def _spans(self, view: BatchView) -> list[EditedSpan]:
        """In order of their tokens."""
        return [
            EditedSpan(*tokens, row, row_at_tokens, self._requests[view.requests[index]], placed)
            for index, placed in view.planned()
            for start, end, row, row_at_tokens in placed.segments
            if (tokens := view.tokens_at(index, start, end)) is not None
        ]
