"""Searches in whole engines: beams, OPERA and a tree search, token by token and score by score against the same methods
driven over plain transformers, which computes every text from scratch.

The step budget is smaller than the long prompts (chunked prefill), there are blocks for a part of the requests only
(preemption), and plain, steered, proxy-tuned and guided requests run in the same batch, some of which search.

WHIPSTAFF_SOAK=1 runs 2000 random requests in every mode.
"""

import asyncio
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import pytest
import tiny
import torch
from engines import Ask, EngineUnderTest, edit, running
from modes import WITH_RANKS
from reference import steered
from search_loop import Loop, Ran
from soak import SOAK, tries
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from whipstaff.decoding.mix import MAIN, Mix, Stream, Term
from whipstaff.decoding.plan import DecodingPlan, SearchPlan
from whipstaff.decoding.search.beam_search import BeamSearch, BeamSearchParams
from whipstaff.decoding.search.kcts import Kcts, KctsParams
from whipstaff.decoding.search.opera import Opera, OperaSetting
from whipstaff.decoding.search.search import Decision
from whipstaff.server.engine.frontend.launch import PlanDict
from whipstaff.server.plan import PLAN_KEY, CompanionPlan, RequestPlan
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Header, Vector
from whipstaff.steering.where import Where

pytestmark = pytest.mark.engine

MAX_LEN, BLOCK, HIDDEN, GUIDANCE, EOS = 160, 32, 96, 1.7, (7, 11)
NEAR = 1e-4  # of scores: two answers that near may change places between float32 implementations


@dataclass
class Case:
    """A request in both worlds."""

    prompt: list[int]
    beams: int = 0  # 0: none
    groups: int = 1  # of beams that avoid one another's tokens
    opera: int = 0  # beams that distrust what they lean on; 0: none
    simulations: int = 0  # of a tree search; 0: none
    scale: float = 0.0  # of the vector, on every token
    weight: float = 0.0  # of the auxiliary model
    negative: tuple[int, ...] = ()  # another prompt, from which the request is guided away
    max_tokens: int = 12
    length_penalty: float = 1.0
    ends: tuple[int, ...] = ()
    repetition_penalty: float = 1.0
    after: float = 0.0  # seconds, when it arrives
    abort_after: float | None = None  # seconds from then

    @property
    def method(self) -> Any:
        return BeamSearch() if self.beams else Opera() if self.opera else Kcts()

    @property
    def setting(self) -> Any:
        if self.beams:
            own: dict[str, Any] = {"num_beam_groups": self.groups, "diversity_penalty": 0.5 if self.groups > 1 else 0.0}
            return BeamSearchParams(num_beams=self.beams, length_penalty=self.length_penalty, **own)
        if self.opera:
            when = {"threshold": 2, "switch_length": 2, "visits": 2}
            trusted = ((1, len(self.prompt)),)
            return OperaSetting(beams=self.opera, candidates=max(self.opera, 3), trusted=trusted, **when)
        return KctsParams(classifier="it", k=6, simulations=self.simulations)

    @property
    def searches(self) -> bool:
        return bool(self.beams or self.opera or self.simulations)


@dataclass
class Bench:
    mode: str
    engine: EngineUnderTest
    head: Vector
    vector: Vector
    base: Any
    other: Any

    def plan(self, case: Case) -> RequestPlan:
        mix = Mix.of({"other": case.weight}) if case.weight else None
        if case.negative:
            mix = Mix((Term(MAIN, GUIDANCE, True), Term(Stream("", 1), 1 - GUIDANCE, True)))
        heads = (self.head.digest,) if case.simulations else ()
        setting = case.setting.model_dump_json() if case.searches else ""
        num = max(case.beams, case.opera, 1)
        search = SearchPlan(case.method.name, setting, num, heads) if case.searches else None
        edits = (edit(self.vector, case.scale, Where.of("all")),) if case.scale else ()
        decoding = DecodingPlan(mix, search=search) if mix or search else None
        companions = (CompanionPlan(case.negative),) if case.negative else ()
        return RequestPlan(SteeringPlan(edits) if edits else None, decoding, companions=companions)

    async def answer(self, case: Case) -> tuple[list[int], dict[str, Any]]:
        """The tokens, and what was told of the search."""
        await asyncio.sleep(case.after)
        told: dict[str, Any] = {}
        plan = PlanDict(self.plan(case).to_wire(), explained=lambda index, record: told.update(record))
        params = SamplingParams(
            max_tokens=case.max_tokens,
            temperature=0,
            ignore_eos=True,
            detokenize=False,
            stop_token_ids=list(case.ends),
            repetition_penalty=case.repetition_penalty,
            extra_args={PLAN_KEY: plan},
        )
        outputs = self.engine.engine.generate({"prompt_token_ids": case.prompt}, params, f"test-{uuid4()}")
        seen: list[int] = []

        async def take() -> None:
            async for output in outputs:
                found = list(output.outputs[0].token_ids)
                assert found[: len(seen)] == seen, "what was told is taken back"
                seen[:] = found

        try:
            await asyncio.wait_for(take(), case.abort_after)
        except TimeoutError:
            assert case.abort_after is not None
            await outputs.aclose()
        return seen, told.get("search", {})

    def answers(self, *cases: Case) -> list[tuple[list[int], dict[str, Any]]]:
        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*map(self.answer, cases))

        return self.engine.run(all_of_them())

    def edits(self, case: Case) -> list[steered.Edit]:
        """Of the whole text."""
        return [
            steered.Edit(site, layer, case.scale, None, parts["add"], lambda position, prompt_len: True)
            for (site, layer), parts in (self.vector.tensors.items() if case.scale else ())
        ]

    def scores(self, case: Case, ids: Sequence[int]) -> Tensor:
        """(V,) what the next token is drawn from."""
        row = steered.logits(self.base, list(ids), len(case.prompt), self.edits(case))[-1]
        return self.mixed(case, list(ids), row)

    def mixed(self, case: Case, ids: list[int], row: Tensor) -> Tensor:
        """The same, of the (V,) logits that the model has for a text. Who is steered is not guided here."""
        if case.weight:
            row = row + case.weight * steered.logits(self.other, ids, len(case.prompt), [])[-1]
        if case.negative:
            away = steered.logits(self.base, [*case.negative, *ids[len(case.prompt) :]], 0, [])[-1]
            row = GUIDANCE * row.log_softmax(-1) + (1 - GUIDANCE) * away.log_softmax(-1)
        if case.repetition_penalty != 1:
            said = sorted(set(ids))
            row[said] = torch.where(
                row[said] > 0, row[said] / case.repetition_penalty, row[said] * case.repetition_penalty
            )
        return row

    def expected(self, case: Case) -> Ran:
        def rewritten(texts: Sequence[Sequence[int]], logits: Tensor) -> Tensor:
            return torch.stack([self.mixed(case, list(text), row) for text, row in zip(texts, logits, strict=True)])

        assert not (case.scale and case.negative)
        heads = {"classifier": dict(self.head.shared_parts)} if case.simulations else {}
        loop = Loop(self.base, reads_attention=bool(case.opera), rewrite=rewritten)
        with steered.edited(self.base, len(case.prompt), self.edits(case)):
            return loop.run(case.method, case.setting, case.prompt, case.max_tokens, case.ends, heads)

    def check(self, case: Case, tokens: list[int], told: dict[str, Any]) -> None:
        if not case.searches:
            ids = list(case.prompt)
            for token in tokens:
                assert token == int(self.scores(case, ids).argmax()), (case, ids)
                ids.append(token)
            assert len(tokens) == case.max_tokens and not told
            return
        ran = self.expected(case)
        assert tuple(tokens) == ran.best, case
        assert [tuple(one["tokens"]) for one in told["hypotheses"]] == [one.tokens for one in ran.hypotheses]
        assert [one["finish_reason"] for one in told["hypotheses"]] == [one.finish_reason for one in ran.hypotheses]
        scores = [one["score"] for one in told["hypotheses"]]
        assert scores == pytest.approx([one.score for one in ran.hypotheses], abs=1e-3)

    def is_exact(self, case: Case, tokens: list[int], told: dict[str, Any]) -> bool:
        try:
            self.check(case, tokens, told)
        except AssertionError:
            return False
        return True

    def idle(self) -> None:
        """Nothing is left behind."""
        assert self.engine.run(self.engine.engine.reset_prefix_cache()), "somebody holds blocks"
        self.engine.generate(Ask([5, 6, 7], max_tokens=1))  # so that the worker hears of the last to finish
        counters = self.engine.counters()
        held = "requests_held", "searches_running", "search_sequences_living", "companions_running", "slots_in_use"
        assert {name: counters[name] for name in held} == dict.fromkeys(held, 0)


@pytest.fixture(scope="module", params=WITH_RANKS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder, mode = tmp_path_factory.mktemp("models"), request.param
    path = tiny.save("llama", folder / "base", 0)
    other = tiny.save("llama", folder / "other", 1, hidden_size=64, num_attention_heads=2)
    with running(
        mode,
        path,
        [("other", other)],
        lookahead=True,
        attention_rows=True,
        max_search_seqs=12,
        skip_tokenizer_init=True,
        max_model_len=MAX_LEN,
        max_num_batched_tokens=64,
        max_num_seqs=16,
        num_gpu_blocks_override=28,
        block_size=BLOCK,
        worker_extension_cls="blocks.WatchesBlocks",
    ) as engine:
        random = torch.Generator().manual_seed(5)
        vector = engine.add_vector(
            {f"resid_post.{layer}.add": 0.4 * torch.randn(HIDDEN, generator=random) for layer in (0, 2)}
        )
        parts = {"weight": torch.randn(2, HIDDEN, generator=random), "bias": torch.tensor([0.5, -0.5])}
        head = engine.add_vector(parts, Header(method="prefix_classifier", model=engine.shape))
        models = [
            AutoModelForCausalLM.from_pretrained(one, dtype=torch.float32, attn_implementation="eager")
            for one in (path, other)
        ]
        yield Bench(mode, engine, head, vector, *models)


def prompt(length: int, seed: int = 0) -> list[int]:
    random = torch.Generator().manual_seed(seed)
    return (3 + torch.randint(tiny.VOCABULARY - 3, (length,), generator=random)).tolist()


def test_beams_alone(bench: Bench) -> None:
    case = Case(prompt(9), beams=4, ends=EOS)
    ((tokens, told),) = bench.answers(case)
    bench.check(case, tokens, told)
    assert told["counts"]["forks"] > 3 and told["counts"]["tokens_computed"] > case.max_tokens
    bench.idle()


def test_a_tree_search_goes_back(bench: Bench) -> None:
    case = Case(prompt(33, 1), simulations=8, max_tokens=5)
    ((tokens, told),) = bench.answers(case)
    bench.check(case, tokens, told)
    assert bench.engine.counters()["search_rollbacks"] > 0
    bench.idle()


def test_in_a_mixed_batch(bench: Bench) -> None:
    cases = [
        Case(prompt(9, 1), beams=4, ends=EOS),
        Case(prompt(70, 2)),
        Case(prompt(70, 3), beams=3, length_penalty=0.0),
        Case(prompt(33, 4), beams=3, scale=1.5, ends=EOS),
        Case(prompt(31, 6), scale=1.5),
        Case(prompt(62, 7), weight=0.7),
        Case(prompt(61, 8), beams=2, weight=0.7),
        Case(prompt(30, 12), negative=tuple(prompt(31, 13))),
        Case(prompt(30, 14), beams=2, negative=tuple(prompt(61, 15))),
        Case(prompt(31, 16), simulations=6, max_tokens=4),
        Case(prompt(1, 17), beams=3),
        Case(prompt(29, 18), beams=4, repetition_penalty=1.4, max_tokens=20),
        Case(prompt(30, 19), opera=2, max_tokens=16),
        Case(prompt(33, 20), opera=3, scale=1.5),
        Case(prompt(62, 21), opera=1, weight=0.7),
        Case(prompt(12, 22), beams=4, groups=2, ends=EOS),
        Case(prompt(32, 23), simulations=6, max_tokens=4, scale=1.5),
    ]
    for _ in range(1 if bench.mode.startswith("v2") else 2):
        for case, (tokens, told) in zip(cases, bench.answers(*cases), strict=True):
            bench.check(case, tokens, told)
    bench.idle()


def test_what_is_kept_is_never_computed_again(bench: Bench) -> None:
    """Every step computes one token of each beam. The blocks that beams have, and those that are copied, are as many as
    their texts say: full ones are shared as far as texts are alike, and a fork copies the one that it goes on in."""
    case = Case(prompt(62, 77), beams=4, max_tokens=42)
    bench.engine.call("start_watching")
    ((tokens, told),) = bench.answers(case)
    steps = bench.engine.call("stop_watching")
    ran = bench.expected(case)
    assert tuple(tokens) == ran.best
    assert sum(sum(step["tokens"].values()) for step in steps) == len(case.prompt) + 4 * (case.max_tokens - 1)
    assert told["counts"]["tokens_computed"] == 4 * (case.max_tokens - 1)
    searched, num_copies = [step for step in steps if set(step["tokens"].values()) == {1}], 0
    for step, texts, decision in zip(searched, ran.texts, [Decision(), *ran.decisions], strict=False):
        whole = [(*case.prompt, *text) for text in texts]
        num_known = len(whole[0]) - 1  # before the step
        full = {text[: end + BLOCK] for text in whole for end in range(0, num_known - BLOCK + 1, BLOCK)}
        blocks = list(step["blocks"].values())
        own = sum(len(one) - num_known // BLOCK for one in blocks)
        assert len(blocks) == len(texts)
        assert len({block for one in blocks for block in one}) == len(full) + own, num_known
        forks = len(decision.living) - len({one.source for one in decision.living})
        assert len(step["copies"]) == (forks if num_known % BLOCK else 0)
        num_copies += len(step["copies"])
    assert 0 < num_copies <= told["counts"]["forks"] and len(searched) == case.max_tokens
    bench.idle()


def test_nothing_is_left_of_what_is_cut_off_while_it_goes_back(bench: Bench) -> None:
    """Searches that go back, and that are preempted since plain requests grow which came before them, and whose clients
    leave once both have happened."""
    cases = [Case(prompt(70, 80 + index), max_tokens=88) for index in range(5)]
    cases += [Case(prompt(70, 90 + index), beams=4, max_tokens=60) for index in range(2)]
    cases += [Case(prompt(40, 95 + index), simulations=30, max_tokens=60) for index in range(3)]

    async def counts() -> dict[str, Any]:
        (found, *_) = await bench.engine.engine.collective_rpc("whipstaff_counters")
        return dict(found)

    async def cut() -> bool:
        before, asked = await counts(), [asyncio.ensure_future(bench.answer(case)) for case in cases]
        names = "search_rollbacks", "groups_preempted"
        has_happened = False
        while not has_happened and not all(one.done() for one in asked):
            await asyncio.sleep(0.01)
            now = await counts()
            has_happened = all(now[name] > before[name] for name in names)
        for one in asked:
            one.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
        return has_happened

    assert bench.engine.run(cut())
    bench.idle()


def test_going_away_in_the_middle(bench: Bench) -> None:
    stay = Case(prompt(20, 30), beams=3)
    leave = [
        Case(prompt(20 + 9 * index, 31 + index), beams=4, max_tokens=60, abort_after=0.05 * index) for index in range(6)
    ]
    leave += [Case(prompt(40, 40), simulations=30, max_tokens=60, abort_after=0.2)]
    (found, *_) = bench.answers(stay, *leave)
    bench.check(stay, *found)
    bench.idle()


KINDS = ("beams", "groups", "opera", "tree")


class Traffic:
    """Makes requests at random, half of which search."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)

    def case(self, span: float) -> Case:
        """One that arrives within so many seconds."""
        chance, kind = self.chance, self.chance.choice(("plain", "plain", "plain", "plain", *KINDS))
        case = Case(
            prompt(chance.choice((1, 7, 20, 31, 33, 62, 70)), chance.randrange(40)),
            max_tokens=chance.randint(2, 12) if kind != "tree" else chance.randint(2, 4),
            ends=EOS if chance.random() < 0.5 and kind != "plain" else (),
            after=chance.uniform(0, span),
        )
        if kind == "beams":
            case.beams, case.length_penalty = chance.randint(2, 4), chance.choice((0.0, 1.0, 2.0))
        elif kind == "groups":
            case.beams, case.groups = 4, 2
        elif kind == "opera":
            case.opera = chance.randint(1, 3)
        elif kind == "tree":
            case.simulations = chance.randint(3, 8)
        changed = chance.choice(("", "", "steered", "guided", "proxy-tuned", "repetition"))
        if changed == "steered":
            case.scale = 1.5
        elif changed == "guided":
            case.negative = tuple(prompt(chance.choice((3, 33, 61)), chance.randrange(40)))
        elif changed == "proxy-tuned":
            case.weight = 0.7
        elif changed == "repetition":
            case.repetition_penalty = 1.4
        if chance.random() < 0.15:
            case.max_tokens, case.abort_after = 60, chance.uniform(0.0, 0.6)  # trees go back all the time
            case.simulations = case.simulations and 30
        return case


def test_random_traffic_leaves_nothing_behind(bench: Bench) -> None:
    num = 2000 if SOAK else 12 if bench.mode.startswith("v2") else 60
    traffic, wave, before = Traffic(11), min(num, 100), bench.engine.counters()["search_rollbacks"]
    for _ in range(num // wave):
        cases = [traffic.case(wave / 50) for _ in range(wave)]
        answers = list(zip(cases, bench.answers(*cases), strict=True))
        staying = [(case, found) for case, found in answers if case.abort_after is None]
        wrong = [case for case, found in staying if not bench.is_exact(case, *found)]
        assert len(wrong) <= 0.03 * len(staying) + 1, wrong
        assert len(staying) > 0.6 * wave
    bench.idle()
    assert num < 60 or bench.engine.counters()["search_rollbacks"] > before


def test_beams_are_those_of_hugging_face(bench: Bench) -> None:
    """50 prompts at once through an engine, 200 at night. Where answers are as good as equally likely, either may come
    first."""
    num, ends = (tries(200) if bench.mode == "v1-traced-async" else 8), tuple(range(3, 19))
    cases = [Case(prompt(5 + 4 * (n % 3), 500 + n), beams=4, ends=ends, max_tokens=8) for n in range(num)]
    alike, reasons = 0, set()
    for case, (_, told) in zip(cases, bench.answers(*cases), strict=True):
        out = bench.base.generate(
            torch.tensor([case.prompt]),
            attention_mask=torch.ones(1, len(case.prompt), dtype=torch.int64),
            num_beams=case.beams,
            num_return_sequences=case.beams,
            max_new_tokens=case.max_tokens,
            do_sample=False,
            eos_token_id=list(ends),
            return_dict_in_generate=True,
            output_scores=True,
        )
        answers = told["hypotheses"]
        assert [one["score"] for one in answers] == pytest.approx(out.sequences_scores.tolist(), abs=NEAR), case
        wanted = zip(answers, out.sequences[:, len(case.prompt) :].tolist(), strict=True)
        alike += all(one["tokens"] == row[: len(one["tokens"])] for one, row in wanted)
        reasons |= {one["finish_reason"] for one in answers}
    assert alike >= 0.98 * num and reasons == {"stop", "length"}
    bench.idle()
