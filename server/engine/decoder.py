"""The decoder: one per worker, it turns each step's logits into what the requests' decoding methods make of them.

worker.execute_model -> note_requests          who came and went, with what plan
steerer.begin_step   -> begin_step             which rows become tokens, and the tokens that are known by now
model (composite.py) -> needed_auxiliaries     in its forward pass
model (composite.py) -> decode, decode_prompt  stages mix and rule
runner's sampler     -> before_draw            stages penalty, temperature and truncation
runner's sampler     -> after_draw             methods with state learn what was drawn
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor

from whipstaff.decoding.draw import temper, truncate
from whipstaff.decoding.method import Rewriting, Stage, setting_type
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.mix import MixedRow, mix_rows
from whipstaff.decoding.plan import DecodingPlan, Draw
from whipstaff.decoding.rows import Rows
from whipstaff.server.engine.batch import ABSENT, NOBODY, BatchView
from whipstaff.server.engine.early import EarlyHead, Stream
from whipstaff.server.engine.explain import Explanations, Row, Snapshot
from whipstaff.server.engine.request import PlacedPlan

NO_TOKEN = -1
_ORDER = {name: index for index, name in enumerate(METHODS)}
_FIRST_SLOTS = 8
EARLY_ROOM = 1 << 26
LAST_RESORT = 1e4  # logits: beyond any temperature's reach
Heads = Callable[[str], Mapping[str, Tensor]]  # of a digest: part -> tensor


class Arrival(NamedTuple):
    """A request that a worker hears of for the first time."""

    request_id: str
    placed: PlacedPlan | None
    prompt: Sequence[int]
    seed: int | None = None
    scores_prompt: bool = False  # whether log-probabilities of its prompt are wanted
    bans: bool = False  # whether vLLM may ban tokens after rules: a grammar, lists of tokens or words, a least length


class Applied(NamedTuple):
    """One method of one request, ready to run."""

    method: Rewriting[Any]
    setting: BaseModel
    streams: tuple[str, ...]
    heads: tuple[str, ...]
    early: tuple[int, ...]
    state: slice  # which of the request's floats are its own


@dataclass
class Known:
    """An unfinished request with a decoding plan."""

    plan: DecodingPlan
    num_prompt: int
    seed: int
    scores_prompt: bool
    bans: bool
    applied: list[Applied]
    slot: int = -1  # its row of the tables of tokens and floats; -1: it needs none
    excess: Tensor | None = None  # (num_prompt,) by which told log-probabilities of its prompt are too low

    @property
    def draw(self) -> Draw | None:
        return self.plan.draw

    @property
    def tells_scores(self) -> bool:
        return any(one.method.tells_scores(one.setting) for one in self.applied)


class Place(NamedTuple):
    """A row of logits that belongs to a request with a plan."""

    row: int
    request: Known
    position: int  # of the last token it follows from
    token: int  # that token's number in the step
    is_prompt: bool = False  # whether it is scored, and not drawn from

    @property
    def num_generated(self) -> int:
        return max(0, self.position + 1 - self.request.num_prompt)


@dataclass
class Call:
    """One method on the rows of a step that use it with the same streams and heads."""

    method: Rewriting[Any]
    rows: Tensor  # (n,) int64 of the logits
    slots: Tensor | None
    state: slice
    given: Rows
    settings: list[BaseModel]


@dataclass
class AuxiliarySteps:
    """How often each auxiliary model ran, and how often a step did without it."""

    run: dict[str, int] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)


class Decoder:
    """Per-step state between a forward pass and the draw that follows it."""

    def __init__(self, device: torch.device, max_len: int, auxiliaries: Iterable[str], heads: Heads) -> None:
        self.auxiliary_steps = AuxiliarySteps()
        self._device, self._max_len, self._heads = device, max_len, heads
        self._auxiliaries = tuple(auxiliaries)
        self._requests: dict[str, Known] = {}
        self._free: list[int] = []
        self._tokens = torch.zeros(0, max_len, dtype=torch.int32, device=device)
        self._state = torch.zeros(0, 0, device=device)
        self._view = NOBODY
        self.is_in_step = False  # whether a real forward pass is under way: not profiling, warm-up or capture
        self._places: list[Place] = []  # the rows that become tokens in this step
        self._is_decoded = self._is_drawn = True
        self._hidden: Tensor | None = None
        self._noted: list[Call] = []
        self._snapshot: Snapshot | None = None
        self._explanations: Explanations | None = None
        self._undecoded: tuple[Tensor, Tensor] | None = None  # rows whose log-probabilities are the base's, and those
        self.early: EarlyHead | None = None

    @property
    def num_requests(self) -> int:
        """Requests with a decoding plan that have not been seen to finish."""
        return len(self._requests)

    def note_requests(self, finished: Iterable[str], new: Iterable[Arrival]) -> None:
        """Keep the plans of unfinished requests. `finished` comes first: an id may finish and come back in one step."""
        for request_id in finished if self._requests else ():
            known = self._requests.pop(request_id, None)
            if known is not None and known.slot >= 0:
                self._free.append(known.slot)
        for arrival in new:
            plan = arrival.placed.plan.decoding if arrival.placed else None
            if plan is None or arrival.placed is None:
                continue
            if arrival.request_id not in self._requests:  # V2 says again who was preempted
                self._requests[arrival.request_id] = self._known(plan, arrival)
            self._requests[arrival.request_id].num_prompt = arrival.placed.prompt_len  # see `groups` on short prompts

    def _known(self, plan: DecodingPlan, arrival: Arrival) -> Known:
        applied, num_state = [], 0
        for name, setting, streams, heads, early in plan.rewrites:
            method = METHODS[name]
            assert isinstance(method, Rewriting)
            own = slice(num_state, num_state := num_state + method.num_state)
            settled = setting_type(method).model_validate_json(setting)
            applied.append(Applied(method, settled, streams, heads, early, own))
        seed = next(
            (seed for seed in (plan.seed, arrival.seed) if seed is not None), zlib.crc32(arrival.request_id.encode())
        )
        assert arrival.placed is not None
        known = Known(plan, arrival.placed.prompt_len, seed, arrival.scores_prompt, arrival.bans, applied)
        if num_state or any("tokens" in one.method.needs for one in applied):
            known.slot = self._new_slot(num_state)
            self._state[known.slot] = torch.nan
            self._tokens[known.slot, : len(arrival.prompt)] = torch.tensor(arrival.prompt, dtype=torch.int32)
        return known

    def _new_slot(self, num_state: int) -> int:
        if not self._free:
            num = len(self._tokens)
            more = max(num, _FIRST_SLOTS)
            self._free = list(range(num, num + more))
            self._tokens = torch.cat([self._tokens, self._tokens.new_zeros(more, self._max_len)])
            self._state = torch.cat([self._state, self._state.new_zeros(more, self._state.shape[1])])
        if (missing := num_state - self._state.shape[1]) > 0:
            self._state = torch.cat([self._state, self._state.new_zeros(len(self._state), missing)], 1)
        return self._free.pop()

    def begin_step(self, view: BatchView, input_ids: Tensor | None) -> None:
        """Find the rows that become tokens, and learn the tokens that this step feeds."""
        self._view, self._places, self._noted, self._hidden, self.is_in_step = view, [], [], None, True
        self._snapshot = self._explanations = self._undecoded = None
        self._is_decoded = self._is_drawn = not self._requests
        if self._is_decoded:
            return
        known = [(row, self._requests.get(name)) for row, name in enumerate(view.requests)]
        here = [(row, request) for row, request in known if request is not None]
        ends = view.positions + np.diff(view.starts)
        self._places = [
            Place(row, request, int(ends[row]) - 1, int(view.starts[row + 1]) - 1)
            for row, request in here
            if view.draws[row]
        ]
        if input_ids is not None:
            self._note_tokens(view, [(row, request.slot) for row, request in here if request.slot >= 0], input_ids)

    def end_forward(self) -> None:
        """What follows until the next step is the draw, or no real step."""
        self.is_in_step = False

    def _note_tokens(self, view: BatchView, rows: list[tuple[int, int]], input_ids: Tensor) -> None:
        """Ids of tokens just drawn are on the device only."""
        if not rows:
            return
        lengths = np.diff(view.starts)
        at = [np.arange(lengths[row]) for row, _ in rows]
        slots = np.repeat([slot for _, slot in rows], [len(one) for one in at])
        positions = np.concatenate([view.positions[row] + one for (row, _), one in zip(rows, at, strict=True)])
        tokens = np.concatenate([view.starts[row] + one for (row, _), one in zip(rows, at, strict=True)])
        where = self._sent(slots), self._sent(positions)
        self._tokens[where] = input_ids[self._sent(tokens)].to(torch.int32)

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
        self._is_decoded, self._hidden = True, hidden
        explained = [
            Row(self._view.requests[place.row], place.row, place.request.plan.explain)
            for place in self._places
            if place.request.plan.explain is not None
        ]
        if explained:
            self._snapshot = Snapshot(explained, logits)
            self._note_streams(self._snapshot, logits, others)
        if undecoded := [place.row for place in self._places if place.request.plan.scores_base]:
            told = self._sent(undecoded)
            self._undecoded = told, logits[told].to(torch.float32)
        decoded = self._decoded(logits, self._places, self._view.members, others, hidden)
        if self._snapshot is not None:
            self._snapshot.note_final(decoded)
        if decoded is not logits and (rows := [place.row for place in self._places if place.request.bans]):
            self._add_last_resorts(decoded, logits, self._sent(rows))
        return decoded

    def _add_last_resorts(self, decoded: Tensor, logits: Tensor, rows: Tensor) -> None:
        """Tokens that a method excludes stay far below the others, in the model's own order, where vLLM may yet ban all
        those others: a grammar need not allow what a model finds plausible."""
        kept, own = decoded[rows], logits[rows].to(torch.float32)
        least = kept.masked_fill(kept == -torch.inf, torch.inf).amin(1, keepdim=True)
        lower = least - LAST_RESORT + own - own.amax(1, keepdim=True)
        decoded[rows] = torch.where(kept == -torch.inf, lower, kept)

    def _note_streams(self, snapshot: Snapshot, logits: Tensor, others: Mapping[str, Tensor]) -> None:
        for row, mix, members in _mixed(self._places, self._view.members):
            for stream in mix.streams:
                read = others[stream.model] if stream.model else logits
                snapshot.note_stream(row, stream.label, read[members[stream.member]])
        for place in self._places:
            for model in dict.fromkeys(model for one in place.request.applied for model in one.streams):
                snapshot.note_stream(place.row, model, others[model][place.row])

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
        view = self._view
        rows = np.searchsorted(view.starts, tokens, side="right") - 1
        places = [
            Place(index, request, int(view.positions[row]) + token - int(view.starts[row]), token, True)
            for index, (row, token) in enumerate(zip(rows.tolist(), tokens, strict=True))
            if row < len(view.requests)
            and (request := self._requests.get(view.requests[row])) is not None
            and request.scores_prompt
            and not request.plan.scores_base
        ]
        decoded = self._decoded(logits, places, {}, others, hidden)
        self._note_excess(decoded, [place for place in places if place.request.tells_scores])
        return decoded

    def _note_excess(self, decoded: Tensor, places: Sequence[Place]) -> None:
        """vLLM tells log-softmax of what it gets; the difference to scores is added when it has done so."""
        for request in {id(place.request): place.request for place in places}.values():
            mine = [place for place in places if place.request is request]
            rows, positions = self._sent([[place.row for place in mine], [place.position for place in mine]])
            if request.excess is None:
                request.excess = torch.zeros(request.num_prompt, device=self._device)
            request.excess[positions] = decoded[rows].logsumexp(-1)

    def with_excess(self, told: Mapping[str, Any]) -> dict[str, Any]:
        """Prompts' log-probabilities by request, (num_prompt - 1, n) each, with scores as they are."""
        found = dict(told)
        for name, tensors in told.items():
            known = self._requests.get(name)
            if known is not None and known.excess is not None and tensors is not None:
                excess = known.excess[:-1, None].to(tensors.logprobs.device)
                found[name] = tensors._replace(logprobs=tensors.logprobs + excess)
        return found

    def _decoded(
        self,
        logits: Tensor,
        places: Sequence[Place],
        members: Mapping[int, tuple[int, ...]],
        others: Mapping[str, Tensor],
        hidden: Tensor,
    ) -> Tensor:
        mixed = list(_mixed(places, members))
        stages: tuple[Stage, ...] = ("mix", "rule")
        calls = self._calls(places, stages)
        if not mixed and not calls:
            return logits
        decoded = mix_rows(logits, others, mixed)
        for stage in stages:
            self._run(decoded, places, stage, others, hidden)
        return decoded

    def before_draw(self, logits: Tensor) -> Tensor:
        """What the sampler draws from: (B, V) float32, a new tensor where anything changes. After penalties."""
        if self._is_drawn or not any(place.request.applied or place.request.draw for place in self._places):
            return logits
        drawn = logits.to(torch.float32, copy=True)
        early = [place for place in self._places if not (place.request.draw and place.request.draw.is_temperature_last)]
        late = [place for place in self._places if place.request.draw and place.request.draw.is_temperature_last]
        self._run(drawn, self._places, "penalty")
        self._temper(drawn, early)
        self._truncate(drawn)
        self._temper(drawn, late)
        return drawn

    def _temper(self, logits: Tensor, places: Sequence[Place]) -> None:
        self._run(logits, places, "temperature")
        usual = [
            place
            for place in places
            if place.request.draw is not None
            and place.request.draw.temperature != 1
            and not any(one.method.stage == "temperature" for one in place.request.applied)
        ]
        if usual:
            rows = self._sent([place.row for place in usual])
            logits[rows] = temper(logits[rows], self._sent([_draw(place).temperature for place in usual]))

    def _truncate(self, logits: Tensor) -> None:
        usual = [place for place in self._places if place.request.draw and place.request.draw.truncates]
        if usual:
            rows = self._sent([place.row for place in usual])
            draws = [_draw(place) for place in usual]
            top_k = self._sent([draw.top_k for draw in draws]) if any(draw.top_k for draw in draws) else None
            top_p = self._sent([draw.top_p for draw in draws]) if any(draw.top_p < 1 for draw in draws) else None
            min_p = self._sent([draw.min_p for draw in draws]) if any(draw.min_p for draw in draws) else None
            logits[rows] = truncate(logits[rows], top_k, top_p, min_p)
        self._run(logits, self._places, "truncation")

    def after_draw(self, logits: Tensor, sampled: Tensor) -> None:
        """Let methods with state learn what was drawn: (B,) from the logits that `before_draw` gave."""
        self._is_drawn = True
        for call in self._noted:
            call.given.logits = _taken(logits, call.rows)
            call.method.note(call.given, call.settings, sampled.flatten()[call.rows].long())
            self._keep_state(call)
        self._noted = []
        if self._snapshot is not None:
            self._explanations, self._snapshot = self._snapshot.drawn(sampled.flatten()), None

    def take_explanations(self) -> Explanations | None:
        """What the last draw's decoding did, once."""
        found, self._explanations = self._explanations, None
        return found

    def _run(
        self,
        logits: Tensor,
        places: Sequence[Place],
        stage: Stage,
        others: Mapping[str, Tensor] | None = None,
        hidden: Tensor | None = None,
    ) -> None:
        """Let the methods of one stage change their rows, in the order of the table."""
        calls = self._calls(places, (stage,))
        for found in (part for call in calls for part in _parts(call, logits.shape[1])):
            call = self._call(found, logits, others or {}, hidden)
            rewritten = call.method.rewrite(call.given, call.settings)
            if rewritten is not logits:
                logits[call.rows] = rewritten
            if self._snapshot is not None:
                self._snapshot.note_facts([place.row for place, _ in found], call.given.facts)
            if call.given.state is not None:
                self._keep_state(call)
                self._noted.append(call)

    def _calls(self, places: Sequence[Place], stages: Sequence[Stage]) -> list[list[tuple[Place, Applied]]]:
        """The rows that a method can take at once, in the order of the methods' table."""
        calls: dict[Any, list[tuple[Place, Applied]]] = {}
        for place in places:
            for applied in place.request.applied:
                if applied.method.stage in stages:
                    key = applied.method, applied.streams, applied.heads, applied.state.start
                    calls.setdefault(key, []).append((place, applied))
        return sorted(calls.values(), key=lambda found: _ORDER[found[0][1].method.name])

    def _call(
        self,
        found: Sequence[tuple[Place, Applied]],
        logits: Tensor,
        others: Mapping[str, Tensor],
        hidden: Tensor | None,
    ) -> Call:
        places, (method, _, streams, heads, _, state) = [place for place, _ in found], found[0][1]
        rows = self._sent([place.row for place in places])
        slots = self._sent([place.request.slot for place in places]) if places[0].request.slot >= 0 else None
        hidden = self._hidden if hidden is None else hidden
        given = Rows(
            _taken(logits, rows),
            [place.request.num_prompt for place in places],
            [place.num_generated for place in places],
            streams={
                name: others[model][rows, : logits.shape[1]]
                for name, model in zip(method.stream_fields, streams, strict=True)
            },
            heads={name: self._heads(digest) for name, digest in zip(method.head_fields, heads, strict=True)},
        )
        given.is_prompt = places[0].is_prompt
        if "tokens" in method.needs:
            given.tokens = self._tokens_of(places)
        if "hidden" in method.needs:
            assert hidden is not None
            given.hidden = hidden[rows].to(torch.float32)
        if "uniform" in method.needs:
            seeds = [place.request.seed for place in places]
            numbers = uniforms(seeds, [place.position for place in places], method.name)
            given.uniform = self._sent(numbers)
        if "temperature" in method.needs:
            given.temperature = self._sent([_draw(place).temperature for place in places])
        if "early" in method.needs:
            assert self.early is not None
            given.early_layers = [applied.early for _, applied in found]
            given.early = self.early.logits(
                [
                    Stream(layer, place.token, method.takes_norm(applied.setting))
                    for place, applied in found
                    for layer in applied.early
                ]
            )
        if method.num_state:
            assert slots is not None
            given.state = self._state[slots, state]
        return Call(method, rows, slots, state, given, [applied.setting for _, applied in found])

    def _keep_state(self, call: Call) -> None:
        assert call.given.state is not None
        self._state[call.slots, call.state] = call.given.state

    def _tokens_of(self, places: Sequence[Place]) -> Tensor:
        """(R, W) int64."""
        lengths = self._sent([place.position + 1 for place in places])
        width = max(place.position + 1 for place in places)
        tokens = self._tokens[self._sent([place.request.slot for place in places]), :width].long()
        return tokens.masked_fill(torch.arange(width, device=self._device) >= lengths[:, None], NO_TOKEN)

    def _sent(self, numbers: Any) -> Tensor:
        """Numbers from the host, on the device."""
        made = torch.as_tensor(numbers)
        if made.dtype == torch.float64:
            made = made.to(torch.float32)
        return made.to(self._device, non_blocking=True)


def _taken(logits: Tensor, rows: Tensor) -> Tensor:
    """Some rows, in order; all of them without a copy."""
    return logits if len(rows) == len(logits) else logits[rows]


def _parts(found: list[tuple[Place, Applied]], vocabulary: int) -> Iterator[list[tuple[Place, Applied]]]:
    """The rows of a call, in parts that need no more than EARLY_ROOM logits of early layers at once."""
    part: list[tuple[Place, Applied]] = []
    num_early = 0
    for place, applied in found:
        num_early += len(applied.early)
        if part and num_early * vocabulary > EARLY_ROOM:
            yield part
            part, num_early = [], len(applied.early)
        part.append((place, applied))
    yield part


def _mixed(places: Sequence[Place], members: Mapping[int, tuple[int, ...]]) -> Iterator[MixedRow]:
    """The rows whose mixes can be made: of sequences that are all there. A mix ends with the first that leaves."""
    for place in places:
        mix, rows = place.request.plan.mix, (place.row, *members.get(place.row, ()))
        mix = mix.at(place.num_generated) if mix is not None else None
        if mix is not None and len(rows) > mix.num_members and ABSENT not in rows[: mix.num_members + 1]:
            yield MixedRow(place.row, mix, rows)


def _draw(place: Place) -> Draw:
    assert place.request.draw is not None
    return place.request.draw


def uniforms(seeds: Sequence[int], positions: Sequence[int], method: str) -> np.ndarray[Any, np.dtype[np.float32]]:
    """(n,) in [0, 1): the same for the same seed, position and method, whatever else was drawn (splitmix64)."""
    with np.errstate(over="ignore"):
        z = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], np.uint64) ^ np.uint64(zlib.crc32(method.encode()))
        z = z * np.uint64(0xD1342543DE82EF95) + np.array(positions, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return ((z >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)
