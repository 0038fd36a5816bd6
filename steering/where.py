"""Where clauses: which token positions of a request an edit touches.

A clause is written relative to the prompt's end, so one clause serves prompts of every length; `Where.intervals`
turns it into absolute positions once the prompt length is known. Position p is the p-th token fed to the model
(0-based); the output at the last prompt position predicts the first generated token. Positions are absolute, never
"prefill or decode": after a preemption generated tokens are recomputed as prefill and must be edited as before.

Messages of a chat and tokens written as text are resolved by the front end, which has the template and the tokenizer:
`resolved` gives the clause that the engine gets, in windows and token ids only.
"""

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from whipstaff.steering.errors import SteeringError

Index = Annotated[int, Field(strict=True, ge=-(1 << 31), lt=1 << 31)]  # the wire to the engine takes 64 bits
Window = tuple[Index, Index | None]
Windows = Literal["all", "none"] | Annotated[list[Window], Field(max_length=64)]
Interval = tuple[int, int | None]  # [start, end) in absolute positions; None = no end
NOWHERE = ((1 << 31) - 2, (1 << 31) - 1)  # a window that no prompt reaches

SHORTHANDS: dict[str, tuple[Windows, Windows]] = {
    "all": ("all", "all"),
    "prompt": ("all", "none"),
    "generation": ("none", "all"),
    "last_prompt": ([(-1, None)], "none"),
    "each_last": ([(-1, None)], "all"),
}
Shorthand = Literal["all", "prompt", "generation", "last_prompt", "each_last"]
Token = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] | Annotated[str, Field(min_length=1, max_length=256)]


def _known_shorthand(value: object) -> object:
    if isinstance(value, str) and value not in SHORTHANDS:
        raise ValueError(
            f"{value!r} is none of {', '.join(SHORTHANDS)}, nor an object with {', '.join(Where.model_fields)}"
        )
    return value


class Messages(BaseModel):
    """Messages of a chat request: their content, or with `whole` their part of the template too.

    Each named field narrows the choice; `index` counts messages from 0, or from the end when negative.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str | None = Field(None, min_length=1, max_length=64)
    index: Index | None = None
    whole: bool = False


class Region(BaseModel):
    """Half-open windows over the prompt and over the generated tokens, counted apart; messages of a chat; single tokens
    wherever they stand.

    `prompt` windows count from the prompt's start, or from its end when negative; `generation` windows count generated
    tokens from 0. An end of null is the end of that part. `middle` windows count from the prompt's middle, the token at
    its length // 2, to both sides. `tokens` are ids, or texts that are one token each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompt: Windows = "none"
    generation: Windows = "none"
    middle: Annotated[list[Window], Field(min_length=1, max_length=64)] | None = None
    messages: Annotated[list[Messages], Field(min_length=1, max_length=64)] | None = None
    tokens: Annotated[list[Token], Field(min_length=1, max_length=256)] | None = None

    @model_validator(mode="after")
    def _windows_make_sense(self) -> "Region":
        for start, end in _listed(self.prompt):
            if end is not None and end <= start and (end < 0) == (start < 0):
                raise ValueError(f"prompt window [{start}, {end}] is empty: windows are half-open, end > start")
        for start, end in _listed(self.generation):
            if start < 0 or (end is not None and end < 0):
                raise ValueError(f"generation window [{start}, {end}]: generated tokens are counted from 0 upwards")
            if end is not None and end <= start:
                raise ValueError(f"generation window [{start}, {end}] is empty: windows are half-open, end > start")
        for start, end in self.middle or ():
            if end is not None and end <= start:
                raise ValueError(f"middle window [{start}, {end}] is empty: windows are half-open, end > start")
        return self

    def intervals(self, prompt_len: int) -> list[Interval]:
        """The windows as absolute positions, merged and in order."""
        found: list[Interval] = []
        for start, end in _listed(self.prompt):
            first, last = resolve_window(start, end, prompt_len)
            if first < last:
                found.append((first, last))
        for start, end in self.middle or ():
            first = max(prompt_len // 2 + start, 0)
            last = prompt_len if end is None else min(prompt_len // 2 + end, prompt_len)
            if first < last:
                found.append((first, last))
        for start, end in _listed(self.generation):
            found.append((prompt_len + start, None if end is None else prompt_len + end))
        return _merged(found)

    @property
    def ids(self) -> frozenset[int]:
        """The token ids of a resolved clause."""
        return frozenset(token for token in self.tokens or () if isinstance(token, int))


_LONG = 1 << 32  # a prompt longer than any window reaches
Spans = Callable[[Messages], Sequence[tuple[int, int]]]
Ids = Callable[[str], int]


class Where(Region):
    """A region less an excluded region (excludes win)."""

    exclude: Region | None = None

    @staticmethod
    def of(clause: "Where | Shorthand") -> "Where":
        """A clause or one of the shorthands, as a clause."""
        if isinstance(clause, Where):
            return clause
        prompt, generation = SHORTHANDS[clause]
        return Where(prompt=prompt, generation=generation)

    def intervals(self, prompt_len: int) -> list[Interval]:
        """Absolute [start, end) positions, disjoint and in order; empty when the clause selects nothing."""
        chosen = super().intervals(prompt_len)
        for hole in self.exclude.intervals(prompt_len) if self.exclude else []:
            chosen = [piece for interval in chosen for piece in _without(interval, hole)]
        return chosen

    @property
    def token_ids(self) -> frozenset[int]:
        """The ids that a resolved clause treats apart, chosen or excluded."""
        return self.ids | (self.exclude.ids if self.exclude else frozenset())

    def intervals_at_tokens(self, prompt_len: int) -> list[Interval]:
        """As `intervals`, for tokens that are one of `token_ids`."""
        if self.exclude is not None and self.exclude.tokens:
            return []
        if not self.tokens:
            return self.intervals(prompt_len)
        everywhere: list[Interval] = [(0, None)]
        for hole in Region.intervals(self.exclude, prompt_len) if self.exclude else []:
            everywhere = [piece for interval in everywhere for piece in _without(interval, hole)]
        return everywhere

    @property
    def is_late(self) -> bool:
        """Whether it selects nothing before the last prompt token, whatever the prompt."""
        if self.messages is not None or self.tokens:
            return False
        return all(start >= _LONG - 1 for start, _ in self.intervals(_LONG))

    @property
    def needs_prompt(self) -> bool:
        """Whether it names messages, or tokens by their text."""
        return any(
            region.messages is not None or any(isinstance(token, str) for token in region.tokens or ())
            for region in (self, self.exclude)
            if region is not None
        )

    def resolved(self, spans: Spans, id_of: Ids) -> "Where":
        """The clause in windows and token ids only.

        Args:
            spans: the [start, end) positions of the messages that match. Raises: SteeringError.
            id_of: the id of the token with that text. Raises: SteeringError.
        """
        exclude = None if self.exclude is None else Region(**_resolved(self.exclude, spans, id_of, "exclude."))
        return Where(**_resolved(self, spans, id_of, ""), exclude=exclude)

    def selects(self, prompt_len: int, num_fed: int = 1 << 30) -> bool:
        """Whether it can touch a token of a sequence with that prompt, of which so many are fed."""
        chosen = [*self.intervals(prompt_len), *(self.intervals_at_tokens(prompt_len) if self.tokens else ())]
        return any(start < num_fed for start, _ in chosen)

    def check(self, prompt_len: int, max_tokens: int) -> None:
        """Refuse a clause that cannot touch any token of this request.

        The last generated token is never fed back, so a request feeds prompt_len + max_tokens - 1 positions.

        Raises:
            SteeringError: no position below that is selected.
        """
        if not self.selects(prompt_len, prompt_len + max_tokens - 1):
            raise SteeringError(
                f"the clause selects no token: the prompt has {prompt_len} tokens and max_tokens is {max_tokens}"
                " (the last generated token is never fed back to the model)",
                "where",
            )


Clause = Annotated[Where | Shorthand, BeforeValidator(_known_shorthand)]  # what users write


def _listed(windows: Windows) -> list[Window]:
    if isinstance(windows, str):
        return [(0, None)] if windows == "all" else []
    return windows


def _resolved(region: Region, spans: Spans, id_of: Ids, path: str) -> dict[str, object]:
    """The fields of a region whose messages have become windows and whose tokens have become ids."""
    windows: Windows = region.prompt
    if region.messages is not None and windows != "all":
        found = [span for chosen in region.messages for span in spans(chosen)]
        if not found:
            raise SteeringError("no message of this request matches", f"where.{path}messages")
        windows = [*_listed(windows), *((start, end) for start, end in found)]
    tokens = None
    if region.tokens is not None:
        try:
            tokens = [token if isinstance(token, int) else id_of(token) for token in region.tokens]
        except SteeringError as error:
            raise SteeringError(str(error), f"where.{path}tokens") from None
    return {"prompt": windows, "generation": region.generation, "middle": region.middle, "tokens": tokens}


def _from_start(index: int, length: int) -> int:
    return min(max(index + length if index < 0 else index, 0), length)


def resolve_window(start: int, end: int | None, prompt_len: int) -> tuple[int, int]:
    """A window of the prompt as absolute positions, cut to it."""
    return _from_start(start, prompt_len), prompt_len if end is None else _from_start(end, prompt_len)


def _merged(intervals: list[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals, key=lambda interval: interval[0]):
        if merged and (merged[-1][1] is None or start <= merged[-1][1]):
            last_start, last_end = merged[-1]
            merged[-1] = (last_start, None if end is None or last_end is None else max(end, last_end))
        else:
            merged.append((start, end))
    return merged


def _without(interval: Interval, hole: Interval) -> list[Interval]:
    """`interval` less `hole`: up to two pieces."""
    (start, end), (hole_start, hole_end) = interval, hole
    pieces: list[Interval] = []
    if start < hole_start:
        pieces.append((start, hole_start if end is None else min(end, hole_start)))
    if hole_end is not None and (end is None or hole_end < end):
        pieces.append((max(start, hole_end), end))
    return pieces
