"""Captured rows are put where their positions are, however a step's tokens come; nothing is left behind."""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soak import tries
from torch import Tensor

from whipstaff.server.admission.captured import NamedSequence, attention_read
from whipstaff.server.engine.worker.batch import BatchView, Ints
from whipstaff.server.engine.worker.edits import captures
from whipstaff.server.engine.worker.edits.captures import Captures, arenas_of
from whipstaff.server.engine.worker.requests import Arrival, Requests
from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import Capture, PlannedAttention, PlannedCapture, SteeringPlan
from whipstaff.steering.tables import SiteSpec
from whipstaff.steering.where import Where

CPU, ROOM = torch.device("cpu"), 32  # tokens of a step
STREAMS = tuple(HookPoint("resid_post", layer) for layer in range(3))
HEADS = tuple(HookPoint("attn_head", layer) for layer in range(3))
WIDTHS = dict.fromkeys(STREAMS, 4) | dict.fromkeys(HEADS, 6)
READS = [
    (PlannedCapture(Capture(STREAMS[::2], True), Where.of("all")),),
    (
        PlannedCapture(Capture(HEADS[1:], False), Where(prompt=[(1, 3), (-1, None)], generation=[(1, None)])),
        PlannedCapture(Capture(STREAMS[:1], True), Where.of("generation")),
    ),
]


LOOKS = [
    (),
    (PlannedAttention(1, (2, 0), Where.of("all")),),
    (
        PlannedAttention(0, (1,), Where(prompt=[(1, 3), (-1, None)], generation=[(1, None)])),
        PlannedAttention(1, (0, 1, 2), Where.of("generation")),
    ),
]
NUM_HEADS = 3


class Attended:
    """A layer whose heads look at known numbers."""

    num_heads = NUM_HEADS

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.names: list[str] = []  # of the step's rows
        self.most = 0  # probabilities at once

    def own(self, heads: Sequence[int]) -> list[int]:
        return sorted(heads)

    def of_tokens(self, tokens: Ints, rows: Ints, positions: Ints) -> Tensor:
        assert len(set(tokens.tolist())) == len(tokens)
        found = torch.zeros(len(rows), NUM_HEADS, int(positions.max()) + 1)
        for index, (row, position) in enumerate(zip(rows, positions, strict=True)):
            for head in range(NUM_HEADS):
                found[index, head, : position + 1] = looked(self.names[row], int(position), self.layer, head)
        self.most = max(self.most, found.numel())
        return found


def looked(name: str, position: int, layer: int, head: int) -> Tensor:
    """(position + 1,) how much a head looks at what there is."""
    return 1 + 1000 * int(name) + 100 * position + 10 * layer + head + torch.arange(position + 1) / 32


def value(name: str, position: int, point: HookPoint) -> Tensor:
    """What stands there at that position of a request."""
    number = 1000 * int(name) + 10 * position + point.layer
    return number + torch.arange(WIDTHS[point]) / 8


class Bench:
    """A worker's captures and its requests, and a model that leaves known numbers everywhere."""

    def __init__(self, max_bytes: int = 1 << 20) -> None:
        self.requests = Requests()
        specs = [SiteSpec(point, 0, width) for point, width in WIDTHS.items()]
        self.arenas = arenas_of(specs, ROOM, torch.float32, CPU)
        self.attended = {layer: Attended(layer) for layer in range(2)}
        self.captures = Captures(self.requests, self.arenas, max_bytes, cast(Any, self.attended))

    def arrive(
        self,
        name: str,
        reads: tuple[PlannedCapture, ...],
        num_prompt: int,
        max_fed: int,
        looks: tuple[PlannedAttention, ...] = (),
    ) -> None:
        steering = SteeringPlan((), captures=reads, attention=looks)
        plan = RequestPlan(steering, captures_id=f"id {name}", max_fed=max_fed)
        for request, _ in self.requests.take([Arrival(name, PositionedPlan(plan, num_prompt))]):
            if reads or looks:
                self.captures.add(request)

    def step(self, *fed: tuple[str, int, int]) -> None:
        """(name, position, number) of each row's tokens."""
        starts = np.cumsum([0, *(num for _, _, num in fed)])
        for arena in self.arenas:
            for point in arena.points:
                rows = arena.kept(point).fill_(torch.nan)
                for (name, position, num), first in zip(fed, starts, strict=False):
                    for offset in range(num):
                        rows[first + offset] = value(name, position + offset, point)
        names = [name for name, _, _ in fed]
        for attended in self.attended.values():
            attended.names = names
        plans = [self.requests[name].placed for name in names]
        positions = np.array([position for _, position, _ in fed])
        self.captures.note(BatchView(plans, starts.astype(np.int32), positions, names))

    def finish(self, name: str) -> None:
        for request in self.requests.finish([name]):
            if request.captured:
                self.captures.remove(request)

    def told(self, name: str, placed: PositionedPlan, num_fed: int) -> None:
        """Take what a request has, and compare it."""
        (said,) = self.captures.take(f"id {name}").values()
        read = attention_read(NamedSequence(0, name, num_fed), placed, [{name: said}])
        for looking, found in zip(placed.attended, read, strict=True):
            there = [p for start, end in looking.intervals for p in range(start, min(end, num_fed))]
            assert found.positions.tolist() == there
            seen_by = torch.zeros(len(there), len(looking.heads), num_fed)
            for row, p in zip(seen_by, there, strict=True):
                for own, head in zip(row, looking.heads, strict=True):
                    own[: p + 1] = looked(name, p, looking.layer, head)
            assert torch.equal(found.rows, seen_by)
        for one, at in zip(said, placed.captures, strict=False):
            positions = np.concatenate([np.arange(0), *(np.arange(start, end) for start, end in at.intervals)])
            seen = np.frombuffer(one["seen"], np.bool_)
            assert seen.all() and (positions[: len(seen)] < num_fed).all()
            assert len(seen) == (positions < num_fed).sum()
            if len(seen):
                rows = torch.frombuffer(bytearray(one["data"]), dtype=torch.float32).view(one["shape"])
                expected = [[value(name, int(p), point) for p in positions[: len(seen)]] for point in at.points]
                assert torch.equal(rows, torch.stack([torch.stack(row) for row in expected]))
        assert self.captures.take(f"id {name}") == {}


def chunks(num: int, sizes: Iterator[int]) -> Iterator[tuple[int, int]]:
    """Of that many tokens: (position, number) of each step's."""
    position = 0
    while position < num:
        size = min(next(sizes), num - position)
        yield position, size
        position += size


@settings(max_examples=tries(60), deadline=None)
@given(st.integers(0, 1 << 30))
def test_rows_go_where_their_positions_are(seed: int) -> None:
    """Of requests that come in chunks of any size, some with rejected drafts, are preempted and computed again,
    and end in the middle."""
    bench, random = Bench(), Random(seed)
    going, num_fed, placed = dict[str, list[tuple[int, int]]](), dict[str, int](), dict[str, Any]()
    for number in range(random.randint(1, 4)):
        name, num_prompt = str(number), random.randint(1, 9)
        num_fed[name] = num_prompt + random.randint(0, 5)
        reads = random.choice([*READS, ()])
        bench.arrive(name, reads, num_prompt, num_fed[name] + random.randint(0, 3), random.choice(LOOKS))
        sizes = iter(lambda: random.randint(1, 4), None)
        steps = list(chunks(num_fed[name], sizes))
        lost = random.randint(0, len(steps))
        going[name] = steps[:lost] + list(chunks(num_fed[name], sizes)) if lost else steps
        placed[name] = bench.requests[name].placed
    while any(going.values()):
        here = [name for name, steps in going.items() if steps and random.random() < 0.5]
        fed = [(name, *going[name].pop(0), random.choice((0, 0, 1, 3))) for name in here]
        bench.step(*((name, position, num + num_rejected) for name, position, num, num_rejected in fed))
        for name, position, num, num_rejected in fed:
            if num_rejected and bench.requests[name].captured:
                bench.captures.forget(bench.requests[name], position + num)
    for name, num in num_fed.items():
        is_known = random.random() < 0.5  # whether the worker has heard of its end
        if is_known:
            bench.finish(name)
        if placed[name].captures or placed[name].attended:
            bench.told(name, placed[name], num)
        if not is_known:
            bench.finish(name)
    assert bench.captures.num_held == 0 and not bench.captures._taken and bench.captures.num_asking == 0


def test_a_long_prompt_is_looked_at_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captures, "_MOST", 4 * NUM_HEADS * 12)
    bench = Bench()
    for name in "12":
        bench.arrive(name, (), 12, 12, LOOKS[1])
    bench.step(("1", 0, 12), ("2", 0, 3))
    bench.step(("2", 3, 9))
    for name in "12":
        placed = bench.requests[name].placed
        assert placed is not None
        bench.told(name, placed, 12)
    assert 0 < bench.attended[1].most <= 4 * NUM_HEADS * 12


def test_what_nobody_takes_makes_room() -> None:
    bench = Bench(max_bytes=2 * 2 * 5 * 4 * 4)  # of two of them
    for name in "123":
        bench.arrive(name, READS[0], 5, 5)
        bench.step((name, 0, 5))
        bench.finish(name)
    assert bench.captures.num_held == 2 and bench.captures.take("id 1") == {}
    assert list(bench.captures.take("id 3")) == ["3"] and bench.captures.num_held == 1


def test_a_prompt_that_becomes_shorter_gets_other_room() -> None:
    """A companion's primary with a prompt of one token is introduced with two, and then with one."""
    bench = Bench()
    bench.arrive("1", READS[0], 2, 4)
    bench.step(("1", 0, 1))
    bench.arrive("1", READS[0], 1, 3)
    for position in range(3):
        bench.step(("1", position, 1))
    placed = bench.requests["1"].placed
    assert placed is not None
    bench.told("1", placed, 3)
    bench.finish("1")
    assert bench.captures.num_held == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rows_keep_the_models_type(dtype: torch.dtype) -> None:
    bench = Bench()
    bench.arenas[:] = arenas_of([SiteSpec(point, 0, width) for point, width in WIDTHS.items()], ROOM, dtype, CPU)
    bench.arrive("1", READS[0], 2, 2)
    bench.step(("1", 0, 2))
    ((one,),) = bench.captures.take("id 1").values()
    rows = torch.frombuffer(bytearray(one["data"]), dtype=getattr(torch, one["dtype"])).view(one["shape"])
    assert rows.dtype == dtype and torch.equal(rows[1, 1], value("1", 1, STREAMS[2]).to(dtype))
