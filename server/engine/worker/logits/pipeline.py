"""The decoder: one per worker, it turns each step's logits into what the requests' decoding methods make of them.

worker.execute_model -> note_requests          who came and went, with what plan
steerer.begin_step   -> begin_step             which rows become tokens, and the tokens that are known by now
model (composite.py) -> needed_auxiliaries     in its forward pass
model (composite.py) -> decode, decode_prompt  stages mix and rule; `lookahead` lets methods try tokens meanwhile
runner's sampler     -> before_draw            stages penalty, temperature and truncation
runner's sampler     -> after_draw             methods with state learn what was drawn
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from whipstaff.decoding.method import LogitsRewriter, setting_type
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.mix import MixedRow, MixedRows
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.decoding.rows import Rows
from whipstaff.decoding.sampler import apply_temperature, apply_top_k_top_p_min_p
from whipstaff.server.engine.worker.batch import NOBODY, BatchView, Ints
from whipstaff.server.engine.worker.logits.early_exit import EarlyHead, EarlyStream
from whipstaff.server.engine.worker.logits.explain import ExplainedToken, Explanations, Snapshot
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
from whipstaff.server.plan import PositionedPlan

NO_TOKEN = -1
_FIRST_SLOTS = 8
EARLY_ROOM = 1 << 26  # logits of early layers that may be there at once
LAST_RESORT = 1e4  # logits: beyond any temperature's reach
Heads = Callable[[str], Mapping[str, Tensor]]  # of a digest: part -> tensor
LookAhead = Callable[[BatchView, Sequence[int], Ints], Callable[[Tensor], Tensor]]  # see `Lookahead.after`


class Arrival(NamedTuple):
    """A request that a worker hears of for the first time."""

    request_id: str
    placed: PositionedPlan | None
    prompt: Sequence[int]
    seed: int | None = None
    scores_prompt: bool = False  # whether log-probabilities of its prompt are wanted
    bans: bool = False  # whether vLLM may ban tokens after rules: a grammar, lists of tokens or words, a least length
    bias: Mapping[int, float] = {}  # what vLLM will add to the logits of some tokens


class DecodingStep(NamedTuple):
    """A roster's rows in one step, and what their methods may read."""

    metadata: DecodingMetadata
    positions: Ints  # (n,) absolute, of the last token that each row follows from
    ends: Ints  # (n,) that token's number in the step
    others: Mapping[str, Tensor]  # auxiliary model -> (B, V_k) its logits
    hidden: Tensor  # (B, H) the served model's last hidden states

    @property
    def num_generated(self) -> Ints:
        """(n,) tokens generated before the one that follows."""
        found: Ints = (self.positions + 1 - self.metadata.num_prompt).clip(0)
        return found


@dataclass
class AuxiliarySteps:
    """How often each auxiliary model ran, and how often a step did without it."""

    run: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


class LogitsPipeline:
    """Per-step state between a forward pass and the draw that follows it."""

    def __init__(self, device: torch.device, max_len: int, auxiliaries: Iterable[str], heads: Heads) -> None:
        self.auxiliary_steps = AuxiliarySteps()
        self._device, self._max_len, self._heads = device, max_len, heads
        self._auxiliaries = tuple(auxiliaries)
        self._requests: dict[str, RequestState] = {}
        self._free: list[int] = []
        self._tokens = torch.zeros(0, max_len, dtype=torch.int32, device=device)
        self._state = torch.zeros(0, 0, device=device)
        self._view = NOBODY
        self.is_in_step = False  # whether a real forward pass is under way: not profiling, warm-up or capture
        self._active: list[ActiveRow] = []  # the rows that become tokens in this step
        self._metadata: DecodingMetadata | None = None  # of these seats, or of those before
        self._step: DecodingStep | None = None
        self._mixed: list[MixedRow] = []  # what `_mixer` mixes
        self._mixer = MixedRows(())
        self._is_decoded = self._is_drawn = True
        self._noted: list[tuple[MethodCall, Rows]] = []
        self._snapshot: Snapshot | None = None
        self._explanations: Explanations | None = None
        self._undecoded: tuple[Tensor, Tensor] | None = None  # rows whose log-probabilities are the base's, and those
        self.early: EarlyHead | None = None
        self.look_ahead: LookAhead | None = None

    @property
    def num_requests(self) -> int:
        """Requests with a decoding plan that have not been seen to finish."""
        return len(self._requests)

    def note_requests(self, finished: Iterable[str], new: Iterable[Arrival]) -> None:
        """Keep the plans of unfinished requests. `finished` comes first: an id may finish and come back in one step."""
        for request_id in finished if self._requests else ():
            known = self._requests.pop(request_id, None)
            if known is not None:
                self._metadata = None
                self._free += [known.slot] if known.slot >= 0 else []
        for arrival in new:
            plan = arrival.placed.plan.decoding if arrival.placed else None
            if plan is None or arrival.placed is None:
                continue
            if arrival.request_id not in self._requests:  # V2 says again who was preempted
                self._requests[arrival.request_id] = self._state_of(plan, arrival)
            self._requests[arrival.request_id].num_prompt = arrival.placed.prompt_len  # see `groups` on short prompts
            self._metadata = None

    def _state_of(self, plan: DecodingPlan, arrival: Arrival) -> RequestState:
        bound, state_size = [], 0
        for name, setting, streams, heads, early in plan.rewrites:
            method = METHODS[name]
            assert isinstance(method, LogitsRewriter)
            own = slice(state_size, state_size := state_size + method.state_size)
            settled = setting_type(method).model_validate_json(setting)
            bound.append(BoundMethod(method, settled, streams, heads, early, own))
        seed = next(
            (seed for seed in (plan.seed, arrival.seed) if seed is not None), zlib.crc32(arrival.request_id.encode())
        )
        assert arrival.placed is not None
        known = RequestState(
            plan, arrival.placed.prompt_len, seed, arrival.scores_prompt, arrival.bans, bound, bias=arrival.bias
        )
        if state_size or any("tokens" in one.method.needs for one in bound):
            known.slot = self._new_slot(state_size)
            self._state[known.slot] = torch.nan
            self._tokens[known.slot, : len(arrival.prompt)] = torch.tensor(arrival.prompt, dtype=torch.int32)
        return known

    def _new_slot(self, state_size: int) -> int:
        if not self._free:
            num = len(self._tokens)
            more = max(num, _FIRST_SLOTS)
            self._free = list(range(num, num + more))
            self._tokens = torch.cat([self._tokens, self._tokens.new_zeros(more, self._max_len)])
            self._state = torch.cat([self._state, self._state.new_zeros(more, self._state.shape[1])])
        if (missing := state_size - self._state.shape[1]) > 0:
            self._state = torch.cat([self._state, self._state.new_zeros(len(self._state), missing)], 1)
        return self._free.pop()

    def begin_step(self, view: BatchView, input_ids: Tensor | None) -> None:
        """Find the rows that become tokens, and learn the tokens that this step feeds."""
        self._view, self._active, self._noted, self._step, self.is_in_step = view, [], [], None, True
        self._snapshot = self._explanations = self._undecoded = None
        self._is_decoded = self._is_drawn = not self._requests
        if self._is_decoded:
            return
        known = [(row, self._requests.get(name)) for row, name in enumerate(view.requests)]
        here = [ActiveRow(row, request) for row, request in known if request is not None]
        self._active = [row_of for row_of in here if view.draws[row_of.row]]
        if input_ids is not None:
            self._note_tokens(view, [(row, request.slot) for row, request in here if request.slot >= 0], input_ids)

    def end_forward(self) -> None:
        """What follows until the next step is the draw, or no real step."""
        self.is_in_step = False

    def _note_tokens(self, view: BatchView, rows: list[tuple[int, int]], input_ids: Tensor) -> None:
        """Ids of tokens just drawn are on the device only."""
        if not rows:
            return
        index, slots = np.array(rows, np.int64).T
        lengths = np.diff(view.starts)[index]
        offsets = np.arange(lengths.sum()) - np.repeat(lengths.cumsum() - lengths, lengths)
        positions = np.repeat(view.positions[index], lengths) + offsets
        tokens = np.repeat(view.starts[index], lengths) + offsets
        where = sent(np.repeat(slots, lengths), self._device), sent(positions, self._device)
        self._tokens[where] = input_ids[sent(tokens, self._device)].to(torch.int32)

    def needed_auxiliaries(self) -> list[str]:
        """The auxiliary models this step must run: all of them outside of real steps, so that they are profiled,
        compiled and captured like the base."""
        if not self.is_in_step:
            return list(self._auxiliaries)
        wanted = {name for _, placed in self._view.planned() for name in placed.auxiliaries}
        for name in self._auxiliaries:
            counts = self.auxiliary_steps.run if name in wanted else self.auxiliary_steps.skipped
            counts[name] = counts.get(name, 0) + 1
        return [name for name in self._auxiliaries if name in wanted]

    @property
    def scores_prompts(self) -> bool:
        """Whether rows of prompts may be asked for whose logits methods change."""
        known = (self._requests.get(name) for name in self._view.requests) if self._requests else ()
        return self.is_in_step and any(request.scores_prompt for request in known if request is not None)

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
        rows = np.array([row_of.row for row_of in self._active], np.int64)
        ends = view.starts[rows + 1].astype(np.int64) - 1
        self._step = step = DecodingStep(
            metadata, view.positions[rows] + ends - view.starts[rows], ends, others, hidden
        )
        mixed = metadata.mixed(step.num_generated, view.companions)
        if metadata.explained:
            explained = [
                ExplainedToken(view.requests[row], row, request.plan.explain or 0)
                for row, request in metadata.explained
            ]
            self._snapshot = Snapshot(explained, logits)
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
        if self._undecoded is None:
            return logits
        rows, base = self._undecoded
        scored = logits.to(torch.float32, copy=True)
        scored[rows] = base
        return scored

    def decode_prompt(
        self, logits: Tensor, others: Mapping[str, Tensor], hidden: Tensor, tokens: Sequence[int]
    ) -> Tensor:
        """The same for rows of prompts whose tokens are scored; `tokens` are their numbers in the step. Mixes that read
        other sequences leave them alone: those have other prompts."""
        view, ends = self._view, np.asarray(tokens, np.int64)
        rows = np.searchsorted(view.starts, ends, side="right") - 1
        found = [
            (index, ActiveRow(index, request))
            for index, row in enumerate(rows.tolist())
            if row < len(view.requests)
            and (request := self._requests.get(view.requests[row])) is not None
            and request.scores_prompt
            and not request.plan.scores_base
        ]
        index = np.array([index for index, _ in found], np.int64)
        rows, ends = rows[index], ends[index]
        positions = view.positions[rows] + ends - view.starts[rows]
        active = [row_of for _, row_of in found]
        metadata = DecodingMetadata(active, self._device, EARLY_ROOM // logits.shape[1], is_prompt=True)
        step = DecodingStep(metadata, positions, ends, others, hidden)
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
            known = self._requests.get(name)
            if known is not None and known.excess is not None and tensors is not None:
                excess = known.excess[:-1, None].to(tensors.logprobs.device)
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
        return drawn

    def after_draw(self, logits: Tensor, sampled: Tensor) -> None:
        """Let methods with state learn what was drawn: (B,) from the logits that `before_draw` gave."""
        self._is_drawn = True
        for call, given in self._noted:
            given.logits = _taken(logits, call.rows)
            call.method.note(given, call.settings, sampled.flatten()[call.rows].long())
            self._keep_state(call, given)
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
            given = self._given(call, logits, step)
            rewritten = call.method.rewrite(given, call.settings)
            if rewritten is not logits:
                logits[call.rows] = rewritten
            if self._snapshot is not None:
                read = [step.metadata.active[index].row for index in call.indices]
                self._snapshot.note_facts(read, given.facts)
                if given.early is not None:
                    self._snapshot.note_early(read, given.early_layers, given.early)
            if given.state is not None:
                self._keep_state(call, given)
                self._noted.append((call, given))

    def _given(self, call: MethodCall, logits: Tensor, step: DecodingStep) -> Rows:
        """What a method may read of its rows."""
        method, rows, positions = call.method, call.rows, step.positions[call.indices]
        requests = [step.metadata.active[index].request for index in call.indices]
        given = Rows(
            _taken(logits, rows),
            [request.num_prompt for request in requests],
            step.num_generated[call.indices].tolist(),
            streams={
                name: step.others[model][rows, : logits.shape[1]]
                for name, model in zip(method.stream_fields, call.streams, strict=True)
            },
            heads={name: self._heads(digest) for name, digest in zip(method.head_fields, call.heads, strict=True)},
            is_prompt=step.metadata.is_prompt,
        )
        if "tokens" in method.needs:
            given.tokens = self._tokens_of(call, positions)
        if "hidden" in method.needs:
            given.hidden = step.hidden[rows].to(torch.float32)
        if "random" in method.needs:
            numbers = uniforms([request.seed for request in requests], positions, method.name)
            given.uniform = sent(numbers, self._device)
        if "temperature" in method.needs:
            given.temperature = given.column(request.temperature for request in requests)[:, 0]
        if "early_exit" in method.needs:
            assert self.early is not None
            given.early_layers = call.early
            given.early = self.early.logits(
                [
                    EarlyStream(layer, token, method.takes_norm(setting))
                    for token, setting, layers in zip(
                        step.ends[call.indices].tolist(), call.settings, call.early, strict=True
                    )
                    for layer in layers
                ]
            )
        if "lookahead" in method.needs and self.look_ahead is not None and not given.is_prompt:
            given.ahead = self.look_ahead(
                self._view, [step.metadata.active[index].row for index in call.indices], positions
            )
        if method.state_size:
            assert call.slots is not None
            given.state = self._state[call.slots, call.state]
        return given

    def _keep_state(self, call: MethodCall, given: Rows) -> None:
        assert given.state is not None
        self._state[call.slots, call.state] = given.state

    def _tokens_of(self, call: MethodCall, positions: Ints) -> Tensor:
        """(R, W) int64."""
        lengths, width = sent(positions + 1, self._device), int(positions.max()) + 1
        tokens = self._tokens[call.slots, :width].long()
        return tokens.masked_fill(torch.arange(width, device=self._device) >= lengths[:, None], NO_TOKEN)


def _lift(decoded: Tensor, logits: Tensor, biased: Biased) -> None:
    """Keep tokens, too, that vLLM's logit bias will put above all those that a method keeps: a bias may ban what a mask
    leaves, or force what it excludes. They stand where the model has them beside the best token that is kept."""
    kept, own = decoded[biased.rows], logits[biased.rows].to(torch.float32)
    later = own.index_put((biased.which, biased.tokens), biased.values, accumulate=True)
    is_out = kept == -torch.inf
    own_best, later_best = (some.masked_fill(is_out, -torch.inf).amax(1, keepdim=True) for some in (own, later))
    is_lifted = is_out & (later > later_best) & (later - own > later_best - own_best)
    decoded[biased.rows] = torch.where(is_lifted, own - own_best + kept.amax(1, keepdim=True), kept)


def _taken(logits: Tensor, rows: Tensor) -> Tensor:
    """Some rows, in order; all of them without a copy."""
    return logits if len(rows) == len(logits) else logits[rows]


def _temper(logits: Tensor, tempered: Tempered | None) -> None:
    if tempered is not None:
        rows, temperature = tempered
        logits[rows] = apply_temperature(logits[rows], temperature)


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
