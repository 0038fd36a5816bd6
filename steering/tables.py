"""Tables: the programs of the rows in use, in persistent buffers that the model's sites read.

Every hook point has its code; those that are equally wide share a pool of lines, the rows of numbers that code refers
to. A row of edits has the same address in the code of every hook point, so a token needs one number to say what happens
to it everywhere. Rows are a cache: one keeps its frames and lines until another needs them and no token of the current
step uses it. Nothing is counted per request, so nothing can leak; the scheduler admits no more than fits.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from whipstaff.cuda_ext import Opcode
from whipstaff.steering.edits import edits_of
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import FRAME, FRAME_ROOM, Capture, EditSet, Meter, ModuleEdit, ProbeRead, StreamCopy
from whipstaff.steering.programs import Encoding, Line, Program, Reading, Step, assemble, lines_of, meter
from whipstaff.steering.sites import pool_of
from whipstaff.steering.vector_file import Vector

NOTHING = -1  # the address of tokens that are left alone


class SiteSpec(NamedTuple):
    """One hook point. `first` and `width` are this process's slice of it (tensor parallelism)."""

    point: HookPoint
    first: int
    width: int


@dataclass
class Encoders:
    """The readings of sparse autoencoders whose active features are the largest of all, at one hook point.

    weight (features, width), bias (features,): persistent, with room for what the server was started with; an
    autoencoder keeps the range it was given until it is forgotten.
    """

    weight: Tensor
    bias: Tensor
    ranges: dict[str, tuple[int, int]] = field(default_factory=dict)  # by the vector's digest, [first, end)
    written: set[str] = field(default_factory=set)

    def reserve(self, source: str, size: int) -> bool:
        """Set features apart for an autoencoder; whether there was room."""
        start = 0
        for first, end in sorted(self.ranges.values()):
            if first - start >= size:
                break
            start = end
        if source not in self.ranges and start + size <= len(self.weight):
            self.ranges[source] = start, start + size
        return source in self.ranges

    def start_of(self, encoding: Encoding) -> int:
        """Where an encoder's features begin, after copying them there."""
        size = len(encoding.weight)
        if not self.reserve(encoding.source, size):
            raise RuntimeError(f"no room for an encoder of {size} features; it was not announced")
        start, end = self.ranges[encoding.source]
        if encoding.source not in self.written:
            self.weight[start:end].copy_(encoding.weight)
            self.bias[start:end].copy_(encoding.bias)
            self.written.add(encoding.source)
        return start

    def forget(self, source: str) -> None:
        """Give an autoencoder's room to others."""
        self.ranges.pop(source, None)
        self.written.discard(source)


class SiteTables(NamedTuple):
    """What one hook point reads."""

    lines: Tensor  # (N, width) float32, shared by the hook points of one pool
    code: Tensor  # (P, 6) int32
    args: Tensor  # (P, 6) float32
    encoders: Encoders | None
    kept: Tensor | None  # (max_tokens, width): row t is token t's, where its row of edits keeps it


@dataclass
class Pool:
    """Lines of one width."""

    lines: Tensor
    mine: slice  # of a full line
    free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.free = list(range(len(self.lines)))


@dataclass(frozen=True)
class _Held:
    """What a row takes."""

    frames: list[int]
    lines: dict[str, list[int]]


class Tables:
    """All tables of a model and the map from rows to addresses."""

    def __init__(
        self,
        sites: Sequence[SiteSpec],
        num_slots: int,
        num_layers: int,
        device: torch.device,
        vector_of: Callable[[str], Vector],
        encoder_sizes: dict[HookPoint, int] | None = None,
        kept: Mapping[HookPoint, Tensor] | None = None,
    ) -> None:
        """A slot is room for one row: two lines per layer in each pool, and two frames of code.

        Args:
            kept: (max_tokens, width) room in the model's type for the activations at hook points that can be kept.
        """
        self.hook_points = [spec.point for spec in sites]
        self.num_uploads = self.num_uploaded_bytes = 0
        self._vector_of = vector_of
        self._pools: dict[str, Pool] = {}
        for point, first, width in sites:
            if (name := pool_of(point.site)) not in self._pools:
                lines = torch.zeros(2 * num_layers * num_slots, width, device=device)
                self._pools[name] = Pool(lines, slice(first, first + width))
        num_frames = 2 * num_slots
        self._code = torch.zeros(len(sites), num_frames * FRAME, 6, dtype=torch.int32, device=device)
        self._args = torch.zeros(len(sites), num_frames * FRAME, 6, device=device)
        self._encoders = {
            point: Encoders(torch.zeros(size, width, device=device), torch.zeros(size, device=device))
            for point, _, width in sites
            if (size := (encoder_sizes or {}).get(point))
        }
        self._free_frames = list(range(num_frames))
        self._held: OrderedDict[EditSet, _Held] = OrderedDict()  # least recently used first
        self._index = {point: index for index, point in enumerate(self.hook_points)}
        self._kept = dict(kept or {})

    def kept(self, layer: int) -> Tensor:
        """(max_tokens, width) the streams at an early layer: row t is token t's, where its row of edits keeps it."""
        return self._kept[HookPoint.entering(layer)]

    def at(self, point: HookPoint) -> SiteTables:
        """What a hook point reads, sharing memory."""
        index = self._index[point]
        lines = self._pools[pool_of(point.site)].lines
        return SiteTables(lines, self._code[index], self._args[index], self._encoders.get(point), self._kept.get(point))

    @property
    def num_used(self) -> int:
        return len(self._held)

    def reserve(self, vector: Vector) -> str | None:
        """Set room apart for a vector that is to be held; what is in the way, or None."""
        for point, tensors in vector.tensors.items():
            size = vector.method.encoder_size(tensors, vector.header.defaults)
            encoders = self._encoders.get(at := point.canonical)
            if size and (encoders is None or not encoders.reserve(vector.digest, size)):
                self.forget(vector.digest)
                room = 0 if encoders is None else len(encoders.weight)
                return (
                    f"the largest features of {at.site}.{at.layer} need room for {size}, and the {room} that this "
                    "server set apart for its files when it started are in use; start it again with this file"
                )
        return None

    def forget(self, digest: str) -> None:
        """Drop the rows that name a vector, and its room. No token of a coming step may get one of them."""
        for row in [row for row in self._held if any(getattr(item, "digest", None) == digest for item in row)]:
            self._drop(row)
        for encoders in self._encoders.values():
            encoders.forget(digest)

    def acquire(self, rows: Iterable[EditSet]) -> dict[EditSet, int]:
        """An address for every row of one step, written where the row is new.

        Raises: RuntimeError when the step needs more than there is room for, which the scheduler must prevent.
        """
        wanted = dict.fromkeys(rows)
        for row in wanted:
            if row in self._held:
                self._held.move_to_end(row)
        for row in wanted:
            if row not in self._held:
                self._load(row, wanted)
        return {row: FRAME * self._held[row].frames[0] for row in wanted}

    def _load(self, row: EditSet, in_use: dict[EditSet, None]) -> None:
        programs = self._programs(row)
        longest = max((len(program.codes) for program in programs.values()), default=1)
        num_frames = max(1, -(-longest // FRAME_ROOM))
        wanted = lines_of(programs)
        while len(self._free_frames) < num_frames or any(
            len(self._pools[name].free) < len(lines) for name, lines in wanted.items()
        ):
            self._evict(in_use)
        frames = [self._free_frames.pop() for _ in range(num_frames)]
        addresses = {name: self._write_lines(self._pools[name], lines) for name, lines in wanted.items()}
        self._write_code(programs, frames, addresses)
        self.num_uploads += 1
        self._held[row] = _Held(frames, {name: list(found.values()) for name, found in addresses.items()})

    def _evict(self, in_use: dict[EditSet, None]) -> None:
        victim = next((row for row in self._held if row not in in_use), None)
        if victim is None:
            raise RuntimeError("a step uses more steering rows than there is room for; the scheduler let too many in")
        self._drop(victim)

    def _drop(self, row: EditSet) -> None:
        held = self._held.pop(row)
        self._free_frames += held.frames
        for name, lines in held.lines.items():
            self._pools[name].free += lines

    def _programs(self, row: EditSet) -> dict[HookPoint, Program]:
        if Meter() in row:
            return dict.fromkeys(self.hook_points, meter())
        readings: dict[HookPoint, list[Reading]] = {}
        steps: dict[HookPoint, list[Step]] = {}
        kept: dict[bool, set[HookPoint]] = {False: set(), True: set()}  # before the row's edits, and after them
        for item in row:
            if isinstance(item, ModuleEdit | Meter):
                continue
            if isinstance(item, StreamCopy):
                kept[True].update(map(HookPoint.entering, item.layers))
                continue
            if isinstance(item, Capture):
                kept[item.is_edited].update(item.points)
                continue
            vector = self._vector_of(item.digest)
            if isinstance(item, ProbeRead):
                point = HookPoint("resid_post", item.layer)
                readings.setdefault(point, []).append(_reading(vector, item))
                continue
            for point, ops in edits_of(vector, item).items():
                steps.setdefault(point, []).append(Step(ops, item.gate, item.renorm, item.digest))
        touched = {*readings, *steps, *kept[True], *kept[False]}
        return {
            point: assemble(readings.get(point, ()), steps.get(point, ()), point in kept[True], point in kept[False])
            for point in self.hook_points
            if point in touched
        }

    def _write_lines(self, pool: Pool, lines: Sequence[Line]) -> dict[Line, int]:
        """Where each line went."""
        rows = [pool.free.pop() for _ in lines]
        stacked = torch.stack([line.numbers[pool.mine] for line in lines])
        self.num_uploaded_bytes += stacked.nbytes
        pool.lines[torch.tensor(rows, device=pool.lines.device)] = stacked.to(pool.lines.device)
        return dict(zip(lines, rows, strict=True))

    def _write_code(
        self, programs: dict[HookPoint, Program], frames: list[int], addresses: dict[str, dict[Line, int]]
    ) -> None:
        room = len(frames) * FRAME
        code, args = (
            torch.zeros(len(self.hook_points), room, 6, dtype=torch.int32),
            torch.zeros(len(self.hook_points), room, 6),
        )
        for frame, after in enumerate(frames[1:]):
            code[:, frame * FRAME + FRAME_ROOM, :2] = torch.tensor([int(Opcode.JUMP), after * FRAME], dtype=torch.int32)
        for point, program in programs.items():
            if not program.codes:
                continue
            index, found = self._index[point], addresses.get(pool_of(point.site), {})
            at = [FRAME * (i // FRAME_ROOM) + i % FRAME_ROOM for i in range(len(program.codes))]
            said = [
                [what, *(found[operand] if isinstance(operand, Line) else operand for operand in operands)]
                for what, operands in zip(program.codes, program.operands, strict=True)
            ]
            for encoding in program.encodings:
                said[encoding.instruction][1] = self._encoders[point].start_of(encoding)
            code[index, at] = torch.tensor(said, dtype=torch.int32)
            args[index, at] = torch.tensor(program.numbers)
        self.num_uploaded_bytes += code.nbytes + args.nbytes
        for number, frame in enumerate(frames):
            here, there = slice(number * FRAME, (number + 1) * FRAME), slice(frame * FRAME, (frame + 1) * FRAME)
            self._code[:, there].copy_(code[:, here])
            self._args[:, there].copy_(args[:, here])


def _reading(vector: Vector, probe: ProbeRead) -> Reading:
    parts = vector.tensors[HookPoint("resid_post", probe.layer)]
    bias = float(parts["bias"]) if "bias" in parts else 0.0
    is_cosine = vector.header.defaults.get("metric", "dot") == "cosine"
    direction = parts["direction"] / parts["direction"].norm() if is_cosine else parts["direction"]
    return Reading(direction, bias, probe.condition_index, probe.is_latched, is_cosine)
