"""When and how much: conditions on what the model itself computes, and schedules over the generated tokens.

A condition reads a probe, a direction at one layer, and opens or closes an edit at later layers: once, at the last
prompt token (CAST, Lee et al. 2025), or at every token for itself, with hysteresis if wanted. A schedule scales an edit
by the number of tokens generated, or by the entropy of the distribution that a token was drawn from. Both are evaluated
where the model runs, without waiting for the host.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, model_validator

from whipstaff.steering.programs import Gate

MAX_GAIN = 100.0
MAX_CONDITIONS = 4  # probes and entropies that one request may read; columns of the engine's token table
MAX_SCHEDULES = 4  # different schedules in one request; columns of the engine's gains


class Threshold(BaseModel):
    """Where a probe reads above, or below, a number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    probe: str = Field(min_length=1, max_length=256, description="name of a loaded vector whose method is probe")
    above: float | None = Field(None, allow_inf_nan=False)
    below: float | None = Field(None, allow_inf_nan=False)
    layer: int | None = Field(None, ge=0, description="which of the probe's layers; needed where it has several")

    @model_validator(mode="after")
    def _is_one_threshold(self) -> "Threshold":
        if (self.above is None) == (self.below is None):
            raise ValueError("give one of above and below")
        return self

    @property
    def sign(self) -> int:
        return 1 if self.above is not None else -1

    @property
    def on(self) -> float:
        """The reading times `sign` above which the condition holds."""
        return self.above if self.above is not None else -(self.below or 0.0)


class When(Threshold):
    """Steer only where a probe says so."""

    release: float | None = Field(
        None,
        allow_inf_nan=False,
        description="hysteresis: once open, stay open until the reading passes this value. It begins closed: at the "
        "last prompt token for edits that touch nothing before it, else at the first",
    )
    decide: Literal["prompt", "step"] = Field(
        "prompt", description='"prompt": once, at the last prompt token, for all that follows; "step": every token'
    )

    @model_validator(mode="after")
    def _releases_on_the_other_side(self) -> "When":
        if self.release is not None:
            if self.decide == "prompt":
                raise ValueError('release needs "decide": "step"; a decision on the prompt is final')
            if self.sign * self.release > self.on:
                raise ValueError("release must lie on the other side of the threshold")
        return self

    @property
    def off(self) -> float:
        """The reading times `sign` at or below which it ceases to hold."""
        return self.on if self.release is None else self.sign * self.release


_NEEDS = {"linear": ("tokens",), "cosine": ("tokens",), "exponential": ("half_life",), "entropy": ("low", "high")}


class Schedule(BaseModel):
    """How an edit's gain goes from `from` to `to` as tokens are generated; 1 is the edit as it stands.

    constant     `from`
    linear       straight to `to` in `tokens` tokens, where it stays
    cosine       likewise, along half a cosine
    exponential  half of the way to `to` in every `half_life` tokens
    entropy      `from` where the distribution that the token was drawn from has an entropy of `low` nats or less, `to`
                 where it has `high` or more, straight in between
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    shape: Literal["constant", "linear", "cosine", "exponential", "entropy"]
    start: float = Field(1.0, alias="from", ge=-MAX_GAIN, le=MAX_GAIN, allow_inf_nan=False)
    to: float = Field(0.0, ge=-MAX_GAIN, le=MAX_GAIN, allow_inf_nan=False)
    tokens: int | None = Field(None, ge=1, le=1 << 24)
    half_life: float | None = Field(None, gt=0, le=1 << 24)
    low: float | None = Field(None, ge=0, allow_inf_nan=False)
    high: float | None = Field(None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _has_what_its_shape_needs(self) -> "Schedule":
        wanted = _NEEDS.get(self.shape, ())
        for name in ("tokens", "half_life", "low", "high"):
            if name in wanted and getattr(self, name) is None:
                raise ValueError(f"a schedule of shape {self.shape} has no end without `{name}`")
            if name not in wanted and getattr(self, name) is not None:
                raise ValueError(f"a schedule of shape {self.shape} has no `{name}`")
        if self.low is not None and self.high is not None and self.high <= self.low:
            raise ValueError("high must be above low")
        return self

    @property
    def largest(self) -> float:
        """The largest gain in absolute value."""
        return abs(self.start) if self.shape == "constant" else max(abs(self.start), abs(self.to))

    def gains(self, generated: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The gain of tokens by how many were generated before them; prompt tokens (negative) get `from`."""
        n = np.maximum(generated, 0)
        if self.shape == "exponential":
            share = 1 - np.exp2(-n / (self.half_life or 1))
        elif self.shape == "constant":
            share = np.zeros(len(n))
        else:
            share = np.minimum(n / (self.tokens or 1), 1)
            if self.shape == "cosine":
                share = (1 - np.cos(math.pi * share)) / 2
        return (self.start + (self.to - self.start) * share).astype(np.float32)


Readings = Sequence[float | None]  # by position, or the one reading that decided; None: not read


class Fired(NamedTuple):
    """On how many positions an edit was open, of those where that is known."""

    num_open: int
    num_known: int


def fired(gate: Gate, columns: Sequence[Readings], positions: Iterable[int]) -> Fired:
    """Count as `cuda_ext.run_edits_` decides; a schedule's gain by tokens counts as open.

    A condition read at every token has no reading where a prompt's KV came from the cache: not known.

    Args:
        columns: the request's readings, by condition.
        positions: where the edit is.
    """
    known = [is_open for is_open in _openings(gate, columns, positions) if is_open is not None]
    return Fired(sum(known), len(known))


def _openings(gate: Gate, columns: Sequence[Readings], positions: Iterable[int]) -> Iterable[bool | None]:
    holds = [] if gate.condition_index < 0 else _states(gate, columns[gate.condition_index])
    for position in positions:
        is_open: bool | None = True
        if gate.condition_index >= 0:
            index = 0 if gate.is_latched else position
            is_open = holds[index] if index < len(holds) else None
        if is_open and gate.ramp is not None:
            condition_index, low, high, at_low, at_high = gate.ramp
            reading = columns[condition_index][position] if position < len(columns[condition_index]) else None
            share = 0.0 if reading is None else min(max((reading - low) / (high - low), 0.0), 1.0)
            is_open = at_low + (at_high - at_low) * share != 0
        yield is_open


def _states(gate: Gate, readings: Readings) -> list[bool | None]:
    """Whether a condition holds at each reading; between the thresholds it keeps the state before."""
    on, off = np.float32(gate.on), np.float32(gate.off)  # what the device compares with
    states: list[bool | None] = []
    before = False
    for reading in readings:
        signed = math.nan if reading is None else gate.sign * reading
        before = bool(signed > on or (signed > off and before))
        states.append(None if reading is None else before)
    return states
