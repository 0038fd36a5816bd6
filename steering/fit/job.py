"""What a fit is asked for, what it works with, and what it leaves."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.data import Dataset, Item, Split
from whipstaff.steering.fit.options import Options
from whipstaff.steering.fit.render import Template
from whipstaff.steering.fit.rows import Progress
from whipstaff.steering.fit.source import Gives, Source
from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import Site
from whipstaff.steering.where import Where

MIN_PER_CLASS = 16  # below that a fit is warned of
_LAYERS = re.compile(r"(\d+)-(\d+)|(\d+)|(\d+)%-(\d+)%")


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
class Axis:
    """One number of a text, the larger where it shows what was looked for: what is read of it at some places, each
    along a direction."""

    parts: Mapping[HookPoint, NDArray[np.floating[Any]]]  # (width,) of each place; what they give is added up
    read: str  # the token
    threshold: float | None = None  # a text of which more is read is said to show it; None: texts are only compared


@dataclass(frozen=True)
class Fitted:
    """What a recipe found: the parts of a vector file, and how good it is."""

    tensors: Mapping[str, Tensor]
    score: Mapping[str, Any]  # numbers on held-out rows, beside what chance gives
    scale: float | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    where: Where | None = None  # None: the method's own
    axis: Axis | None = None  # what tells texts apart; None where nothing of the kind was made


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
    without: frozenset[str] = frozenset()  # of COMMON, what could mean nothing
    needs: Gives = "rows"  # of its source


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
