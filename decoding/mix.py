"""Mixing streams: one row of weights per row of logits, rows of different methods side by side, one kernel."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from whipstaff.cuda_ext import mix_logits_

_MOST_STREAMS = 8  # that one pass of the kernel takes; a batch may need more than that


class Stream(NamedTuple):
    """Where a row of logits comes from: a model, and which of the request's coupled sequences it reads."""

    model: str = ""  # an auxiliary model; "" is the served model
    companion: int = 0  # 0 is the request's own sequence

    @property
    def label(self) -> str:
        """As explanations call it: base, an auxiliary model's name, or either with a sequence's number."""
        return f"{self.model or 'base'}[{self.companion}]" if self.companion else self.model or "base"


MAIN = Stream()


class Term(NamedTuple):
    """One stream as it enters a mix: weight * f(logits / temperature), f the identity or log-softmax.

    It may say which tokens are plausible: those whose logit in it is at least log(alpha) + the best one, and above
    which there is a mass of at most top_p.
    """

    stream: Stream
    weight: float
    log_softmax: bool = False
    temperature: float = 1.0
    alpha: float = 0.0  # 0 is off
    top_p: float = 1.0  # 1 is off


class Window(NamedTuple):
    """When a mix holds, in generated tokens: from `start` to before `end`, fading towards it if `shape` says so."""

    start: int = 0
    end: int | None = None
    shape: Literal["constant", "linear", "cosine"] = "constant"

    def gain(self, num_generated: int) -> float:
        """How far to go from the main stream to the mix for the token after so many."""
        if num_generated < self.start or (self.end is not None and num_generated >= self.end):
            return 0.0
        if self.shape == "constant" or self.end is None:
            return 1.0
        share = (num_generated - self.start) / (self.end - self.start)
        return 1 - share if self.shape == "linear" else (1 + math.cos(math.pi * share)) / 2


ALWAYS = Window()


class Mix(NamedTuple):
    """New logits = sum of the terms, on the tokens that all of them find plausible; where there are none, on the main
    stream's best one.

    The first term is the main stream's own; the served model alone says what is plausible. With `is_probability`, which
    goes without that, the new logits are log(sum of weight * softmax(logits / temperature)).
    """

    terms: tuple[Term, ...]
    is_probability: bool = False
    window: Window = ALWAYS

    @staticmethod
    def of(weights: Mapping[str, float]) -> "Mix":
        """The served model's raw logits plus weighted ones of auxiliary models."""
        return Mix((Term(MAIN, 1.0), *(Term(Stream(name), weight) for name, weight in weights.items())))

    @property
    def models(self) -> list[str]:
        """The auxiliary models that must run, sorted."""
        return sorted({term.stream.model for term in self.terms if term.stream.model})

    @property
    def num_companions(self) -> int:
        """How many coupled sequences it reads beside the request's own."""
        return max(term.stream.companion for term in self.terms)

    @property
    def streams(self) -> list[Stream]:
        """What it reads beside the main stream."""
        return list(dict.fromkeys(term.stream for term in self.terms if term.stream != MAIN))

    @property
    def is_sum(self) -> bool:
        """Whether it only adds raw logits up: such mixes add up themselves."""
        return all(term[2:] == (False, 1.0, 0.0, 1.0) for term in self.terms) and self[1:] == (False, ALWAYS)

    @property
    def is_off(self) -> bool:
        """Whether it gives the main stream's raw logits back, whatever the others hold."""
        return self.is_sum and self.terms[0].weight == 1 and not any(term.weight for term in self.terms[1:])

    def at(self, num_generated: int) -> "Mix | None":
        """The mix for the token after so many; None where it does not hold."""
        gain = self.window.gain(num_generated)
        if gain == 1 or gain == 0:
            return self if gain else None
        main, *others = self.terms
        faded = [term._replace(weight=gain * term.weight) for term in others]
        return self._replace(terms=(main._replace(weight=1 + gain * (main.weight - 1)), *faded))

    def to_wire(self) -> list[Any]:
        return [[[*term.stream, *term[1:]] for term in self.terms], self.is_probability, list(self.window)]

    @staticmethod
    def from_wire(wire: Sequence[Any]) -> "Mix":
        terms, is_probability, window = wire
        made = tuple(Term(Stream(model, companion), *rest) for model, companion, *rest in terms)
        return Mix(made, is_probability, Window(*window))


def added(mixes: Sequence[Mix]) -> Mix | None:
    """Several sums as one, each with coupled sequences of its own, in order; None for none."""
    main, num_companions = 1.0, 0
    weights: dict[Stream, float] = {}
    for mix in mixes:
        main += mix.terms[0].weight - 1
        for term in mix.terms[1:]:
            model, companion = term.stream
            stream = Stream(model, companion + num_companions if companion else 0)
            weights[stream] = weights.get(stream, 0.0) + term.weight
        num_companions += mix.num_companions
    return Mix((Term(MAIN, main), *(Term(stream, weight) for stream, weight in weights.items()))) if mixes else None


class MixedRow(NamedTuple):
    """A row that is mixed: its mix, and which rows its sequences are, its own first."""

    row: int
    mix: Mix
    rows: Sequence[int]


class _Slot(NamedTuple):
    """One column of the kernel's tables: a model's logits, and per row the term that reads them."""

    model: str
    terms: dict[int, tuple[int, Term]]  # row -> the row that is read, and how


class MixedRows:
    """Rows of a batch to be mixed, with the kernel's tables. The same object mixes step after step, as long as the same
    rows are to be mixed in the same way."""

    def __init__(self, mixed: Iterable[MixedRow]) -> None:
        """No row that is mixed is a companion's."""
        asked = [one for one in mixed if not one.mix.is_off]
        self._averaged = [one for one in asked if one.mix.is_probability]
        self._concerned = [one for one in asked if not one.mix.is_probability]
        self._scored = [one.row for one in self._concerned if not one.mix.is_sum]
        self._slots = _slots(self._concerned)
        self._passes: list[tuple[list[_Slot], list[Tensor | None]]] = []
        self._fits: tuple[int, torch.device] | None = None  # the batch that the tables were made for

    def of(self, logits: Tensor, others: Mapping[str, Tensor]) -> Tensor:
        """New float32 logits: rows that are mixed are their mix, all others what they were.

        Args:
            logits: (R, V) the served model's, any floating dtype; -inf (a banned token) stays -inf.
            others: auxiliary model -> (R, V_k). Columns beyond V are cut; columns that some stream lacks, which is
                vocabulary padding and has no token, keep the served model's value where a mix is a sum, else -inf.
        """
        result = logits.to(torch.float32, copy=True)
        for one in self._averaged:
            result[one.row] = _averaged(one, logits, others)
        if not self._concerned:
            return result
        width = min([result.shape[-1], *(others[slot.model].shape[-1] for slot in self._slots if slot.model)])
        shared = result[:, :width]
        if width < result.shape[-1] and self._scored:
            result[self._scored, width:] = -torch.inf  # raw logits do not stand beside scores
        if self._fits != (fits := (len(result), result.device)):
            self._passes, self._fits = list(self._made(*fits)), fits
        for slots, tables in self._passes:
            rows, weights, *more = tables
            assert rows is not None and weights is not None
            mix_logits_(shared, [others[slot.model] if slot.model else shared for slot in slots], rows, weights, *more)
        return result

    def _made(self, num_rows: int, device: torch.device) -> Iterator[tuple[list[_Slot], list[Tensor | None]]]:
        """The passes of the kernel, each with its columns and its tables."""
        for first in range(1, max(len(self._slots), 2), _MOST_STREAMS - 1):
            more = self._slots[first : first + _MOST_STREAMS - 1]
            slots = [self._slots[0] if first == 1 else _so_far(more), *more]
            yield slots, _tables(slots, num_rows, device)


def mix_rows(logits: Tensor, others: Mapping[str, Tensor], mixed: Iterable[MixedRow]) -> Tensor:
    """`MixedRows(mixed).of(logits, others)`, for once."""
    return MixedRows(mixed).of(logits, others)


def _slots(concerned: Sequence[MixedRow]) -> list[_Slot]:
    """As few columns as hold every row's terms; the first holds the rows' own main stream."""
    slots = [_Slot("", {})]
    for row, mix, rows in concerned:
        for index, term in enumerate(mix.terms):
            model, companion = term.stream
            fits = (slot for slot in slots if slot.model == model and row not in slot.terms)
            slot = slots[0] if index == 0 else next(fits, None)
            if slot is None:
                slots.append(slot := _Slot(model, {}))
            slot.terms[row] = rows[companion], term
    return sorted(slots, key=lambda slot: bool(slot.model))  # masks are of the first pass, and look at the served model


def _averaged(one: MixedRow, logits: Tensor, others: Mapping[str, Tensor]) -> Tensor:
    """(V,) of one row: a mixture of distributions. Tokens that some stream lacks have no probability there."""
    total = torch.full_like(logits[one.row], -torch.inf, dtype=torch.float32)
    for (model, companion), weight, _, temperature, *_ in one.mix.terms:
        if weight:
            row = (others[model] if model else logits)[one.rows[companion], : len(total)].to(torch.float32)
            log_p = (row / temperature).log_softmax(-1) + math.log(weight)
            total[: len(row)] = torch.logaddexp(total[: len(row)], log_p)
    return total.masked_fill(logits[one.row] == -torch.inf, -torch.inf)


def _so_far(more: Sequence[_Slot]) -> _Slot:
    """What an earlier pass mixed, for the rows that `more` adds to."""
    return _Slot("", {row: (row, Term(MAIN, 1.0)) for slot in more for row in slot.terms})


def _tables(slots: Sequence[_Slot], num_rows: int, device: torch.device) -> list[Tensor | None]:
    """What `mix_logits_` takes after the streams; made on the host, then sent."""
    shape = num_rows, len(slots)
    rows, is_log = np.full(shape, -1, np.int32), np.zeros(shape, np.bool_)
    weights, alphas = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    temperatures, top_ps = np.ones(shape, np.float32), np.ones(shape, np.float32)
    for column, slot in enumerate(slots):
        for row, (source, term) in slot.terms.items():
            rows[row, column], weights[row, column] = source, term.weight
            temperatures[row, column], is_log[row, column] = term.temperature, term.log_softmax
            alphas[row, column], top_ps[row, column] = term.alpha, term.top_p
    tables = [
        rows,
        weights,
        temperatures if (temperatures != 1).any() else None,
        is_log if is_log.any() else None,
        alphas if (alphas > 0).any() else None,
        top_ps if (top_ps < 1).any() else None,
    ]
    return [None if table is None else torch.from_numpy(table).to(device, non_blocking=True) for table in tables]
