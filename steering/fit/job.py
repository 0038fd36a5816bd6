"""What a fit is asked for, what it works with, and what it leaves."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.data import Dataset, Item, Split
from whipstaff.steering.fit.render import Template, check_read
from whipstaff.steering.fit.rows import Progress
from whipstaff.steering.fit.source import Source
from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import Site

MIN_PER_CLASS = 16  # below that a fit is warned of
_LAYERS = re.compile(r"(\d+)-(\d+)|(\d+)|(\d+)%-(\d+)%")


class Options(BaseModel):
    """What may be said of a fit; a recipe takes some of them, and others are errors. None: the recipe's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: str | None = Field(None, description='layers, as "8-16", "4,7", "all" or "40%%-90%%" of the depth')
    read: str | None = Field(
        None, description="the token that is read: last, -2, last-prompt, answer, response-mean ..."
    )
    aggregate: Literal["mean", "pca", "lat", "logistic"] | None = Field(None, description="how rows become a direction")
    template: str | None = Field(None, description="chat, none, or a form such as 'Q: {prompt} A: {response}'")
    system: str | None = Field(None, description="a system message, with the chat template")
    seed: int = Field(42, ge=0, lt=1 << 32)
    unit: bool | None = Field(None, description="bring every direction to length 1")
    num_heads: int | None = Field(None, ge=1, description="how many heads are chosen")
    folds: int | None = Field(None, ge=2, description="folds by question in which heads are ranked")
    shots: int | None = Field(None, ge=1, le=64, description="demonstrations of a prompt")
    trials: int | None = Field(None, ge=1, description="prompts of demonstrations that are averaged")
    corrupted: int | None = Field(None, ge=1, description="prompts with shuffled outputs that heads are tried on")
    experts: int | None = Field(None, ge=1, description="how many experts are switched off")
    marks: str | None = Field(None, description="words that begin an answer of the first class, with commas: I,Sorry")
    scale: float | None = Field(None, description="the file's default strength")

    @field_validator("read")
    @classmethod
    def _read_is_known(cls, value: str | None) -> str | None:
        if value is not None:
            check_read(value)
        return value


COMMON = {"seed", "layers", "template", "system", "scale"}


@dataclass
class Job:
    """One fit at work."""

    options: Options
    data: Dataset
    splits: Mapping[Split, Sequence[Item]]
    source: Source
    template: Template
    folder: Path  # where rows are kept, until it is removed
    goes_on: bool = False
    progress: Progress = lambda what, done, of: None
    say: Callable[[str], None] = lambda line: None
    neutral: Dataset | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def num_layers(self) -> int:
        return self.source.shape.num_layers

    def warn(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.append(text)


@dataclass(frozen=True)
class Fitted:
    """What a recipe found: the parts of a vector file, and how good it is."""

    tensors: Mapping[str, Tensor]
    score: Mapping[str, Any]  # numbers on held-out rows, beside what chance gives
    scale: float | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    method: str | None = None  # where it is not the recipe's


@dataclass(frozen=True)
class Recipe:
    """How one method's files are made."""

    method: str  # the file's
    about: str
    kinds: tuple[str, ...]  # of data, by preference
    fit: Callable[[Job], Fitted]
    example: Callable[[Job, Item], list[Any]]  # what would be read of one row: [(rendered, read)]
    site: Site = "resid_post"
    read: str = "last"
    template: str = "chat"  # where the tokenizer has one
    takes: frozenset[str] = frozenset()  # options beside COMMON


def chosen_layers(text: str, num_layers: int) -> list[int]:
    """Layers in order. Raises: SteeringError."""
    if text == "all":
        return list(range(num_layers))
    found: set[int] = set()
    for part in text.split(","):
        match = _LAYERS.fullmatch(part.strip())
        if match is None:
            raise SteeringError(f"{part!r}: say layers as 8-16, 4,7, all or 40%-90%", "layers")
        first, last, one, low, high = match.groups()
        if low is not None:
            found |= set(depths(num_layers, int(low), int(high)))
        else:
            found |= set(range(int(one or first), int(one or last) + 1))
    if not found or max(found) >= num_layers:
        raise SteeringError(f"{text!r}: the model has layers 0 to {num_layers - 1}", "layers")
    return sorted(found)


def depths(num_layers: int, low: int, high: int) -> list[int]:
    """The layers between two depths in per cent."""
    return [layer for layer in range(num_layers) if low <= 100 * (layer + 0.5) / num_layers <= high]


def points_of(site: Site, layers: Sequence[int]) -> list[HookPoint]:
    return [HookPoint(site, layer) for layer in layers]
