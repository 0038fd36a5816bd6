"""The serving engine's model as what fits read, at the lowest priority: one text at a time while clients are answered,
several while nobody is, and behind everybody else in the queue where the server schedules by priority."""

import asyncio
import concurrent.futures
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

from whipstaff.server import metrics
from whipstaff.server.admission.captured import NamedSequence, rows_read
from whipstaff.server.engine.frontend.activations import Read, Told, read_activations
from whipstaff.server.engine.frontend.launch import Engine
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.rows import Progress
from whipstaff.steering.fit.served import by_site, served_identity
from whipstaff.steering.fit.source import Asked, Entry, Gives
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import Capture, PlannedCapture
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.where import Where

BUSY, IDLE = 1, 8  # texts at once, while clients are answered and while nobody is
_WINDOW = 64  # texts that are in memory
_SHARE = 4  # of the room for activations that clients read, fits take one part in so many
_LOOK = 0.5  # seconds between looks at whether somebody cancelled
T = TypeVar("T")


class Enough(Exception):
    """A recipe came to where it would read."""

    def __init__(self, asked: Sequence[Asked], points: Sequence[HookPoint]) -> None:
        super().__init__()
        self.asked, self.points = asked, points


@dataclass(frozen=True)
class EngineModel:
    """A `Source`, used in a thread of its own.

    Args:
        loop: where the engine is asked.
        model: what requests call it.
        tokenizer: of this job alone: transformers' are not made for several threads.
        max_bytes: of activations that requests read at once.
        check: called again and again; raises what ends the job.
    """

    engine: Engine
    loop: asyncio.AbstractEventLoop
    model: str
    tokenizer: Any
    shape: ModelShape
    max_bytes: int
    check: Callable[[], None] = lambda: None
    progress: Progress = lambda what, done, of: None
    only_looks: bool = False
    gives: frozenset[Gives] = frozenset({"rows"})

    @property
    def max_len(self) -> int:
        return int(self.engine.model_config.max_model_len) - 1  # one token is generated

    @property
    def experts_per_token(self) -> int:
        return int(getattr(self.engine.model_config.hf_text_config, "num_experts_per_tok", 0) or 0)

    def looking(self) -> "EngineModel":
        """The same, of which nothing is read: who would read gets `Enough`."""
        return replace(self, only_looks=True)

    def identity(self) -> dict[str, Any]:
        return served_identity(self.model, self.shape, self.tokenizer)

    def predict(self, texts: Sequence[tuple[int, ...]], entries: Sequence[Entry] = ()) -> Iterator[Tensor]:
        raise SteeringError("a server does not tell the probability of every token", "method")

    def read(self, asked: Sequence[Asked], points: Sequence[HookPoint]) -> Iterator[dict[HookPoint, Tensor]]:
        if self.only_looks:
            raise Enough(asked, points)
        for start in range(0, len(asked), _WINDOW):
            self.check()
            yield from self.wait(self._read(asked[start : start + _WINDOW], points))

    def wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """What comes of it in the engine's loop. Raises: what it, or `check`, does."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)
        while True:
            try:
                return future.result(_LOOK)
            except concurrent.futures.TimeoutError:
                if future.done():
                    raise
            try:
                self.check()
            except BaseException:
                future.cancel()
                raise

    async def _read(self, asked: Sequence[Asked], points: Sequence[HookPoint]) -> list[dict[HookPoint, Tensor]]:
        found: list[dict[HookPoint, Tensor]] = []
        while len(found) < len(asked):
            self.check()
            some = asked[len(found) : len(found) + self._num_at_once(asked, points)]
            reads, told = await read_activations(
                self.engine, [one.ids for one in some], [_captures(one, points) for one in some]
            )
            found += await asyncio.to_thread(_all_rows, some, points, reads, told)
            metrics.FIT_TEXTS.inc(len(some))
        return found

    def _num_at_once(self, asked: Sequence[Asked], points: Sequence[HookPoint]) -> int:
        """Asked between batches, when whatever is generated is others'."""
        if self.engine.num_generating:
            return BUSY
        width = 4 * sum(self.shape.width(point.site) for point in points)
        largest = width * max(len(one.positions) for one in asked)
        return max(BUSY, min(IDLE, self.max_bytes // _SHARE // largest))


def _captures(asked: Asked, points: Sequence[HookPoint]) -> list[PlannedCapture]:
    """What is captured of a text, a site each."""
    where = Where(prompt=list(_runs(asked.positions)))
    return [
        PlannedCapture(Capture(tuple(point.canonical for point in group), is_edited=True), where)
        for group in by_site(points).values()
    ]


def _runs(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Positions as half-open windows."""
    start = before = positions[0]
    for position in positions[1:]:
        if position != before + 1:
            yield start, before + 1
            start = position
        before = position
    yield start, before + 1


def _all_rows(
    asked: Sequence[Asked], points: Sequence[HookPoint], reads: Sequence[Read], told: Sequence[Told]
) -> list[dict[HookPoint, Tensor]]:
    return [_rows(one, points, read, told) for one, read in zip(asked, reads, strict=True)]


def _rows(asked: Asked, points: Sequence[HookPoint], read: Read, told: Sequence[Told]) -> dict[HookPoint, Tensor]:
    """(positions, width) of each place, or (1, width). Raises: SteeringError unless all that was asked for is there."""
    if any(read.name not in rank for rank in told) or not told:
        raise SteeringError("others needed the room before what was read could be told")
    found: dict[HookPoint, Tensor] = {}
    sequence = NamedSequence(0, read.name, len(asked.ids))
    for group, part in zip(by_site(points).values(), rows_read(sequence, read.placed, told), strict=True):
        if part.positions.tolist() != list(asked.positions):
            raise SteeringError(f"the engine read other tokens than {list(asked.positions)[:8]}")
        for point, rows in zip(group, part.rows.float(), strict=True):
            found[point] = rows.mean(0, keepdim=True) if asked.is_mean else rows.clone()
    return found
