"""The contract of a decoding method: its parameters, and the row of weights over streams that it stands for."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

from pydantic import BaseModel, ConfigDict


class DecodingError(ValueError):
    """Bad decoding parameters. `param` is the path below the decoding entry, such as "expert"."""

    def __init__(self, message: str, param: str = "") -> None:
        super().__init__(message)
        self.param = param


class Params(BaseModel):
    """What a request may say about a method; `method` names it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str


@dataclass(frozen=True)
class Mix:
    """New logits = the served model's + sum over auxiliary models of weight * theirs, raw logits in float32."""

    weights: Mapping[str, float]  # by auxiliary model

    @property
    def auxiliaries(self) -> list[str]:
        """The auxiliary models that must run for this mix, sorted."""
        return sorted(self.weights)


P = TypeVar("P", bound=Params)


class Method(ABC, Generic[P]):
    """One method: a name users type, its paper, its parameters and the setting that changes nothing."""

    name: ClassVar[str]
    paper: ClassVar[str]
    params: type[P]
    stream_fields: ClassVar[tuple[str, ...]] = ()  # parameters that name auxiliary models

    @abstractmethod
    def off(self, streams: list[str]) -> P:
        """Parameters that change nothing, exactly, given names for the auxiliary models."""

    @abstractmethod
    def mix(self, params: P) -> Mix:
        """The weights that these parameters stand for."""
