"""Methods that read what the model computes: the last layer's attention (opera_lite) and the hidden states of all
positions (contrastive_search), in whole engines, token by token against plain transformers with nothing cached.

Each engine has a step budget smaller than the long prompts (chunked prefill), blocks for a part of the requests only
(preemption), prompts that share prefixes, which the second round finds cached, and room for the hidden states of fewer
requests than ask for it.
"""

from dataclasses import dataclass, field
from typing import Any

import pytest
import tiny
import torch
from decodings import StubPrompt
from engines import Ask, EngineUnderTest, edit
from reference import contrastive_search, opera_lite, steered
from torch import Tensor

from whipstaff.decoding.methods.contrastive_search import ContrastiveSearchParams
from whipstaff.decoding.methods.opera_lite import OperaLite, OperaLiteParams
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term
from whipstaff.decoding.plan import DecodingPlan, Explain, Rewrite
from whipstaff.server.engine.frontend.selftest import Finding, self_test
from whipstaff.server.plan import CompanionPlan, RequestPlan
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Where

from .conftest import Ahead

pytestmark = pytest.mark.engine

NUM_TOKENS, GUIDANCE = 12, 1.7
LEANING = {"scale_factor": 150.0, "switch_length": 3, "penalty_cap": 6.0}  # a random model looks nowhere for long


@dataclass
class Case:
    """A request in both worlds."""

    prompt: list[int]
    opera: dict[str, Any] | None = None
    contrastive: dict[str, Any] | None = None
    scale: float = 0.0  # of the vector, on every token
    weight: float = 0.0  # of the auxiliary model
    negative: tuple[int, ...] = ()  # another prompt, from which the request is guided away
    num_tokens: int = NUM_TOKENS
    told: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Bench:
    mode: str
    engine: EngineUnderTest
    vector: Vector
    base: Any
    other: Any

    @property
    def is_slow(self) -> bool:
        return self.mode.startswith("v2")  # Triton's interpreter

    def ask(self, case: Case) -> Ask:
        rewrites = []
        if case.opera is not None:
            setting = OperaLite().at_prompt(OperaLiteParams(**case.opera), StubPrompt(len(case.prompt)))
            rewrites.append(Rewrite("opera_lite", setting.model_dump_json()))
        if case.contrastive is not None:
            params = ContrastiveSearchParams(**case.contrastive)
            rewrites.append(Rewrite("contrastive_search", params.model_dump_json()))
        mix = Mix.of({"other": case.weight}) if case.weight else None
        if case.negative:
            mix = Mix((Term(MAIN, GUIDANCE, True), Term(Stream("", 1), 1 - GUIDANCE, True)))
        edits = (edit(self.vector, case.scale, Where.of("all")),) if case.scale else ()
        keeps_hidden, case.told = case.contrastive is not None, []
        decoding = (
            DecodingPlan(mix, tuple(rewrites), explain=Explain(1), keeps_hidden=keeps_hidden)
            if mix or rewrites
            else None
        )
        plan = RequestPlan(
            SteeringPlan(edits), decoding, companions=(CompanionPlan(case.negative),) if case.negative else ()
        )
        return Ask(case.prompt, plan, case.num_tokens, told=case.told)

    def seen(self, case: Case, ids: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(V,) logits and (H,) last hidden state after a text, and (T, T) what its tokens look at in the last layer."""
        found: dict[str, Tensor] = {}
        hooks = [
            self.base.model.norm.register_forward_hook(lambda m, i, output: found.update(hidden=output[0])),
            self.base.model.layers[-1].self_attn.register_forward_hook(
                lambda m, i, output: found.update(attention=output[1][0].amax(0))
            ),
        ]
        edits = [
            steered.Edit(site, layer, case.scale, None, parts["add"], lambda position, prompt_len: True)
            for (site, layer), parts in (self.vector.tensors.items() if case.scale else ())
        ]
        try:
            logits = steered.logits(self.base, ids, len(case.prompt), edits)[-1]
            return logits, found["hidden"], found["attention"]
        finally:
            for hook in hooks:
                hook.remove()

    def check(self, case: Case, tokens: list[int]) -> int:
        """Every token is the best; how many of them the model alone would not have said."""
        assert len(tokens) == case.num_tokens
        ids, changed = list(case.prompt), 0
        for step, token in enumerate(tokens):
            row, hidden, attention = self.seen(case, ids)
            plain = int(row.argmax())
            if case.weight:
                row = row + case.weight * steered.logits(self.other, ids, len(case.prompt), [])[-1]
            if case.negative:
                away = steered.logits(self.base, [*case.negative, *ids[len(case.prompt) :]], 0, [])[-1]
                row = GUIDANCE * row.log_softmax(-1) + (1 - GUIDANCE) * away.log_softmax(-1)
            if case.opera is not None:
                row = self.leant(case, row, attention, step)
            wanted = int(row.argmax())
            if case.contrastive is not None:
                params = ContrastiveSearchParams(**case.contrastive)

                def feed(tried: int, ids: tuple[int, ...] = tuple(ids)) -> list[float]:
                    state: list[float] = self.seen(case, [*ids, tried])[1][-1].tolist()
                    return state

                wanted, scores = contrastive_search.choose(
                    row.tolist(), hidden.tolist(), feed, params.k, params.penalty_alpha
                )
                p = float(row.softmax(0)[wanted])
                likeness = ((1 - params.penalty_alpha) * p - scores[wanted]) / params.penalty_alpha
                assert case.told[step]["facts"]["likeness"] == pytest.approx(likeness, abs=1e-5)
            assert token == wanted, (case, ids, token, row.topk(3))
            changed += token != plain
            ids.append(token)
        return changed

    def leant(self, case: Case, row: Tensor, attention: Tensor, step: int) -> Tensor:
        """A row of logits as opera_lite makes it; what the engine read of attention is what transformers say."""
        params = OperaLite().at_prompt(OperaLiteParams(**case.opera or {}), StubPrompt(len(case.prompt)))
        text = [line[: index + 1] for index, line in enumerate(attention.tolist())]
        wanted = opera_lite.penalty(text, len(case.prompt), params, params.span)
        told = case.told[step]["facts"]["penalty"]
        assert told == pytest.approx(wanted, abs=1e-5) if wanted < 0 else told == pytest.approx(wanted, rel=1e-3)
        return torch.tensor(opera_lite.rewrite(row.tolist(), wanted, params.candidates))


@pytest.fixture(scope="module")
def bench(ahead: Ahead) -> Bench:
    return Bench(ahead.mode, ahead.engine, ahead.vector, ahead.base, ahead.other)


def prompt(length: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return (3 + torch.randint(tiny.VOCABULARY - 3, (length,), generator=random)).tolist()


def test_one_of_each(bench: Bench) -> None:
    leaning = Case(prompt(9), opera=LEANING)
    unlike = Case(prompt(11, 1), contrastive={"penalty_alpha": 0.7, "k": 4})
    for case in (leaning, unlike):
        (tokens,) = bench.engine.tokens(bench.ask(case))
        assert bench.check(case, tokens) > 0


def test_in_a_mixed_batch(bench: Bench) -> None:
    """Beside others, under chunked prefill, preemption and, the second time, cached prefixes."""
    contrastive = {"penalty_alpha": 0.6, "k": 3}
    cases = [
        Case(prompt(9, 1), opera=LEANING),
        Case(prompt(70, 2)),
        Case(prompt(70, 3), contrastive=contrastive),
        Case(prompt(33, 4), opera=LEANING, scale=1.5),
        Case(prompt(64, 3)[:64], opera={"span": [(7, 8)], "switch_length": 100, "penalty_weight": 3.0}),
        Case(prompt(31, 6), scale=1.5),
        Case(prompt(62, 7), contrastive=contrastive, scale=1.5),
        Case(prompt(40, 2), opera=LEANING | {"candidates": 20}, weight=0.7, num_tokens=20),
        Case(prompt(5, 8), weight=-0.5),
        Case(prompt(30, 12), opera=LEANING, negative=tuple(prompt(31, 13))),
        Case(prompt(35, 14), contrastive=contrastive, weight=0.7),
        Case(prompt(40, 3), contrastive=contrastive, opera=LEANING),
        Case(prompt(95, 15), opera=LEANING | {"history": 3}),
    ]
    if bench.is_slow:
        cases = [case for case in cases if len(case.prompt) < 65][::2]
    changed = 0
    for _ in range(1 if bench.is_slow else 2):
        for case, tokens in zip(cases, bench.engine.tokens(*map(bench.ask, cases)), strict=True):
            changed += bench.check(case, tokens)
    assert changed > 0
    bench.engine.generate(Ask([5, 6, 7], max_tokens=1))  # so that the worker hears of the last to finish
    assert bench.engine.counters()["requests_held"] == 0


def test_hidden_states_are_free_again(bench: Bench) -> None:
    """There is room for two requests at a time, and those that go away give it back."""
    asks = [bench.ask(Case(prompt(12 + index, 60 + index), contrastive={"k": 2}, num_tokens=4)) for index in range(5)]
    for ask in asks[:3]:
        ask.abort_after = 1
    for _ in range(1 if bench.is_slow else 2):
        assert [one is not None and len(one.outputs[0].token_ids) for one in bench.engine.generate(*asks)][3:] == [4, 4]


def test_the_self_test_tries_both(bench: Bench) -> None:
    if bench.is_slow:
        pytest.skip("the same is shown on the legacy runner; here the interpreter takes minutes")

    async def findings() -> list[Finding]:
        return [finding async for finding in self_test(bench.engine.engine, [])]

    found = bench.engine.run(findings())
    assert found[-1] == Finding("hidden states that are kept", True, True)
    assert Finding("attention of the last layer", True, True) in found
