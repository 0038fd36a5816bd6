"""What heads look at is what transformers' attention says, whatever runs beside those who ask."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from engines import Ask, edit
from torch import Tensor

from whipstaff.server.admission.captured import NamedSequence, attention_read
from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.steering.plan import PlannedAttention, SteeringPlan
from whipstaff.steering.where import Where

from .conftest import Ahead

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
ALL, GENERATION = Where.of("all"), Where.of("generation")
SOME = Where(prompt=[(3, 9), (-4, None)], generation=[(1, 3)])
LOOKS: list[tuple[PlannedAttention, ...]] = [
    (PlannedAttention(2, (0, 1, 2, 3), GENERATION),),
    (PlannedAttention(0, (3, 1), ALL), PlannedAttention(1, (2,), SOME)),
    (PlannedAttention(1, (0, 1, 2, 3), SOME), PlannedAttention(2, (2,), Where.of("prompt"))),
    (),
]


@dataclass
class Case:
    """A request and what it wants to know."""

    number: int
    prompt: list[int]
    looks: tuple[PlannedAttention, ...]
    scale: float = 0.0  # of the vector
    max_tokens: int = 12
    names: list[str] = field(default_factory=list)

    def ask(self, ahead: Ahead, looks: bool = True) -> Ask:
        edits = (edit(ahead.vector, self.scale, ALL),) if self.scale else ()
        own = self.looks if looks else ()
        steering = SteeringPlan(edits, attention=own)
        most = len(self.prompt) + self.max_tokens - 1
        self.plan = RequestPlan(steering, captures_id=f"look {self.number}" if own else "", max_fed=most)
        return Ask(self.prompt, self.plan if edits or own else None, self.max_tokens, names=self.names)


def cases(num: int) -> list[Case]:
    """With long and short prompts, some of which begin alike; pushed and not, asking and not."""
    random = torch.Generator().manual_seed(7)

    def tokens(length: int) -> list[int]:
        return torch.randint(3, 300, (length,), generator=random).tolist()

    starts = [tokens(40) for _ in range(2)]
    return [
        Case(i, [*starts[i % 2], *tokens(3 + 11 * (i % 5))], LOOKS[i % 4], (0.0, 1.0)[i // 4 % 2], (40, 6)[i % 2])
        for i in range(num)
    ]


@torch.inference_mode()
def attentions(ahead: Ahead, case: Case, ids: list[int]) -> tuple[Tensor, ...]:
    """(heads, T, T) of every layer, by transformers."""
    handles = []
    for point, parts in ahead.vector.tensors.items() if case.scale else ():
        add = case.scale * parts["add"]

        def leaving(_: Any, __: Any, output: Any, add: Tensor = add) -> Any:
            return (output[0] + add, *output[1:]) if isinstance(output, tuple) else output + add

        handles.append(ahead.base.model.layers[point.layer].register_forward_hook(leaving))
    try:
        return tuple(one[0] for one in ahead.base(torch.tensor([ids]), output_attentions=True).attentions)
    finally:
        for handle in handles:
            handle.remove()


def check(ahead: Ahead, case: Case, answer: list[int]) -> int:
    """Compare everything that was told. How many rows."""
    ids, num = [*case.prompt, *answer[:-1]], 0
    call = ahead.engine.engine.collective_rpc("whipstaff_captures", args=(f"look {case.number}",))
    ranks = ahead.engine.run(call)
    expected, placed = attentions(ahead, case, ids), PositionedPlan(case.plan, len(case.prompt))
    read = attention_read(NamedSequence(0, case.names[0], len(ids)), placed, ranks)
    for look, at, found in zip(case.looks, placed.attended, read, strict=True):
        wanted = [position for start, end in at.intervals for position in range(start, min(end, len(ids)))]
        assert found.positions.tolist() == wanted
        own = expected[look.layer][list(look.heads)][:, wanted].transpose(0, 1)
        torch.testing.assert_close(found.rows, own, atol=TOLERANCE, rtol=TOLERANCE)
        num += len(wanted) * len(look.heads)
    return num


def test_what_heads_look_at_is_what_transformers_says(ahead: Ahead) -> None:
    """Of requests in chunks, with cached prefixes and preemptions; half are pushed, a quarter asks nothing."""
    some, before = cases(24), ahead.engine.num_preemptions
    ahead.engine.generate(*(case.ask(ahead, looks=False) for case in some[:2]))
    for case in some[:2]:
        case.names.clear()
    answers = ahead.engine.tokens(*(case.ask(ahead) for case in some))
    assert ahead.engine.num_preemptions > before
    num = sum(check(ahead, case, answer) for case, answer in zip(some, answers, strict=True) if case.looks)
    assert num > 2000
    ahead.engine.generate(Ask([5, 6, 7], max_tokens=1))  # so that the worker hears of the last to finish
    counters = ahead.engine.counters()
    assert counters["captures_held"] == counters["requests_held"] == 0


def test_the_cache_is_read_for_what_was_generated(ahead: Ahead) -> None:
    """Keys are there; queries are of tokens that are computed."""
    prompt = torch.randint(3, 300, (100,), generator=torch.Generator().manual_seed(9)).tolist()
    ahead.engine.generate(Ask(prompt, max_tokens=1))
    for number, (where, num_cached) in enumerate(((GENERATION, 96), (Where(prompt=[(70, None)]), 64), (ALL, 0)), 1000):
        case = Case(number, prompt, (PlannedAttention(1, (1, 0), where),), max_tokens=4)
        hits = ahead.engine.counters()["prefix_cache_hits"]["steered"]
        (answer,) = ahead.engine.tokens(case.ask(ahead))
        assert ahead.engine.counters()["prefix_cache_hits"]["steered"] - hits == num_cached
        assert check(ahead, case, answer) > 0
