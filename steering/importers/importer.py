"""What an importer is: a name, the files it claims, what a user may have to add, and the vector that comes of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.hints import COMMON, HEADER, Hints
from whipstaff.steering.importers.source import Source
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.where import Clause

__all__ = ["COMMON", "HEADER", "Draft", "Hints", "Importer", "layer_of"]


class Draft(NamedTuple):
    """A vector to be."""

    method: str
    tensors: Mapping[str, Tensor]
    where: Clause | None = None
    defaults: Mapping[str, Any] = {}
    notes: Sequence[str] = ()  # what a user should know
    scale: float | None = None  # strength, where the file states it
    model: ModelShape | None = None  # where the file says more than the given one


class Importer(ABC):
    """One format. Adding one is a class in a file here and a line in the table."""

    name: ClassVar[str]
    files: ClassVar[str]  # what it looks like, for help
    takes: ClassVar[frozenset[str]] = frozenset()  # the hints that it understands, beside the common ones

    @abstractmethod
    def claims(self, source: Source) -> bool:
        """Whether it looks like this format."""

    def fits(self, source: Source, model: ModelShape) -> bool:
        """Of a file whose shapes have several meanings: whether they have this one for this model."""
        return True

    @abstractmethod
    def draft(self, source: Source, model: ModelShape, hints: Hints) -> Draft:
        """The vector. What is in the files and neither asked for nor called harmless is refused afterwards.

        Raises: SteeringError.
        """


def layer_of(hints: Hints, model: ModelShape, found: int | None = None) -> int:
    """The layer that the user or the file names. Raises: SteeringError."""
    layer = found if hints.layer is None else hints.layer
    if layer is None:
        raise SteeringError("the file does not name its layer; say which", "layer")
    if not 0 <= layer < model.num_layers:
        raise SteeringError(f"layer {layer}: the model has layers 0 to {model.num_layers - 1}", "layer")
    return layer
