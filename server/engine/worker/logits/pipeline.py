"""The logits pipeline: it turns each step's logits into what the requests' decoding methods make of them.

Who calls what is in `worker/step.py`. Within a step the stages of `decoding/method.py` run in two parts: mix and rule
on what the model computes (`decode`), penalty, temperature and truncation around vLLM's own (`before_draw`).
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from whipstaff.decoding.method import LogitsRewriter, setting_type
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.mix import MixedRow, MixedRows
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.decoding.rows import Rows
from whipstaff.decoding.sampler import apply_temperature, apply_top_k_top_p_min_p
from whipstaff.server.engine.worker.batch import NOBODY, BatchView
from whipstaff.server.engine.worker.logits.early_exit import EarlyHead
from whipstaff.server.engine.worker.logits.explain import ExplainedToken, Explanations, Snapshot
from whipstaff.server.engine.worker.logits.hidden_histories import HiddenHistories
from whipstaff.server.engine.worker.logits.inputs import DecodingStep, Heads, MethodInputs, taken
from whipstaff.server.engine.worker.logits.last_attention import LastAttention
from whipstaff.server.engine.worker.logits.lookahead import Lookahead, NoLookahead
from whipstaff.server.engine.worker.logits.metadata import (
    ActiveRow,
    Biased,
    BoundMethod,
    DecodingMetadata,
    MethodCall,
    RequestState,
    Tempered,
    sent,
)
from whipstaff.server.engine.worker.logits.request_tables import RequestTables
from whipstaff.server.engine.worker.requests import Arrival, PlannedRequest, Requests
from whipstaff.server.engine.worker.search.searches import Searches

EARLY_ROOM = 1 << 26  # logits of early layers that may be there at once
LAST_RESORT = 1e4  # logits: beyond any temperature's reach


class LogitsPipeline:
    """Per-step state between a forward pass and the draw that follows it."""

    def __init__(
        self,
        requests: Requests,
        auxiliaries: Iterable[str],
        max_len: int,
        device: torch.device,
        heads: Heads,
        early: EarlyHead,
        lookahead: Lookahead | NoLookahead,
        searches: Searches,
        attention: LastAttention | None = None,
        histories: HiddenHistories | None = None,
    ) -> None:
        """
        Args:
            auxiliaries: the names of the auxiliary models that can run.
            max_len: tokens that a request can have.
            heads: finds the tensors of a learned head.
            attention: the last layer's, where it can be read.
            histories: where hidden states of all positions are kept.
        """
        self.attention, self.histories = attention, histories
        self.auxiliary_steps = Counter[str]()  # how often each auxiliary model ran
        self._requests, self._device, self._early, self._lookahead = requests, device, early, lookahead
        self._auxiliaries = tuple(auxiliaries)
        self._tables = RequestTables(max_len, device)
        self._inputs = MethodInputs(self._tables, heads, early, lookahead, attention, histories)
        self.searches = searches
        self._num_decoding = 0  # unfinished requests with a decoding plan
        self._view = NOBODY
        self._active: list[ActiveRow] = []  # the rows that become tokens in this step
        self._metadata: DecodingMetadata | None = None  # of these rows, or of those before
        self._step: DecodingStep | None = None
        self._mixed: list[MixedRow] = []  # what `_mixer` mixes
        self._mixer = MixedRows(())
        self._is_decoded = self._is_drawn = True
        self._noted: list[tuple[MethodCall, Rows]] = []
        self._snapshot: Snapshot | None = None
        self._explanations: Explanations | None = None
        self._undecoded: tuple[Tensor, Tensor] | None = None  # rows whose log-probabilities are the base's, and those
        self._decoded_before_scored: Tensor | None = None  # see `to_draw_from`

    @property
    def has_final_norm(self) -> bool:
        """Whether early layers can be read after the model's final norm."""
        return self._early.has_norm

    @property
    def num_auxiliaries(self) -> int:
        """How many auxiliary models can run in a step."""
        return len(self._auxiliaries)

    @property
    def num_lookahead_passes(self) -> int:
        """How often tokens were tried since the start."""
        return self._lookahead.num_passes

    @property
    def num_hidden_states(self) -> int:
        """Sequences whose hidden states are kept now."""
        return 0 if self.histories is None else self.histories.num_held

    def add(self, request: PlannedRequest, arrival: Arrival) -> None:
        """Make ready what its decoding needs. A request that comes again keeps that; its prompt may be shorter now."""
        plan = request.placed.plan.decoding
        if plan is None:
            return
        if request.decoding is None:
            request.decoding = self._state_of(plan, request.placed.prompt_len, arrival)
            self._num_decoding += 1
        request.decoding.num_prompt = request.placed.prompt_len
        self._metadata = None

    def remove(self, request: PlannedRequest) -> None:
        """Free what its decoding had."""
        if request.decoding is None:
            return
        self._num_decoding -= 1
        self._metadata = None
        if request.decoding.slot >= 0:
            self._tables.remove(request.decoding.slot)
        if request.decoding.history_slot >= 0:
            assert self.histories is not None
            self.histories.remove(request.decoding.history_slot)

    def copy(self, pairs: Sequence[tuple[PlannedRequest, PlannedRequest]]) -> None:
        """What is kept of the first of each pair is kept of the second, too, a sequence of the same search."""
        slots = []
        for source, target in pairs:
            if source.decoding is None:
                continue
            has_slot = source.decoding.slot >= 0
            if target.decoding is None:
                slot = self._tables.add((), 0) if has_slot else -1
                target.decoding = replace(source.decoding, slot=slot)
                self._num_decoding += 1
                self._metadata = None
            if has_slot:
                slots.append((source.decoding.slot, target.decoding.slot))
        if slots:
            self._tables.copy(slots)

    def _state_of(self, plan: DecodingPlan, num_prompt: int, arrival: Arrival) -> RequestState:
        bound, state_size = [], 0
        for one in plan.rewrites:
            method = METHODS[one.method]
            assert isinstance(method, LogitsRewriter)
            own = slice(state_size, state_size := state_size + method.state_size)
            settled = setting_type(method).model_validate_json(one.setting)
            bound.append(BoundMethod(method, settled, one.streams, one.heads, one.early, own))
        seed = next(
            (seed for seed in (plan.seed, arrival.seed) if seed is not None), zlib.crc32(arrival.request_id.encode())
        )
        has_slot = state_size or any("tokens" in one.method.needs for one in bound)
        return RequestState(
            plan,
            num_prompt,
            seed,
            arrival.scores_prompt,
            arrival.bans,
            bound,
            bias=arrival.bias,
            ends=arrival.ends,
            slot=self._tables.add(arrival.prompt, state_size) if has_slot else -1,
            history_slot=self.histories.add() if self.histories is not None and plan.keeps_hidden else -1,
        )

    def begin_step(self, view: BatchView, input_ids: Tensor | None) -> None:
        """Find the rows that become tokens, and learn the tokens that this step feeds."""
        self._view, self._active, self._noted, self._step = view, [], [], None
        self._snapshot = self._explanations = self._undecoded = None
        self._is_decoded = self._is_drawn = not self._num_decoding
        if self._is_decoded:
            if self.attention is not None:
                self.attention.begin_step(view.num_tokens, is_asked=False)
            return
        here = list(self._decoding_rows())
        self._active = [one for one in here if view.draws[one.row]]
        if self.attention is not None:
            is_asked = any(request.reads_attention for _, request in self._active)
            self.attention.begin_step(view.num_tokens, is_asked)
        slots = [(row, request.slot) for row, request in here if request.slot >= 0]
        if slots and input_ids is not None:
            self._tables.note_tokens(view, slots, input_ids)

    def _decoding_rows(self) -> Iterator[ActiveRow]:
        """The step's rows whose requests have a decoding plan."""
        for row, name in enumerate(self._view.requests if self._num_decoding else ()):
            if (request := self._requests.decoding_of(name)) is not None:
                yield ActiveRow(row, request)

    def end_forward(self) -> None:
        """Keep the hidden states of the step's tokens, for requests whose methods read those of all positions."""
        if self.histories is not None:
            rows = ((row, request.history_slot) for row, request in self._decoding_rows())
            self.histories.note(self._view, [(row, slot) for row, slot in rows if slot >= 0])

    def needed_auxiliaries(self) -> list[str]:
        """The auxiliary models this step must run."""
        if not self._requests.need_auxiliaries:
            return []
        wanted = {name for _, placed in self._view.planned() for name in placed.auxiliaries}
        needed = [name for name in self._auxiliaries if name in wanted]
        self.auxiliary_steps.update(needed)
        return needed

    @property
    def scores_prompts(self) -> bool:
        """Whether rows of prompts may be asked for whose logits methods change."""
        return any(request.scores_prompt for _, request in self._decoding_rows())

    @property
    def awaits_logits(self) -> bool:
        """Whether the logits that come next are those to draw from: a row for each of the batch's."""
        return not self._is_decoded

    def decode(self, logits: Tensor, others: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """The logits to draw from, as stages mix and rule make them.

        Args:
            logits: (B, V) the served model's.
            others: auxiliary model -> (B, V_k) its logits.
            hidden: (B, H) the served model's last hidden states.
        """
        self._is_decoded = True
        if self._metadata is None or self._metadata.active != self._active:
            self._metadata = DecodingMetadata(self._active, self._device, EARLY_ROOM // logits.shape[1])
        metadata, view = self._metadata, self._view
        rows = np.array([row for row, _ in self._active], np.int64)
        ends = view.starts[rows + 1].astype(np.int64) - 1
        positions = view.positions[rows] + ends - view.starts[rows]
        self._step = step = DecodingStep(metadata, view, ends, positions, others, hidden)
        mixed = metadata.mixed(step.num_generated, view.companions)
        if metadata.explained:
            self._snapshot = Snapshot(list(_explained(metadata.explained, view)), logits)
            self._note_streams(self._snapshot, mixed, logits, others)
        if metadata.scored_base is not None:
            self._undecoded = metadata.scored_base, logits[metadata.scored_base].to(torch.float32)
        decoded = self._decoded(logits, step, mixed)
        if self._snapshot is not None:
            self._snapshot.note_final(decoded)
        if decoded is not logits and metadata.biased is not None:
            _lift(decoded, logits, metadata.biased)
        if decoded is not logits and metadata.banning is not None:
            self._add_last_resorts(decoded, logits, metadata.banning)
        return decoded

    def _add_last_resorts(self, decoded: Tensor, logits: Tensor, rows: Tensor) -> None:
        """Tokens that a method excludes stay far below the others, in the model's own order, where vLLM may yet ban all
        those others: a grammar need not allow what a model finds plausible."""
        kept, own = decoded[rows], logits[rows].to(torch.float32)
        least = kept.masked_fill(kept == -torch.inf, torch.inf).amin(1, keepdim=True)
        lower = least - LAST_RESORT + own - own.amax(1, keepdim=True)
        decoded[rows] = torch.where(kept == -torch.inf, lower, kept)

    def _note_streams(
        self, snapshot: Snapshot, mixed: Sequence[MixedRow], logits: Tensor, others: Mapping[str, Tensor]
    ) -> None:
        for row, mix, rows in mixed:
            for stream in mix.streams:
                read = others[stream.model] if stream.model else logits
                snapshot.note_stream(row, stream.label, read[rows[stream.companion]])
        for row, request in self._active:
            for model in dict.fromkeys(model for one in request.bound for model in one.streams):
                snapshot.note_stream(row, model, others[model][row])

    def scored(self, logits: Tensor) -> Tensor:
        """The logits whose log-probabilities are told, which some requests want to be the base's."""
        self._decoded_before_scored = None
        if self._undecoded is None:
            return logits
        self._decoded_before_scored = logits
        rows, base = self._undecoded
        scored = logits.to(torch.float32, copy=True)
        scored[rows] = base
        return scored

    def to_draw_from(self, scored: Tensor) -> Tensor:
        """The logits that came into `scored`, given what came out of it: those to draw from."""
        return scored if self._decoded_before_scored is None else self._decoded_before_scored

    def decode_prompt(
        self, logits: Tensor, others: Mapping[str, Tensor], hidden: Tensor, tokens: Sequence[int]
    ) -> Tensor:
        """The same for rows of prompts whose tokens are scored; `tokens` are their numbers in the step. Mixes that read
        other sequences leave them alone: those have other prompts."""
        view, ends = self._view, np.asarray(tokens, np.int64)
        rows = np.searchsorted(view.starts, ends, side="right") - 1
        found = [
            ActiveRow(index, request)
            for index, row in enumerate(rows.tolist())
            if row < len(view.requests)
            and (request := self._requests.decoding_of(view.requests[row])) is not None
            and request.scores_prompt
            and not request.plan.scores_base
        ]
        index = np.array([index for index, _ in found], np.int64)
        rows, ends = rows[index], ends[index]
        positions = view.positions[rows] + ends - view.starts[rows]
        metadata = DecodingMetadata(found, self._device, EARLY_ROOM // logits.shape[1], is_prompt=True)
        step = DecodingStep(metadata, view, ends, positions, others, hidden)
        decoded = self._decoded(logits, step, metadata.mixed(step.num_generated, {}))
        self._note_excess(decoded, step)
        return decoded

    def _note_excess(self, decoded: Tensor, step: DecodingStep) -> None:
        """vLLM tells log-softmax of what it gets; the difference to scores is added when it has done so."""
        mine: dict[RequestState, list[tuple[int, int]]] = {}
        for (row, request), position in zip(step.metadata.active, step.positions.tolist(), strict=True):
            if request.tells_scores:
                mine.setdefault(request, []).append((row, position))
        for request, cells in mine.items():
            rows, at = sent(cells, self._device).unbind(1)
            if request.excess is None:
                request.excess = torch.zeros(request.num_prompt, device=self._device)
            request.excess[at] = decoded[rows].logsumexp(-1)

    def with_excess(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Prompts' log-probabilities by request, (num_prompt - 1, n) each, with scores as they are."""
        found = dict(told)
        for name, tensors in told.items():
            request = self._requests.decoding_of(name)
            if request is not None and request.excess is not None and tensors is not None:
                excess = request.excess[:-1, None].to(tensors.logprobs.device)
                found[name] = tensors._replace(logprobs=tensors.logprobs + excess)
        return found

    def _decoded(self, logits: Tensor, step: DecodingStep, mixed: list[MixedRow]) -> Tensor:
        calls = step.metadata.calls("mix", "rule")
        if not mixed and not calls:
            return logits
        if mixed != self._mixed:
            self._mixed, self._mixer = mixed, MixedRows(mixed)
        decoded = self._mixer.of(logits, step.others)
        self._run(calls, decoded, step)
        return decoded

    def before_draw(self, logits: Tensor, is_spare: bool = False) -> Tensor:
        """What the sampler draws from: (B, V) float32, a new tensor where anything changes. After penalties.

        With `is_spare`, `logits` may be changed in place: nobody reads them afterwards.
        """
        step = self._step
        if self._is_drawn or step is None or not step.metadata.changes_draw:
            return logits
        drawn, metadata = logits.to(torch.float32, copy=not is_spare), step.metadata
        self._run(metadata.calls("penalty", "temperature"), drawn, step)
        _temper(drawn, metadata.tempered[False])
        if metadata.truncated is not None:
            rows, *how = metadata.truncated
            drawn[rows] = apply_top_k_top_p_min_p(drawn[rows], *how)
        self._run(metadata.calls("truncation", "late temperature"), drawn, step)
        _temper(drawn, metadata.tempered[True])
        if self._snapshot is not None:
            self._snapshot.note_drawn(drawn)
        return drawn

    def after_draw(self, logits: Tensor, sampled: Tensor) -> None:
        """Let searches decide, which changes `sampled`, and methods with state learn what was drawn: (B,) from the
        logits that `before_draw` gave."""
        if self._step is not None and not self._is_drawn:
            self.searches.decide(self._view, self._step.hidden, logits, sampled)
        self._is_drawn = True
        for call, given in self._noted:
            assert given.state is not None
            given.logits = taken(logits, call.rows)
            call.method.note(given, call.settings, sampled.flatten()[call.rows].long())
            self._tables.keep_state(call, given.state)
        self._noted = []
        if self._snapshot is not None:
            self._explanations, self._snapshot = self._snapshot.drawn(sampled.flatten()), None

    def take_explanations(self) -> Explanations | None:
        """What the last draw's decoding did, once."""
        found, self._explanations = self._explanations, None
        return found

    def _run(self, calls: Iterable[MethodCall], logits: Tensor, step: DecodingStep) -> None:
        """Let methods change their rows, one after the other."""
        for call in calls:
            given = self._inputs.of(call, logits, step)
            rewritten = call.method.rewrite(given, call.settings)
            if rewritten is not logits:
                logits[call.rows] = rewritten
            if self._snapshot is not None:
                read = [row for row, _ in call.active]
                self._snapshot.note_facts(read, given.facts)
                self._snapshot.note_judged(read, given.judged)
                if given.early_exit is not None:
                    self._snapshot.note_early(read, given.early_layers, given.early_exit)
            if given.state is not None:
                self._tables.keep_state(call, given.state)
                self._noted.append((call, given))


def _explained(rows: Iterable[ActiveRow], view: BatchView) -> Iterator[ExplainedToken]:
    """What is to be said of the tokens of some rows."""
    for row, request in rows:
        assert request.plan.explain is not None
        top, companion, is_drawn = request.plan.explain
        others = (row, *view.companions.get(row, ()))
        yield ExplainedToken(view.requests[row], row, top, None if companion is None else others[companion], is_drawn)


def _lift(decoded: Tensor, logits: Tensor, biased: Biased) -> None:
    """Keep tokens, too, that vLLM's logit bias will put above all those that a method keeps: a bias may ban what a mask
    leaves, or force what it excludes. They stand where the model has them beside the best token that is kept."""
    kept, own = decoded[biased.rows], logits[biased.rows].to(torch.float32)
    later = own.index_put((biased.which, biased.tokens), biased.values, accumulate=True)
    is_out = kept == -torch.inf
    own_best, later_best = (some.masked_fill(is_out, -torch.inf).amax(1, keepdim=True) for some in (own, later))
    is_lifted = is_out & (later > later_best) & (later - own > later_best - own_best)
    decoded[biased.rows] = torch.where(is_lifted, own - own_best + kept.amax(1, keepdim=True), kept)


def _temper(logits: Tensor, tempered: Tempered | None) -> None:
    if tempered is not None:
        rows, temperature = tempered
        logits[rows] = apply_temperature(logits[rows], temperature)
