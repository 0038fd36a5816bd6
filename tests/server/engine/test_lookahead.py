"""Methods that try tokens before one is chosen, in whole engines: knowledge weighted decoding with the classifier that
looks one token ahead, token by token against a loop over plain transformers that feeds every candidate from scratch.

Each engine has a step budget smaller than the long prompts (chunked prefill), blocks for a part of the requests only
(preemption) and prompts that share prefixes, which the second round finds cached.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch
from engines import Ask, EngineUnderTest, edit
from reference import conditioned, steered
from reference import kwd as reference
from torch import Tensor

from whipstaff.decoding.methods.dola import Dola, DolaParams
from whipstaff.decoding.methods.kwd import KwdParams
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term
from whipstaff.decoding.plan import DecodingPlan, Rewrite
from whipstaff.decoding.rows import Rows
from whipstaff.server.engine.frontend.selftest import Finding, self_test
from whipstaff.server.plan import CompanionPlan, RequestPlan
from whipstaff.steering.method import HookPoint
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.vector_file import Header, Vector
from whipstaff.steering.where import Where

from .conftest import MAX_LEN, Ahead

pytestmark = pytest.mark.engine

NUM_TOKENS, HIDDEN, EARLY, GUIDANCE = 10, 96, (1,), 1.7


@dataclass
class Case:
    """A request in both worlds."""

    prompt: list[int]
    k: int = 0  # of the classifier; 0: none
    looks_ahead: bool = True
    scale: float = 0.0  # of the vector, on every token
    weight: float = 0.0  # of the auxiliary model
    is_dola: bool = False
    negative: tuple[int, ...] = ()  # another prompt, from which the request is guided away
    num_tokens: int = NUM_TOKENS


@dataclass
class Bench:
    mode: str
    engine: EngineUnderTest
    heads: dict[bool, Vector]  # whether it looks ahead -> classifier
    vector: Vector
    base: Any
    other: Any

    @property
    def is_slow(self) -> bool:
        return self.mode.startswith("v2")  # Triton's interpreter

    def ask(self, case: Case) -> Ask:
        rewrites = []
        if case.is_dola:
            rewrites.append(Rewrite("dola", DolaParams(layers=list(EARLY)).model_dump_json(), early=EARLY))
        if case.k:
            params = KwdParams(classifier="it", k=case.k)
            rewrites.append(Rewrite("kwd", params.model_dump_json(), heads=(self.heads[case.looks_ahead].digest,)))
        mix = Mix.of({"other": case.weight}) if case.weight else None
        if case.negative:
            mix = Mix((Term(MAIN, GUIDANCE, True), Term(Stream("", 1), 1 - GUIDANCE, True)))
        edits = (edit(self.vector, case.scale, Where.of("all")),) if case.scale else ()
        steering = SteeringPlan(edits, keeps=EARLY if case.is_dola else ())
        decoding = DecodingPlan(mix, tuple(rewrites)) if mix or rewrites else None
        plan = RequestPlan(steering, decoding, companions=(CompanionPlan(case.negative),) if case.negative else ())
        return Ask(case.prompt, plan, case.num_tokens)

    def streams(self, case: Case, ids: list[int]) -> tuple[Tensor, Tensor]:
        """(V,) logits and (H,) last hidden state after a text."""
        seen: list[Tensor] = []
        handle = self.base.model.norm.register_forward_hook(lambda m, i, output: seen.append(output[0, -1]))
        edits = [
            steered.Edit(site, layer, case.scale, None, parts["add"], lambda position, prompt_len: True)
            for (site, layer), parts in (self.vector.tensors.items() if case.scale else ())
        ]
        try:
            return steered.logits(self.base, ids, len(case.prompt), edits)[-1], seen[0]
        finally:
            handle.remove()

    def scores(self, case: Case, ids: list[int]) -> Tensor:
        """(V,) what the next token is the best of."""
        row, hidden = self.streams(case, ids)
        if case.weight:
            row = row + case.weight * steered.logits(self.other, ids, len(case.prompt), [])[-1]
        if case.negative:
            away = steered.logits(self.base, [*case.negative, *ids[len(case.prompt) :]], 0, [])[-1]
            row = GUIDANCE * row.log_softmax(-1) + (1 - GUIDANCE) * away.log_softmax(-1)
        if case.is_dola:
            row = self.contrasted(row, ids)
        if not case.k:
            return row
        head = self.heads[case.looks_ahead].shared_parts
        if not case.looks_ahead:
            return torch.tensor(reference.rewrite(row.tolist(), (head["weight"] @ hidden).tolist(), case.k))

        def judge(token: int) -> float:
            classes = head["weight"] @ self.streams(case, [*ids, token])[1] + head["bias"]
            return float(classes.softmax(-1)[1])

        return torch.tensor(reference.rewrite_ahead(row.tolist(), judge, case.k))

    def contrasted(self, row: Tensor, ids: list[int]) -> Tensor:
        """(V,) what DoLa makes of the last row of a text that nobody steers."""
        with torch.no_grad():
            hidden = self.base(torch.tensor([ids]), output_hidden_states=True).hidden_states
            early = self.base.lm_head(torch.stack([hidden[layer][0, -1] for layer in EARLY]))
        rows = Rows(row[None].clone(), [1], [0], early_exit=early, early_layers=[EARLY])
        return Dola().rewrite(rows, [DolaParams(layers=list(EARLY))])[0]

    def check(self, case: Case, tokens: list[int]) -> int:
        """Every token is the best; how many of them the model alone would not have said."""
        assert len(tokens) == case.num_tokens
        ids, changed = list(case.prompt), 0
        for token in tokens:
            scores = self.scores(case, ids)
            assert token == int(scores.argmax()), (case, ids, token, scores.topk(3))
            changed += token != int(self.streams(case, ids)[0].argmax())
            ids.append(token)
        return changed


@pytest.fixture(scope="module")
def bench(ahead: Ahead) -> Bench:
    return Bench(ahead.mode, ahead.engine, _heads(ahead.engine), ahead.vector, ahead.base, ahead.other)


def _heads(engine: EngineUnderTest) -> dict[bool, Vector]:
    random = torch.Generator().manual_seed(3)
    ahead = {"weight": torch.randn(2, HIDDEN, generator=random), "bias": torch.tensor([0.5, -0.5])}
    now = {"weight": torch.randn(tiny.VOCABULARY, HIDDEN, generator=random)}
    return {
        True: engine.add_vector(ahead, Header(method="prefix_classifier", model=engine.shape)),
        False: engine.add_vector(now, Header(method="token_classifier", model=engine.shape)),
    }


def prompt(length: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return (3 + torch.randint(tiny.VOCABULARY - 3, (length,), generator=random)).tolist()


def test_the_best_of_tokens_that_were_tried(bench: Bench) -> None:
    case = Case(prompt(9), k=5)
    (tokens,) = bench.engine.tokens(bench.ask(case))
    assert bench.check(case, tokens) > 0


def test_in_a_mixed_batch(bench: Bench) -> None:
    """Beside others, under chunked prefill, preemption and, the second time, cached prefixes."""
    cases = [
        Case(prompt(9, 1), k=5),
        Case(prompt(70, 2)),
        Case(prompt(70, 3), k=8),
        Case(prompt(33, 4), k=6, scale=1.5),
        Case(prompt(30, 5), k=6, looks_ahead=False),
        Case(prompt(31, 6), scale=1.5),
        Case(prompt(62, 7), k=3, weight=0.7),
        Case(prompt(40, 2)[:40], k=12, num_tokens=20),
        Case(prompt(5, 8), weight=-0.5),
        Case(prompt(30, 12), k=4, negative=tuple(prompt(31, 13))),
        Case(prompt(63, 14), k=4, is_dola=True),
        Case(prompt(95, 15), k=4),
    ]
    if bench.is_slow:
        cases = cases[::2]
    dola = Case(prompt(12, 9), is_dola=True)
    (alone,) = bench.engine.tokens(bench.ask(dola))
    changed = 0
    for _ in range(1 if bench.is_slow else 2):
        *found, beside = bench.engine.tokens(*map(bench.ask, [*cases, dola]))
        for case, tokens in zip(cases, found, strict=True):
            changed += bench.check(case, tokens)
        assert beside == alone
    assert changed > 0
    bench.engine.generate(Ask([5, 6, 7], max_tokens=1))  # so that the worker hears of the last to finish
    assert bench.engine.counters()["requests_held"] == 0


def test_up_to_the_last_token_that_the_model_knows(bench: Bench) -> None:
    case = Case(prompt(MAX_LEN - 4, 11), k=5, num_tokens=4)
    (tokens,) = bench.engine.tokens(bench.ask(case))
    bench.check(case, tokens)
    (again,) = bench.engine.tokens(replace(bench.ask(case), max_tokens=4))
    assert again == tokens


def test_rows_that_enter_a_new_block_together(bench: Bench) -> None:
    """The place where a token is tried is the request's own, also before any of the block is computed."""
    cases = [Case(prompt(29, 20 + index), k=4, num_tokens=6) for index in range(3 if bench.is_slow else 6)]
    for case, tokens in zip(cases, bench.engine.tokens(*map(bench.ask, cases)), strict=True):
        bench.check(case, tokens)


def test_what_is_kept_of_a_prompt_that_is_scored_stays(bench: Bench) -> None:
    """DoLa scores prompts by streams that are read once the step's tokens are drawn."""
    if bench.is_slow:
        pytest.skip("the same is shown on the legacy runner; here the interpreter takes minutes")
    scored = [bench.ask(Case(prompt(90, 30 + index), is_dola=True, num_tokens=1)) for index in range(3)]
    for ask in scored:
        ask.sampling = {"prompt_logprobs": 0}
    running = [
        bench.ask(Case(prompt(6, 40 + index), k=3, is_dola=True, num_tokens=4 + 2 * index)) for index in range(8)
    ]
    alone = [_scores(bench.engine.generate(ask)[0]) for ask in scored]
    together = bench.engine.generate(*running, *scored)[len(running) :]
    for one, other in zip(alone, map(_scores, together), strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def _scores(output: Any) -> list[float]:
    """Of a prompt's tokens but the first."""
    ids, said = output.prompt_token_ids[1:], output.prompt_logprobs[1:]
    return [position[token].logprob for token, position in zip(ids, said, strict=True)]


def test_it_tries_tokens_under_conditions_and_schedules(bench: Bench) -> None:
    """What a token is steered by depends on what was read, of the tokens before it and of itself; and what was read of
    a token that was only tried is forgotten."""
    random = torch.Generator().manual_seed(8)
    direction, text = 0.3 * torch.randn(HIDDEN, generator=random), prompt(40, 16)
    file = bench.engine.add_vector(
        {"resid_post.0.direction": direction}, Header(method="probe", model=bench.engine.shape)
    )
    probe = conditioned.Probe(file.digest, 0, direction)
    seen = conditioned.Trace([], {}, {}, [set()], math.inf)
    entry = conditioned.Entry({}, 0.0, lambda position, prompt_len: True, when=conditioned.When(probe, 0.0))
    conditioned._forward(bench.base, text, len(text), [entry], seen)
    known = sorted(seen.readings[file.digest])
    low, high = ((known[share] + known[share + 1]) / 2 for share in (17, 21))
    said: dict[str, Any] = {
        "when": {"probe": "p", "above": high, "release": low, "decide": "step"},
        "schedule": {"shape": "linear", "from": 1.5, "to": 0.5, "tokens": 9},
    }
    planner = Planner()
    params = SteeringParams.model_validate({"vector": "v", "where": "all", "layers": [2]} | said)
    planner.add(params, {"scale": 2.5}, bench.vector, file)
    adds = {2: bench.vector.tensors[HookPoint("resid_post", 2)]["add"]}
    when = conditioned.When(probe, high, True, low, is_once=False)
    edit_ = conditioned.Entry(adds, 2.5, lambda position, prompt_len: True, when=when, schedule=said["schedule"])
    trace = conditioned.Trace([], {}, {}, [set()], math.inf)

    def streams(ids: list[int]) -> tuple[Tensor, Tensor]:
        found: list[Tensor] = []
        handle = bench.base.model.norm.register_forward_hook(lambda m, i, output: found.append(output[0, -1]))
        try:
            return conditioned._forward(bench.base, ids, len(text), [edit_], trace).float(), found[0]
        finally:
            handle.remove()

    head, ids = bench.heads[True].shared_parts, list(text)
    case = bench.ask(Case(text, k=6))
    assert case.plan is not None
    case.plan = replace(case.plan, steering=planner.plan, readings_id="ticket " + bench.mode)
    beside = Case(prompt(20, 17), k=4)
    tokens, others = bench.engine.tokens(case, bench.ask(beside))
    bench.check(beside, others)
    for token in tokens:

        def judge(tried: int) -> float:
            classes = head["weight"] @ streams([*ids, tried])[1] + head["bias"]
            return float(classes.softmax(-1)[1])

        scores = torch.tensor(reference.rewrite_ahead(streams(ids)[0].tolist(), judge, 6))
        assert token == int(scores.argmax()), (ids, token, scores.topk(3))
        ids.append(token)
    streams(ids[:-1])
    assert len(trace.opened[0]) > 0 and trace.margin > 1e-4
    (read,) = bench.engine.run(bench.engine.engine.collective_rpc("whipstaff_readings", args=(case.plan.readings_id,)))[
        0
    ]
    assert read["positions"] == len(ids) - 1
    readings = zip(read["columns"][0], trace.readings[file.digest], strict=True)
    pairs = [(said, expected) for said, expected in readings if said is not None]
    assert pairs and all(said == pytest.approx(expected, abs=1e-3) for said, expected in pairs)


def test_the_self_test_tries_it(bench: Bench) -> None:
    if bench.is_slow:
        pytest.skip("the same is shown on the legacy runner; here the interpreter takes minutes")

    async def findings() -> list[Finding]:
        return [finding async for finding in self_test(bench.engine.engine, [])]

    assert Finding("tokens that are tried", True, True) in bench.engine.run(findings())
