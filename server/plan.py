"""What a request carries into the engine: its compiled plan, as JSON under one key of SamplingParams.extra_args."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

from whipstaff.decoding.plan import DecodingPlan, Explain, SamplerSettings
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import EditSet, Insert, Segment, SteeringPlan
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.where import Interval

PLAN_KEY = "whipstaff"
STEPS_AHEAD = 2  # a companion that is not needed any more may have been given as many tokens more


class Computed(NamedTuple):
    """Tokens that were computed after a request's prompts, for those of its answers."""

    num_fed: int = 0  # by all of its sequences
    num_tried: int = 0  # that were fed to see what they lead to

    @staticmethod
    def of(num_tokens: int, untils: Sequence[int | None], num_tried: int) -> "Computed":
        """Of an answer of so many.

        Args:
            untils: of each companion, the tokens after which it is not needed any more.
            num_tried: for each of its tokens.
        """
        further = sum(num_tokens if until is None else min(num_tokens, until) for until in untils)
        return Computed(num_tokens + further, num_tokens * num_tried)

    @property
    def num(self) -> int:
        return self.num_fed + self.num_tried


@dataclass(frozen=True)
class CompanionPlan:
    """A further sequence of a request: it emits the tokens which the request emits; see `groups`."""

    prompt: tuple[int, ...]
    steering: SteeringPlan | None = None
    until: int | None = None  # generated tokens after which it is not needed any more; None: needed to the end
    adapter: tuple[str, int, str] | None = None  # a LoRA adapter's name, number and path; None: the request's own

    def to_wire(self) -> dict[str, Any]:
        steering = self.steering.to_wire() if self.steering else None
        adapter = None if self.adapter is None else list(self.adapter)
        return {"prompt": list(self.prompt), "steering": steering, "until": self.until, "adapter": adapter}

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> "CompanionPlan":
        steering = SteeringPlan.from_wire(wire["steering"]) if wire["steering"] else None
        adapter = wire["adapter"]
        return CompanionPlan(tuple(wire["prompt"]), steering, wire["until"], tuple(adapter) if adapter else None)


@dataclass(frozen=True)
class RequestPlan:
    """Everything the engine does differently for one request."""

    steering: SteeringPlan | None = None
    decoding: DecodingPlan | None = None
    readings_id: str = ""  # by which `whipstaff_readings` finds what the request's conditions read; "": nobody will ask
    companions: tuple[CompanionPlan, ...] = ()  # further sequences that emit the same tokens
    models: tuple[str, ...] = ()  # auxiliary models that must run beside those that `decoding` names
    captures_id: str = ""  # by which `whipstaff_captures` finds the activations that the client is told; "": none are
    max_fed: int = 0  # the most tokens that the request's own sequence feeds; where activations are captured
    label: str = ""  # names its methods for metrics

    @cached_property
    def untils(self) -> tuple[int | None, ...]:
        """Of each companion, the generated tokens after which it is not needed any more."""
        return tuple(companion.until for companion in self.companions)

    @property
    def explain(self) -> Explain | None:
        """What is to be said of every token."""
        return self.decoding.explain if self.decoding else None

    @property
    def undrafted_by(self) -> str | None:
        """What keeps the request from having tokens drafted for it, by the field that says it; None where they may be.
        Edits follow positions, so they hold at a draft as they do at a token that a preemption lets compute again; what
        follows from the draw of the token before, or decides about it, has not happened yet where a draft stands."""
        steering = self.steering
        if self.decoding is not None:
            return "decoding"
        if self.companions or self.models:
            return "sequences"
        if steering is not None and steering.stop is not None:
            return "stop_when"
        if steering is not None and (steering.told or steering.attention):
            return "capture"
        if steering is not None and steering.entropy_column >= 0:
            return "steering.schedule"
        return "metering" if steering is not None and steering.is_metered else None

    def computed(self, num_tokens: int) -> Computed:
        """What an answer of so many tokens takes. What a search takes only the engine can count, and does: nothing."""
        if self.decoding is not None and self.decoding.search is not None:
            return Computed()
        return Computed.of(num_tokens, self.untils, self.decoding.num_tried if self.decoding else 0)

    def explaining(self, explain: Explain) -> "RequestPlan":
        """The same, saying other things of tokens."""
        assert self.decoding is not None
        return replace(self, decoding=replace(self.decoding, explain=explain))

    def reading(self, companion: int) -> "RequestPlan":
        """The same, with a search that reads the hidden states of a companion."""
        assert self.decoding is not None and self.decoding.search is not None
        search = self.decoding.search._replace(hidden_of=companion)
        return replace(self, decoding=replace(self.decoding, search=search))

    def plan_of(self, index: int) -> "RequestPlan | None":
        """What a companion needs for itself; 1 is the first. None if nothing."""
        terms = self.decoding.mix.terms if self.decoding and self.decoding.mix else ()
        models = {term.stream.model for term in terms if term.stream.companion == index and term.stream.model}
        steering = self.companions[index - 1].steering
        return RequestPlan(steering, models=tuple(sorted(models))) if steering or models else None

    def to_wire(self) -> dict[str, Any]:
        return {
            "steering": self.steering.to_wire() if self.steering else None,
            "decoding": self.decoding.to_wire() if self.decoding else None,
            "readings_id": self.readings_id,
            "companions": [companion.to_wire() for companion in self.companions],
            "models": list(self.models),
            "captures_id": self.captures_id,
            "max_fed": self.max_fed,
            "label": self.label,
        }

    @staticmethod
    def from_wire(extra_args: Mapping[str, Any] | None) -> "RequestPlan | None":
        wire = (extra_args or {}).get(PLAN_KEY)
        if wire is None:
            return None
        return RequestPlan(
            SteeringPlan.from_wire(wire["steering"]) if wire["steering"] else None,
            DecodingPlan.from_wire(wire["decoding"]) if wire["decoding"] else None,
            str(wire["readings_id"]),
            tuple(map(CompanionPlan.from_wire, wire["companions"])),
            tuple(wire["models"]),
            str(wire["captures_id"]),
            int(wire["max_fed"]),
            str(wire["label"]),
        )


_OWN = ("readings_id", "captures_id", "max_fed", "label")  # by which nothing is computed that others do not get


def configuration(wire: Mapping[str, Any]) -> dict[str, Any]:
    """What of a plan, in wire form, says what is computed; the rest is how its client is told of it."""
    return {name: value for name, value in wire.items() if name not in _OWN}


def plan_of(request: Any) -> RequestPlan | None:
    """What one of vLLM's requests asks for; None for a plain one."""
    return RequestPlan.from_wire(request.sampling_params.extra_args if request.sampling_params else None)


class CapturedAt(NamedTuple):
    """Hook points, and the positions [start, end) at which their activations are captured."""

    points: tuple[HookPoint, ...]
    intervals: tuple[tuple[int, int], ...]

    @property
    def num_positions(self) -> int:
        return sum(end - start for start, end in self.intervals)


class AttendedAt(NamedTuple):
    """Heads of a layer, and the positions [start, end) of which it is told what they look at."""

    layer: int
    heads: tuple[int, ...]
    intervals: tuple[tuple[int, int], ...]
    size: int  # positions that can be looked at

    @property
    def num_positions(self) -> int:
        return sum(end - start for start, end in self.intervals)


def _bounded(intervals: Sequence[Interval], most: int) -> Iterator[tuple[int, int]]:
    for start, end in intervals:
        if start < (last := most if end is None else min(end, most)):
            yield start, last


@dataclass(frozen=True)
class PositionedPlan:
    """A plan whose prompt length is known, so that its positions are absolute."""

    plan: RequestPlan
    prompt_len: int

    @cached_property
    def segments(self) -> list[Segment]:
        return self.plan.steering.segments(self.prompt_len) if self.plan.steering else []

    @cached_property
    def edited(self) -> list[Segment]:
        """The segments less what only keeps activations."""
        steering = self.plan.steering
        if steering is None or not (steering.keeps or steering.captures):
            return self.segments
        return replace(steering, keeps=(), captures=()).segments(self.prompt_len)

    @cached_property
    def rows(self) -> frozenset[EditSet]:
        """The distinct rows of edits that the request may need at once."""
        return frozenset(row for segment in self.segments for row in (segment.row, segment.row_at_tokens) if row)

    @cached_property
    def follows_positions(self) -> bool:
        """Whether tokens of one row may differ in what happens to them: by schedules, or by what was read."""
        steering = self.plan.steering
        return steering is not None and (bool(steering.schedules) or steering.num_columns > 0)

    @property
    def first_edited(self) -> int | None:
        """The first position whose activations may differ from a plain request's; None when none does."""
        starts = [segment.start for segment in self.edited[:1]] + [insert.start for insert in self.inserts[:1]]
        return min(starts, default=None)

    @property
    def inserts(self) -> tuple[Insert, ...]:
        """Stretches of placeholder tokens and what stands in their place."""
        return self.plan.steering.inserts if self.plan.steering else ()

    @property
    def num_columns(self) -> int:
        """How many histories the request's conditions need."""
        return self.plan.steering.num_columns if self.plan.steering else 0

    @property
    def keeps_hidden(self) -> bool:
        """Whether the hidden states of all its positions are kept."""
        return self.plan.decoding is not None and self.plan.decoding.keeps_hidden

    @cached_property
    def captures(self) -> list[CapturedAt]:
        """The activations that the client is told."""
        planned = self.plan.steering.captures if self.plan.steering else ()
        return [
            CapturedAt(one.capture.points, tuple(_bounded(one.where.intervals(self.prompt_len), self.plan.max_fed)))
            for one in planned
        ]

    @cached_property
    def attended(self) -> list[AttendedAt]:
        """What heads look at, which the client is told."""
        most, planned = self.plan.max_fed, self.plan.steering.attention if self.plan.steering else ()
        return [
            AttendedAt(one.layer, one.heads, tuple(_bounded(one.where.intervals(self.prompt_len), most)), most)
            for one in planned
        ]

    @property
    def places(self) -> list[CapturedAt | AttendedAt]:
        """Of all that is told of activations and attention, in the order in which workers keep it."""
        return [*self.captures, *self.attended]

    @property
    def first_captured(self) -> int | None:
        """The first position of which the client is told what was computed, which must be; None when none is."""
        told = self.plan.steering.told_intervals(self.prompt_len) if self.plan.steering else ()
        starts = [start for one in self.places for start, _ in one.intervals]
        starts += [start for start, _ in told]
        return min(starts, default=None)

    def capture_bytes(self, shape: ModelShape) -> int:
        """What the client is told at most, as float32."""
        widths = (sum(shape.width(point.site) for point in one.points) for one in self.captures)
        captured = sum(4 * one.num_positions * width for one, width in zip(self.captures, widths, strict=True))
        return captured + sum(4 * one.num_positions * len(one.heads) * one.size for one in self.attended)

    @property
    def needs_slots(self) -> bool:
        """Whether it may have to wait for room."""
        return bool(self.rows) or self.keeps_hidden or bool(self.attended)

    @property
    def latched_columns(self) -> list[bool]:
        """Of every condition, whether it is decided once."""
        steering = self.plan.steering
        latched = {p.probe.condition_index for p in steering.probes if p.probe.is_latched} if steering else set()
        return [column in latched for column in range(self.num_columns)]

    @cached_property
    def auxiliaries(self) -> list[str]:
        """The auxiliary models that must run on all of the sequence, sorted."""
        return sorted({*self.plan.models, *(self.plan.decoding.models if self.plan.decoding else ())})


class Scoring(NamedTuple):
    """A text whose tokens the served model is to score before a plan can be placed in a prompt."""

    ids: Sequence[int]  # with placeholders of inserted rows
    steering: SteeringPlan | None

    @property
    def positions(self) -> list[int]:
        """Where its own tokens stand."""
        inserts = self.steering.inserts if self.steering else ()
        rows = {position for insert in inserts for position in range(insert.start, insert.start + insert.num)}
        return [position for position in range(len(self.ids)) if position not in rows]


@dataclass(frozen=True)
class PlacedRequest:
    """A compiled request in one of its prompts: what the engine's front end schedules, and the receipt tells."""

    plan: RequestPlan
    num_tokens: int  # of the prompt, with the rows that were inserted
    max_tokens: int  # that may be generated at most
    ids: list[int] | None = None  # the prompt with placeholders for rows; None: it stays as it is
    draws_itself: bool = False  # whether temperature and truncation are our stages' to do, and not vLLM's
    is_temperature_last: bool = False
    stream_names: Mapping[str, str] = field(default_factory=dict)  # as explanations call streams -> as the client does
    companions: tuple[Mapping[str, Any], ...] = ()  # as the receipt shows them
    warnings: tuple[str, ...] = ()

    def to_wire(self, params: Any) -> dict[str, Any]:
        """What the engine gets beside vLLM's sampling parameters, from which it may take some over."""
        decoding = self.plan.decoding
        if decoding is not None and decoding.search is not None:
            search = decoding.search._replace(logprobs=params.logprobs)
            return replace(self.plan, decoding=replace(decoding, search=search)).to_wire()
        if not self.draws_itself:
            return self.plan.to_wire()
        assert decoding is not None
        settings = take_sampler_settings(params, self.is_temperature_last)
        return replace(self.plan, decoding=replace(decoding, draw=settings)).to_wire()

    def by_client_names(self, record: dict[str, Any]) -> dict[str, Any]:
        """What the engine says of a token, its streams by the client's names."""
        return record | {"streams": {self.stream_names.get(name, name): s for name, s in record["streams"].items()}}


def take_sampler_settings(params: Any, is_temperature_last: bool) -> SamplerSettings:
    """Move temperature and truncation out of vLLM's sampling parameters, so that its sampler draws from what it gets.

    A greedy request stays greedy: it takes the best of what our stages leave.
    """
    draw = SamplerSettings(params.temperature, max(params.top_k, 0), params.top_p, params.min_p, is_temperature_last)
    if params.temperature > 0:
        params.temperature, params.top_k, params.top_p, params.min_p = 1.0, 0, 1.0, 0.0
    return draw
