"""Activations that requests ask for are those of transformers' hooks, whatever runs beside them."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from engines import Ask, edit
from modes import THREE
from torch import Tensor
from vllm.sampling_params import RequestOutputKind

from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import Capture, PlannedCapture, SteeringPlan
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Where

from .conftest import Shared

pytestmark = [pytest.mark.engine, pytest.mark.parametrize("shared", [*THREE, "v1-eager-drafts"], indirect=True)]

LAYERS, WIDTH, EDITED = 4, 96, 1  # the layer whose stream is pushed
BLOCK, TOLERANCE = 32, 2e-4
STREAMS = tuple(HookPoint("resid_post", layer) for layer in range(LAYERS))
HEADS = (HookPoint("attn_head", 0), HookPoint("attn_head", 3))
ENDS = (HookPoint("resid_pre", 0), HookPoint("resid_post", 3))
ALL, PROMPT, LATE = Where.of("all"), Where.of("prompt"), Where.of("each_last")
SOME = Where(prompt=[(3, 9), (-4, None)], generation=[(1, 3)])
READS: list[tuple[PlannedCapture, ...]] = [
    (PlannedCapture(Capture(STREAMS, True), ALL),),
    (PlannedCapture(Capture(STREAMS[1:3], False), PROMPT), PlannedCapture(Capture(HEADS, True), LATE)),
    (PlannedCapture(Capture(ENDS, True), SOME), PlannedCapture(Capture(HEADS[1:], False), ALL)),
    (),
]


@dataclass
class Case:
    """A request and what it reads."""

    prompt: list[int]
    reads: tuple[PlannedCapture, ...]
    scale: float = 0.0  # of the vector
    max_tokens: int = 6
    number: int = 0
    names: list[str] = field(default_factory=list)

    def plan(self, vector: Vector) -> RequestPlan | None:
        edits = (edit(vector, self.scale, ALL),) if self.scale else ()
        if not edits and not self.reads:
            return None
        steering = SteeringPlan(edits, captures=self.reads)
        max_fed = len(self.prompt) + self.max_tokens - 1
        return RequestPlan(steering, captures_id=f"read {self.number}" if self.reads else "", max_fed=max_fed)

    def ask(self, vector: Vector) -> Ask:
        return Ask(self.prompt, self.plan(vector), self.max_tokens, names=self.names)


def cases(num: int) -> list[Case]:
    """With long and short prompts, some of which begin alike; steered and not, reading and not."""
    random = torch.Generator().manual_seed(5)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, 300, (length,), generator=random).tolist()

    starts = [tokens(45) for _ in range(3)]
    return [
        Case(
            [*starts[i % 3], *tokens(3 + 17 * (i % 6))], READS[i % 4], (0.0, 1.5)[i // 4 % 2], (30, 6)[i % 2], number=i
        )
        for i in range(num)
    ]


@torch.inference_mode()
def hooked(model: Any, case: Case, ids: list[int], push: Tensor) -> dict[tuple[HookPoint, bool], Tensor]:
    """(T, width) at every hook point, before the edits there (False) and after them (True), by transformers' hooks."""
    found: dict[tuple[HookPoint, bool], Tensor] = {}
    handles = []
    for layer, block in enumerate(model.model.layers):

        def leaving(_: Any, __: Any, output: Any, layer: int = layer) -> Any:
            stream = output[0] if isinstance(output, tuple) else output
            after = stream + case.scale * push if layer == EDITED else stream
            found[HookPoint("resid_post", layer), False] = stream[0].clone()
            found[HookPoint("resid_post", layer), True] = after[0].clone()
            return (after, *output[1:]) if isinstance(output, tuple) else after

        def entering(_: Any, given: Any, layer: int = layer) -> None:
            for is_edited in (False, True):
                found[HookPoint("attn_head", layer), is_edited] = given[0][0].clone()

        handles += [block.register_forward_hook(leaving)]
        handles += [block.self_attn.o_proj.register_forward_pre_hook(entering)]
    try:
        embedded = model.model.embed_tokens(torch.tensor([ids]))
        for is_edited in (False, True):
            found[HookPoint("resid_pre", 0), is_edited] = embedded[0]
        model(torch.tensor([ids]))
    finally:
        for handle in handles:
            handle.remove()
    return found


def told(shared: Shared, case: Case) -> list[dict[str, Any]]:
    """What the first rank tells of a request's activations, by its entries."""
    call = shared.engine.engine.collective_rpc("whipstaff_captures", args=(f"read {case.number}",))
    by_name = shared.engine.run(call)[0]
    assert list(by_name) == case.names
    return by_name[case.names[0]]


def check(shared: Shared, case: Case, answer: list[int], push: Tensor, vector: Vector) -> int:
    """Compare everything that was read. How many rows."""
    ids, num = [*case.prompt, *answer[:-1]], 0
    expected = hooked(shared.models["base"], case, ids, push)
    plan = case.plan(vector)
    assert plan is not None
    placed = PositionedPlan(plan, len(case.prompt))
    for said, planned, at in zip(told(shared, case), case.reads, placed.captures, strict=True):
        positions = np.concatenate([np.arange(start, end) for start, end in at.intervals])
        rows = torch.frombuffer(bytearray(said["data"]), dtype=torch.float32).view(said["shape"])
        assert np.frombuffer(said["seen"], np.bool_).all() and rows.shape[:2] == (len(at.points), len(positions))
        for point, values in zip(at.points, rows, strict=True):
            wanted = expected[point, planned.capture.is_edited][positions]
            torch.testing.assert_close(values, wanted, atol=TOLERANCE, rtol=TOLERANCE)
            num += len(values)
    return num


@pytest.mark.usefixtures("nobody_left")
def test_what_is_read_is_what_transformers_hooks_see(shared: Shared) -> None:
    """Of 32 requests at once, in chunks, with cached prefixes and preemptions; half are pushed, a quarter reads
    nothing."""
    push = torch.randn(WIDTH, generator=torch.Generator().manual_seed(8))
    vector = shared.engine.add_vector({f"resid_post.{EDITED}.add": push})
    some, before = cases(32), shared.engine.num_preemptions
    shared.engine.generate(*(replace(case, reads=(), scale=0.0).ask(vector) for case in some[:3]))
    answers = shared.engine.tokens(*(case.ask(vector) for case in some))
    assert shared.engine.num_preemptions > before
    num = sum(
        check(shared, case, answer, push, vector) for case, answer in zip(some, answers, strict=True) if case.reads
    )
    assert num > 4000
    assert shared.engine.counters()["captures_held"] == 0


@pytest.mark.usefixtures("nobody_left")
def test_the_cache_is_read_as_far_as_nothing_is_asked_of_it(shared: Shared) -> None:
    prompt = torch.randint(3, 300, (100,), generator=torch.Generator().manual_seed(9)).tolist()
    vector = shared.engine.add_vector({f"resid_post.{EDITED}.add": torch.zeros(WIDTH)})
    shared.engine.generate(Ask(prompt, max_tokens=1))
    for start, num_cached in ((0, 0), (40, 32), (64, 64), (70, 64), (99, 96)):
        reads = (PlannedCapture(Capture(STREAMS, True), Where(prompt=[(start, None)])),)
        case = Case(prompt, reads, max_tokens=2, number=1000 + start)
        hits = shared.engine.counters()["prefix_cache_hits"]["steered"]
        (answer,) = shared.engine.tokens(case.ask(vector))
        assert shared.engine.counters()["prefix_cache_hits"]["steered"] - hits == num_cached
        assert check(shared, case, answer, torch.zeros(WIDTH), vector) == LAYERS * (100 - start)


@pytest.mark.usefixtures("nobody_left")
def test_every_sequence_of_a_request_is_read(shared: Shared) -> None:
    vector = shared.engine.add_vector({f"resid_post.{EDITED}.add": torch.zeros(WIDTH)})
    case = Case([5, 9, 11, 13], READS[0], number=2000)
    ask = case.ask(vector)
    kind = RequestOutputKind.FINAL_ONLY  # else an output has the choices that it is about, not all
    ask.sampling = {"n": 3, "temperature": 1.0, "seed": 3, "output_kind": kind}
    (output,) = shared.engine.generate(ask)
    call = shared.engine.engine.collective_rpc("whipstaff_captures", args=("read 2000",))
    by_name = shared.engine.run(call)[0]
    assert sorted(by_name) == sorted(case.names) and len(set(case.names)) == 3
    answers = sorted(output.outputs, key=lambda one: one.index)
    assert len({tuple(one.token_ids) for one in answers}) == 3
    for one, name in zip(answers, case.names, strict=True):
        expected = hooked(shared.models["base"], case, [*case.prompt, *one.token_ids[:-1]], torch.zeros(WIDTH))
        (said,) = by_name[name]
        rows = torch.frombuffer(bytearray(said["data"]), dtype=torch.float32).view(said["shape"])
        for point, values in zip(STREAMS, rows, strict=True):
            torch.testing.assert_close(values, expected[point, True], atol=TOLERANCE, rtol=TOLERANCE)
