"""Explanations: what a request's decoding did to each of its tokens, from the draw to the response.

Worker: a `Snapshot` keeps the rows that were decoded, and once the tokens are drawn becomes numbers on the device that
travel with the step's output. Scheduler: `relay` moves each request's part into its own output. Front end: `listen`
hands it to the request before vLLM turns the output into text. Steps in which nobody asks do nothing of it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whipstaff.cuda_ext import explain_rows

MAIN, FINAL, UNSTEERED, DRAWN = "base", "final", "unsteered", "drawn"
IMPOSSIBLE = -9999.0  # how vLLM says the log-probability of what cannot be drawn: JSON has no infinities

UNJUDGED = -1.0  # no probability


class Seen(NamedTuple):
    """How one distribution sees the tokens of some rows."""

    rank: Tensor  # (n,) of the token that was drawn, 1 is the best
    log_probability: Tensor  # (n,) of it
    best: Tensor  # (n, k) the likeliest tokens
    best_log_probabilities: Tensor  # (n, k)

    @staticmethod
    def of(logits: Tensor, tokens: Tensor, num: int) -> "Seen":
        """logits (n, V), tokens (n,) int64."""
        log_p = logits.to(torch.float32).log_softmax(1)
        drawn = log_p.gather(1, tokens[:, None])
        values, best = log_p.topk(min(num, log_p.shape[1]))
        return Seen((log_p > drawn).sum(1) + 1, drawn[:, 0], best, values)

    def to_json(self, row: int, num: int) -> dict[str, Any]:
        best = zip(self.best[row, :num].tolist(), self.best_log_probabilities[row, :num].tolist(), strict=True)
        return {
            "rank": int(self.rank[row]),
            "logprob": max(float(self.log_probability[row]), IMPOSSIBLE),
            "top": [{"id": token, "logprob": value} for token, value in best if value > IMPOSSIBLE],
        }

    def on_host(self) -> "Seen":
        return Seen(*(tensor.cpu() for tensor in self))


class ExplainedToken(NamedTuple):
    """One token that will be explained."""

    request_id: str
    row: int  # of the step's logits
    num: int  # likeliest tokens to say
    unsteered: int | None = None  # the row that says what the model thinks without the request's steering
    is_drawn: bool = False  # whether what the token is drawn from is said, too


class Snapshot:
    """The rows of a step that will be explained, before and after decoding."""

    def __init__(self, rows: Sequence[ExplainedToken], base: Tensor) -> None:
        self._rows, self._index = rows, torch.tensor([row.row for row in rows], device=base.device)
        self._base = self._final = base[self._index]
        self._streams: list[tuple[int, str, Tensor]] = []  # which of our rows, the stream's name, its logits
        self._facts: list[tuple[int, str, Tensor]] = []
        self._judged: list[
            tuple[int, str, Tensor, Tensor]
        ] = []  # which of our rows, a name, tokens, what each is worth
        self._at = {row.row: index for index, row in enumerate(rows)}
        self._unsteered = [(index, row.unsteered) for index, row in enumerate(rows) if row.unsteered is not None]
        self._plain = base[[row for _, row in self._unsteered]]
        self._drawn = [index for index, row in enumerate(rows) if row.is_drawn]
        self._left = self._base[:0]  # what those are drawn from

    def note_final(self, final: Tensor) -> None:
        """(B, V) what became of the rows."""
        self._final = final[self._index]

    def note_drawn(self, drawn: Tensor) -> None:
        """(B, V) what the rows are drawn from."""
        if self._drawn:
            self._left = drawn[self._index[self._drawn]]

    def note_stream(self, row: int, name: str, logits: Tensor) -> None:
        """A further stream (V',) of one row's mix or method."""
        if row in self._at:
            self._streams.append((self._at[row], name, logits[: self._final.shape[1]]))

    def note_early(self, rows: Sequence[int], layers: Sequence[Sequence[int]], early: Tensor) -> None:
        """The early layers that a method read of its rows: (P, V) row after row, of which only ours are kept."""
        pairs = [(row, layer) for row, own in zip(rows, layers, strict=True) for layer in own]
        for (row, layer), logits in zip(pairs, early, strict=True):
            if row in self._at:
                self.note_stream(row, f"layer {layer}", logits.clone())

    def note_facts(self, rows: Sequence[int], facts: Mapping[str, Tensor]) -> None:
        """What a method said of its rows: (len(rows),) or (len(rows), ...) each."""
        for name, values in facts.items():
            self._facts += [(self._at[row], name, values[n]) for n, row in enumerate(rows) if row in self._at]

    def note_judged(self, rows: Sequence[int], judged: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """What a method found some tokens of its rows to be worth: (len(rows), n) ids, (len(rows), n) probabilities."""
        for name, (tokens, values) in judged.items():
            mine = [(n, self._at[row]) for n, row in enumerate(rows) if row in self._at]
            self._judged += [(index, name, tokens[n], values[n]) for n, index in mine]

    def drawn(self, sampled: Tensor) -> "Explanations":
        """What can be said once the tokens (B,) are known; still on the device."""
        tokens, most = sampled[self._index].long(), max(row.num for row in self._rows)
        own = [index for index, _ in self._unsteered]
        some = [SomeSeen(DRAWN, self._drawn, Seen.of(self._left, tokens[self._drawn], most))] if self._drawn else []
        if own:
            divergence = explain_rows(self._final[own], self._plain).divergence
            some.append(SomeSeen(UNSTEERED, own, Seen.of(self._plain, tokens[own], most), divergence))
        return Explanations(
            self._rows,
            tokens,
            explain_rows(self._final, self._base).divergence,
            {FINAL: Seen.of(self._final, tokens, most), MAIN: Seen.of(self._base, tokens, most)},
            some,
            [
                (index, name, Seen.of(logits[None], tokens[index : index + 1].clamp(max=len(logits) - 1), most))
                for index, name, logits in self._streams
            ],
            self._facts,
            [
                (index, name, torch.where(own == tokens[index], values, UNJUDGED).amax())
                for index, name, own, values in self._judged
            ],
        )


class SomeSeen(NamedTuple):
    """A distribution that some of the rows have, and how it sees their tokens."""

    name: str
    rows: list[int]  # which of ours
    seen: Seen
    divergence: Tensor | None = None  # KL(final || it) in nats, where it is said

    def to_json(self, rows: Sequence[ExplainedToken]) -> list[dict[str, Any]]:
        """Of each of its rows. Waits for the device."""
        seen = self.seen.on_host()
        told = [seen.to_json(number, rows[index].num) for number, index in enumerate(self.rows)]
        if self.divergence is not None:
            told = [{**one, "kl": kl} for one, kl in zip(told, self.divergence.tolist(), strict=True)]
        return [{self.name: one} for one in told]


class Explanations(NamedTuple):
    """Of one step."""

    rows: Sequence[ExplainedToken]
    tokens: Tensor  # (n,)
    divergence: Tensor  # (n,) KL(final || base) in nats
    seen: dict[str, Seen]
    some: list[SomeSeen]
    streams: list[tuple[int, str, Seen]]
    facts: list[tuple[int, str, Tensor]]
    judged: list[tuple[int, str, Tensor]]  # UNJUDGED where the token is none of those that were

    def to_json(self) -> dict[str, dict[str, Any]]:
        """By request. Waits for the device."""
        tokens, divergence = self.tokens.tolist(), self.divergence.tolist()
        seen = {name: one.on_host() for name, one in self.seen.items()}
        found: list[dict[str, Any]] = [
            {
                "id": tokens[index],
                "kl": divergence[index],
                **{name: one.to_json(index, row.num) for name, one in seen.items()},
                "streams": {},
                "facts": {},
            }
            for index, row in enumerate(self.rows)
        ]
        for rows, told in ((one.rows, one.to_json(self.rows)) for one in self.some):
            for index, said in zip(rows, told, strict=True):
                found[index] |= said
        for index, name, one in self.streams:
            found[index]["streams"][name] = one.on_host().to_json(0, self.rows[index].num)
        for index, name, value in self.facts:
            found[index]["facts"][name] = value.tolist()
        for index, name, value in self.judged:
            if (worth := float(value)) != UNJUDGED:
                found[index]["facts"][name] = worth
        return {row.request_id: told for row, told in zip(self.rows, found, strict=True)}
