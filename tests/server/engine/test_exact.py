"""Token for token against plain transformers, greedy, float32, in every way the engine can run.

Under chunked prefill and preemption, with prompts that share prefixes and clients that go away in mid-flight.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from engines import Ask, EngineUnderTest, edit, plan, weights
from modes import THREE
from operators import OURS
from reference import steered

from whipstaff.server.engine.frontend.selftest import Finding, self_test
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Region, Where

from .conftest import Shared

pytestmark = [
    pytest.mark.engine,
    pytest.mark.parametrize("shared", [*THREE, "v1-eager-two-ranks", "v1-eager-drafts"], indirect=True),
]

NUM_TOKENS = 14
WHERES = [
    Where.of("each_last"),
    Where.of("all"),
    Where.of("generation"),
    Where.of("last_prompt"),
    Where(prompt=[(0, 3), (-5, -2)], generation=[(2, 6)], exclude=Region(prompt=[(1, 2)], generation=[(3, 4)])),
]
MIXES: list[dict[str, float] | None] = [
    None,
    {"expert": 1.0, "anti": -1.0},
    None,
    {"expert": 2.5, "anti": -2.5},
    {"anti-2": 0.5},
]


KNOWN: dict[str, list[int]] = {}  # references by request: every mode serves the same models and vectors


@dataclass
class Bench:
    """An engine, its vectors, and the same models in transformers."""

    mode: str
    engine: EngineUnderTest
    vectors: list[Vector]
    models: dict[str, torch.nn.Module]

    def reference(self, ask: Ask) -> list[int]:
        key = repr((ask.prompt, ask.plan, ask.max_tokens))
        if key not in KNOWN:
            KNOWN[key] = steered.greedy(
                self.models["base"],
                ask.prompt,
                ask.max_tokens,
                self._edits(ask),
                {self.models[name]: weight for name, weight in weights(ask.plan).items()},
            )
        return KNOWN[key]

    def _edits(self, ask: Ask) -> list[steered.Edit]:
        vectors = {vector.digest: vector for vector in self.vectors}
        edits = []
        for planned in ask.plan.steering.edits if ask.plan and ask.plan.steering else ():
            scale = json.loads(planned.edit.setting)["scale"]
            for (site, layer), parts in vectors[planned.edit.digest].tensors.items():
                if planned.edit.layers is None or layer in planned.edit.layers:
                    edits.append(
                        steered.Edit(site, layer, scale, parts.get("gain"), parts.get("add"), touches(planned.where))
                    )
        return edits


def touches(where: Where) -> Any:
    """The clause as a set of positions, by definition and not by interval arithmetic."""

    def selects(windows: Any, index: int, length: int | None) -> bool:
        if isinstance(windows, str):
            return windows == "all"
        absolute = [
            (s + (length or 0) if s < 0 else s, length if e is None else e + (length or 0) if e < 0 else e)
            for s, e in windows
        ]
        return any(start <= index and (end is None or index < end) for start, end in absolute)

    def region(part: Region, position: int, prompt_len: int) -> bool:
        if position < prompt_len:
            return selects(part.prompt, position, prompt_len)
        return selects(part.generation, position - prompt_len, None)

    return lambda position, prompt_len: (
        region(where, position, prompt_len) and not (where.exclude and region(where.exclude, position, prompt_len))
    )


@pytest.fixture(scope="module")
def bench(shared: Shared) -> Bench:
    return Bench(shared.mode, shared.engine, list(_vectors(shared.engine)), shared.models)


def _vectors(engine: EngineUnderTest) -> Iterator[Vector]:
    generator = torch.Generator().manual_seed(11)
    shape = engine.shape
    for _ in range(4):
        tensors = {}
        for layer in range(shape.num_layers):
            for name, size in (("resid_post", (shape.hidden_size,)), ("attn_head", (shape.num_heads, shape.head_dim))):
                tensors[f"{name}.{layer}.add"] = 0.3 * torch.randn(size, generator=generator)
                tensors[f"{name}.{layer}.gain"] = 0.2 * torch.randn(size, generator=generator)
        yield engine.add_vector(tensors)


def mixed_asks(bench: Bench, num: int, seed: int) -> list[Ask]:
    """Plain, steered (none to three vectors, every kind of clause), proxy-tuned, and both, over shared prefixes."""
    generator = torch.Generator().manual_seed(seed)

    def pick(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    stem = torch.randint(3, tiny.VOCABULARY, (96,), generator=torch.Generator().manual_seed(1)).tolist()
    asks = []
    for index in range(num):
        tail = torch.randint(3, tiny.VOCABULARY, (1 + pick(6),), generator=generator).tolist()
        prompt = stem[: (6, 33, 64, 90)[pick(4)]] + tail
        edits = tuple(
            edit(bench.vectors[pick(4)], 0.5 + 0.25 * pick(4), layers=(None, (1, 2))[pick(2)], where=WHERES[pick(5)])
            for _ in range(index % 4)
        )
        asks.append(Ask(prompt, plan(SteeringPlan(edits) if edits else None, MIXES[pick(5)]), NUM_TOKENS))
    return asks


def test_mixed_batches(bench: Bench, nobody_left: None) -> None:
    """32 different requests at once, twice: the second time their prefixes are cached."""
    num = 18 if bench.mode.startswith("v2") else 32
    asks = mixed_asks(bench, num, seed=5)
    expected = [bench.reference(ask) for ask in asks]
    assert len({tuple(tokens) for tokens in expected}) > num // 2
    for _ in range(2):
        assert bench.engine.tokens(*asks) == expected


def test_aborts_leave_the_others_alone(bench: Bench, nobody_left: None) -> None:
    asks = mixed_asks(bench, 18, seed=6)
    for index, ask in enumerate(asks):
        if index % 3 == 0:
            ask.abort_after = 1 + index % 5
            ask.sampling = {"output_kind": 1}  # deltas, so that there is something to go away from
    outputs = bench.engine.generate(*asks)
    for ask, output in zip(asks, outputs, strict=True):
        if ask.abort_after is None:
            assert list(output.outputs[0].token_ids) == bench.reference(ask)
        else:
            assert output is None


def test_neighbours_change_nothing(bench: Bench, nobody_left: None) -> None:
    """A plain request's tokens and log-probabilities are the same among steered requests as among plain ones."""
    plain = [Ask(ask.prompt, None, NUM_TOKENS, {"logprobs": 3}) for ask in mixed_asks(bench, 5, seed=7)]
    steered_neighbours = [ask for ask in mixed_asks(bench, 16, seed=8) if ask.plan is not None]
    plain_neighbours = [Ask(ask.prompt, None, ask.max_tokens) for ask in steered_neighbours]
    among_plain = bench.engine.generate(*plain, *plain_neighbours)[:5]
    among_steered = bench.engine.generate(*plain, *steered_neighbours)[:5]
    for ask, one, other in zip(plain, among_plain, among_steered, strict=True):
        assert list(one.outputs[0].token_ids) == list(other.outputs[0].token_ids) == bench.reference(ask)
        for before, after in zip(one.outputs[0].logprobs, other.outputs[0].logprobs, strict=True):
            assert before.keys() == after.keys()
            for token, entry in before.items():
                assert entry.logprob == pytest.approx(after[token].logprob, abs=1e-5)


def test_plain_and_steered_steps_alternate(bench: Bench, nobody_left: None) -> None:
    """Steps run the model with its sites or without: requests that go on from one into the other, over prefixes that
    were computed in the other, and a request whose edits end while it runs."""
    asks = mixed_asks(bench, 12, seed=13)
    for ask in asks[1::3]:
        ask.plan = None
    for ask in asks:
        assert bench.engine.tokens(ask) == [bench.reference(ask)]
    early = Where(prompt=[(2, 5)], generation=[(1, 3)])
    ending = Ask(asks[0].prompt, plan(SteeringPlan((edit(bench.vectors[0], 1.0, early),))), 10)
    long = Ask(asks[1].prompt, None, 24)
    for together in ([ending], [long, ending], [long], [ending, asks[2]], [long]):
        assert bench.engine.tokens(*together) == [bench.reference(ask) for ask in together]


def test_a_step_without_edits_executes_none_of_our_operators(bench: Bench, nobody_left: None) -> None:
    """Nor does one in which models are mixed, but for the mix."""
    prompt = [5, 6, 7, 8, 9]

    def operators(*asks: Ask) -> dict[str, int]:
        bench.engine.call("start_counting")
        bench.engine.generate(*asks)
        ran: dict[str, int] = bench.engine.call("stop_counting")
        assert sum(ran.values()) > 100
        return {name.removeprefix(OURS): num for name, num in ran.items() if name.startswith(OURS)}

    plain = [Ask(prompt, None, 6), Ask(prompt[1:], None, 6, {"temperature": 1.0, "seed": 3, "top_p": 0.9})]
    steered = Ask(prompt, plan(SteeringPlan((edit(bench.vectors[0], 1.0, Where.of("all")),))), 6)
    bench.engine.generate(*plain)  # so that what was before is gone
    assert operators(*plain) == {}
    assert operators(steered)["run_bound_edits_"] == 6 * len(bench.engine.facts["sites"])
    bench.engine.generate(*plain)
    assert operators(Ask(prompt, plan(None, {"expert": 1.0}), 6)).keys() == {"mix_logits_"}


def test_preemption_happened(bench: Bench) -> None:
    """The batches above really did not fit: otherwise they prove nothing about recomputed tokens."""
    assert bench.engine.num_preemptions > 0


def test_prompt_logprobs_are_those_of_the_mixed_and_steered_model(bench: Bench, nobody_left: None) -> None:
    """Whatever rows vLLM asks logits for, they carry what mixing needs: here the rows of prompts, chunk by chunk."""
    (ask, *_) = [
        a for a in mixed_asks(bench, 40, 9) if a.plan and a.plan.decoding and a.plan.steering and len(a.prompt) > 64
    ]
    ask.max_tokens, ask.sampling = 1, {"prompt_logprobs": 1}
    others = [a for a in mixed_asks(bench, 6, seed=10)]
    output = bench.engine.generate(ask, *others)[0]
    rows = steered.logits(bench.models["base"], ask.prompt, len(ask.prompt), bench._edits(ask))
    for name, weight in weights(ask.plan).items():
        rows = rows + weight * steered.logits(bench.models[name], ask.prompt, 0, [])[:, : rows.shape[1]]
    expected = rows.log_softmax(-1)
    for position, said in enumerate(output.prompt_logprobs[1:]):
        for token, entry in said.items():
            assert entry.logprob == pytest.approx(expected[position, token].item(), abs=5e-4)


def test_more_configurations_than_slots_wait_their_turn(bench: Bench, nobody_left: None) -> None:
    """60 configurations, 24 slots: nobody fails, nobody runs unsteered; some of them go away while they wait."""
    prompt = [9, 8, 7, 6, 5]
    asks = [
        Ask(
            prompt,
            plan(SteeringPlan((edit(bench.vectors[0], 0.02 * index, Where.of("all")),))),
            max_tokens=4,
        )
        for index in range(60)
    ]
    for ask in asks[40::3]:
        ask.abort_after, ask.sampling = 1, {"output_kind": 1}
    outputs = bench.engine.generate(*asks)
    for ask, output in zip(asks, outputs, strict=True):
        if ask.abort_after is None:
            assert list(output.outputs[0].token_ids) == bench.reference(ask)


def test_auxiliary_models_run_only_when_needed(bench: Bench) -> None:
    before = bench.engine.counters()
    bench.engine.generate(*(Ask([5, 6, 7, 8], max_tokens=4) for _ in range(3)))
    after = bench.engine.counters()
    assert after["auxiliary_steps_run"] == before["auxiliary_steps_run"]
    assert after["steps"] > before["steps"]
    bench.engine.generate(Ask([5, 6, 7, 8], plan(None, {"anti-2": 1.0}), max_tokens=4))
    last = bench.engine.counters()
    assert last["auxiliary_steps_run"]["anti-2"] > after["auxiliary_steps_run"].get("anti-2", 0)
    assert last["auxiliary_steps_run"]["expert"] == after["auxiliary_steps_run"]["expert"]


def test_plain_requests_may_outgrow_an_auxiliary_model(bench: Bench, nobody_left: None) -> None:
    """The expert knows 128 positions; a plain neighbour of 200 shares steps in which the expert runs."""
    long = torch.randint(3, tiny.VOCABULARY, (180,), generator=torch.Generator().manual_seed(2)).tolist()
    asks = [
        Ask(long, None, 20),
        Ask([5, 6, 7], plan(None, {"expert": 1.0, "anti": -1.0}), 30),
        Ask([tiny.VOCABULARY - 1] * 3, plan(None, {"expert": 1.0, "anti": -1.0}), 30),
    ]
    assert bench.engine.tokens(*asks) == [bench.reference(ask) for ask in asks]


def test_seeded_request_with_a_chunked_prefill(bench: Bench, nobody_left: None) -> None:
    """Stock vLLM 0.32 dies of it on CPU. The same seed gives the same tokens, whatever the chunks and neighbours."""
    prompt = torch.randint(3, tiny.VOCABULARY, (100,), generator=torch.Generator().manual_seed(4)).tolist()
    ask = Ask(prompt, None, 8, {"temperature": 1.0, "seed": 1234})
    alone = bench.engine.tokens(ask)[0]
    crowd = [Ask(a.prompt, a.plan, 8) for a in mixed_asks(bench, 6, seed=12)]
    assert bench.engine.tokens(ask, *crowd)[0] == alone
    assert bench.engine.tokens(ask)[0] == alone
    other = Ask(prompt, None, 8, {"temperature": 1.0, "seed": 99})
    assert bench.engine.tokens(other)[0] != alone


def test_the_self_test_finds_every_site_and_auxiliary_model(bench: Bench, nobody_left: None) -> None:
    """What the server does at every start, in this mode: an edit shows, scale 0 does not, nothing is left behind."""

    async def findings() -> list[Finding]:
        return [finding async for finding in self_test(bench.engine.engine, ["expert", "anti", "anti-2"])]

    found = bench.engine.run(findings())
    assert len(found) == len(bench.engine.facts["sites"]) + 3
    assert all(finding.is_good for finding in found), found
