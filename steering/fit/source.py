"""Where activations come from: a model on this machine, or a server that is asked. Fits know this protocol alone, so
that both give the same files."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from torch import Tensor

from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import ModelShape

# Activations; log-probabilities of every token under edits; the weights themselves, and gradients.
Gives = Literal["rows", "answers", "weights"]


@dataclass(frozen=True)
class Asked:
    """A text, and where it is read."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]  # absolute, in order
    is_mean: bool = False  # one row, the mean over the positions; otherwise a row for each


@dataclass(frozen=True)
class Entry:
    """An entry of a request's `steering`: a vector's numbers and the parameters that go with them."""

    method: str
    tensors: Mapping[HookPoint, Mapping[str, Tensor]]
    params: Mapping[str, Any]  # of the method
    where: Any = None  # a clause; None: the method's own
    rows: Tensor | None = None  # (n, hidden) that stand before the prompt, embeddings before any scaling


class Scored(NamedTuple):
    """What a model makes of a text of T tokens."""

    states: Tensor  # (T, hidden) float32: what its output embeddings read, after the final norm
    log_p: Tensor  # (T - 1,) of every token but the first
    is_best: Tensor  # (T - 1,) whether none was likelier


class Source(Protocol):
    """Who computes activations."""

    @property
    def shape(self) -> ModelShape:
        """The model's."""

    @property
    def tokenizer(self) -> Any:
        """The model's, of transformers."""

    @property
    def experts_per_token(self) -> int:
        """How many a router chooses; 0 without routers."""

    @property
    def max_len(self) -> int | None:
        """Tokens of a text; None: nobody says."""

    @property
    def gives(self) -> frozenset[Gives]:
        """What can be had of it."""

    def identity(self) -> dict[str, Any]:
        """What tells this model from others, for the provenance of a file."""

    def read(self, asked: Sequence[Asked], points: Sequence[HookPoint]) -> Iterator[dict[HookPoint, Tensor]]:
        """For each text, in order: (positions, width) float32 on the CPU at every point, or (1, width) for a mean.

        Raises: SteeringError for what cannot be read there.
        """

    def predict(self, texts: Sequence[tuple[int, ...]], entries: Sequence[Entry] = ()) -> Iterator[Tensor]:
        """For each text, in order: (vocab,) float32 log-probabilities of its next token, under some steering."""
