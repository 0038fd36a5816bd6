"""What an importer is: a name, the files it claims, what a user may have to add, and the vector that comes of it."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.source import Source
from whipstaff.steering.shape import ModelShape, Site
from whipstaff.steering.where import Clause


class Hints(BaseModel):
    """What foreign files leave unsaid. Those with a path name further files on this machine: never from a request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int | None = Field(None, ge=0, description="block, from 0, where the file names none; TaRot: the first")
    site: Site | None = Field(None, description="where the file names none")
    method: str | None = Field(None, max_length=64, description="of the methods that can use the file's numbers")
    key: str | None = Field(None, max_length=256, description="which entry of a file with several")
    part: int | None = Field(None, ge=0, description="which of several edits per layer (pyreft without sharing)")
    positions: str | None = Field(None, max_length=32, description="pyreft's clause, such as f7+l7")
    num_heads: int | None = Field(None, gt=0, description="only the best so many heads")
    input_scale: float | None = Field(None, gt=0, allow_inf_nan=False, description="SAELens' activation norm factor")
    projected: bool = Field(False, description="that baked biases were multiplied by W_o, whatever their config says")
    heads: Path | None = Field(None, description=".npy of rows (layer, head), best first")
    labels: Path | None = Field(None, description=".npy of 0 and 1, one per row of the features")
    tuning: Path | None = Field(None, description=".npy of further features, for the standard deviations")
    sigma: Path | None = Field(None, description=".npy of standard deviations [layers, heads]")
    alphas: Path | None = Field(None, description=".pt of SITE's alphas [layers, heads]")
    effects: Path | None = Field(None, description=".pt of indirect effects [prompts, layers, heads]")
    weights: Path | None = Field(None, description="the base model's folder, for its output projections")
    ignore: str | None = Field(
        None, max_length=4096, description="names in the file, with commas between, that are known to change nothing"
    )
    # for any format
    scale: float | None = Field(None, allow_inf_nan=False, description="strength when a request names none")
    where: Clause | None = Field(None, description="tokens when a request names none")
    defaults: dict[str, Any] = Field({}, description="the method's other parameters when a request names none")
    description: str = Field("", max_length=4096)
    licence: str = Field("", max_length=128)


HEADER = frozenset({"scale", "where", "defaults", "description", "licence"})  # said of the vector, not of the file
COMMON = HEADER | {"ignore"}  # what any format takes


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
