"""What methods read beside their logits: each gets what it declares in its `needs`, made for its rows of the step."""

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from whipstaff.decoding.method import Need, Ranker
from whipstaff.decoding.rows import Rows
from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.logits.early_exit import EarlyHead, EarlyStream
from whipstaff.server.engine.worker.logits.hidden_histories import HiddenHistories
from whipstaff.server.engine.worker.logits.last_attention import LastAttention
from whipstaff.server.engine.worker.logits.lookahead import Lookahead, NoLookahead
from whipstaff.server.engine.worker.logits.metadata import DecodingMetadata, MethodCall, sent
from whipstaff.server.engine.worker.logits.request_tables import RequestTables

Heads = Callable[[str], Mapping[str, Tensor]]  # of a digest: part -> tensor


class DecodingStep(NamedTuple):
    """The active rows of one step, and what their methods may read."""

    metadata: DecodingMetadata
    view: BatchView
    ends: Ints  # (n,) of each active row, the number in the step of the token that it follows from
    positions: Ints  # (n,) absolute, of that token
    others: Mapping[str, Tensor]  # auxiliary model -> (B, V_k) its logits
    hidden: Tensor  # (B, H) the served model's last hidden states

    @property
    def num_generated(self) -> Ints:
        """(n,) tokens generated before the one that follows."""
        found: Ints = (self.positions + 1 - self.metadata.num_prompt).clip(0)
        return found


class MethodInputs:
    """Of one worker."""

    def __init__(
        self,
        tables: RequestTables,
        heads: Heads,
        early: EarlyHead,
        lookahead: Lookahead | NoLookahead,
        attention: LastAttention | None,
        histories: HiddenHistories | None,
    ) -> None:
        """`heads` finds the tensors of a learned head."""
        self._tables, self._heads, self._early, self._lookahead = tables, heads, early, lookahead
        self._attention, self._histories = attention, histories

    def of(self, call: MethodCall, logits: Tensor, step: DecodingStep) -> Rows:
        """The rows of a call.

        Args:
            logits: (B, V) as they are when its turn comes.
        """
        method = call.method
        given = Rows(
            taken(logits, call.rows),
            [request.num_prompt for _, request in call.active],
            step.num_generated[call.indices].tolist(),
            streams={
                name: step.others[model][call.rows, : logits.shape[1]]
                for name, model in zip(method.stream_fields, call.streams, strict=not isinstance(method, Ranker))
            },
            heads={
                name: self._heads(digest)
                for name, digest in zip(method.head_fields, call.heads, strict=not isinstance(method, Ranker))
            },
            is_prompt=step.metadata.is_prompt,
        )
        for need in method.needs:
            _GIVE[need](self, given, call, step)
        if method.state_size:
            given.state = self._tables.state_of(call)
        return given

    def _give_tokens(self, given: Rows, call: MethodCall, step: DecodingStep) -> None:
        given.tokens = self._tables.tokens_of(call, step.positions[call.indices])

    def _give_hidden(self, given: Rows, call: MethodCall, step: DecodingStep) -> None:
        given.hidden = step.hidden[call.rows].to(torch.float32)

    def _give_random(self, given: Rows, call: MethodCall, step: DecodingStep) -> None:
        seeds = [request.seed for _, request in call.active]
        numbers = uniforms(seeds, step.positions[call.indices], call.method.name)
        given.random = sent(numbers, given.logits.device)

    def _give_temperature(self, given: Rows, call: MethodCall, step: DecodingStep) -> None:
        given.temperature = given.column(request.temperature for _, request in call.active)[:, 0]

    def _give_early(self, given: Rows, call: MethodCall, step: DecodingStep) -> None:
        given.early_layers = call.early
        rows = zip(step.ends[call.indices].tolist(), call.settings, call.early, strict=True)
        given.early_exit = self._early.logits(
            [
                EarlyStream(layer, token, call.method.takes_norm(setting))
                for token, setting, layers in rows
                for layer in layers
            ]
        )

    def _give_lookahead(self, given: Rows, call: MethodCall, step: DecodingStep) -> None:
        if given.is_prompt:
            return
        rows = [row for row, _ in call.active]
        tries = self._lookahead.after(step.view, rows, step.positions[call.indices])
        given.lookahead = tries and (lambda tokens: tries(tokens).hidden)

    def _give_attention(self, given: Rows, call: MethodCall, step: DecodingStep) -> None:
        if not given.is_prompt:
            assert self._attention is not None, "a server without --attention-rows refuses such requests"
            given.attention = self._attention.rows(step.view, [row for row, _ in call.active])

    def _give_history(self, given: Rows, call: MethodCall, step: DecodingStep) -> None:
        if not given.is_prompt:
            assert self._histories is not None, "a server without --hidden-states refuses such requests"
            slots = [request.history_slot for _, request in call.active]
            given.history = self._histories.of(slots, step.positions[call.indices] + 1)


_GIVE: dict[Need, Callable[[MethodInputs, Rows, MethodCall, DecodingStep], None]] = {
    "tokens": MethodInputs._give_tokens,
    "hidden": MethodInputs._give_hidden,
    "random": MethodInputs._give_random,
    "temperature": MethodInputs._give_temperature,
    "early_exit": MethodInputs._give_early,
    "lookahead": MethodInputs._give_lookahead,
    "attention": MethodInputs._give_attention,
    "history": MethodInputs._give_history,
}


def taken(logits: Tensor, rows: Tensor) -> Tensor:
    """Some rows, in order; all of them without a copy."""
    return logits if len(rows) == len(logits) else logits[rows]


def uniforms(
    seeds: Sequence[int], positions: Sequence[int] | Ints, method: str
) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(n,) in [0, 1): the same for the same seed, position and method, whatever else was drawn (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64) ^ np.uint64(zlib.crc32(method.encode()))
        z = z * np.uint64(0xD1342543DE82EF95) + np.array(positions, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)
