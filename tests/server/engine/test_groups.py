"""Coupled sequences in whole engines: every token is the one that the group, alone in plain transformers, would choose.

WHIPSTAFF_SOAK=1 runs 500 groups, and as many other requests, in every mode; WHIPSTAFF_SOAK_MINUTES=30 goes on for so
long in each, and says how many there were (pytest -k soak -s).
"""

import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch
from engines import PATIENCE, Ask, EngineUnderTest, edit, running
from modes import TRACED
from reference import seeded, steered
from serving import make_tokenizer
from soak import SOAK
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams

from whipstaff.decoding.mix import MAIN, Mix, Stream, Term
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.engine.scheduler.group import MEMBER_CONTEXT
from whipstaff.server.plan import CompanionPlan, RequestPlan
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Where

pytestmark = pytest.mark.engine

SOAK_MINUTES = float(os.environ.get("WHIPSTAFF_SOAK_MINUTES", 0))
MAX_LEN, MOST_SEQUENCES, WAVE = 256, 10, 120
NEAR = 1e-3  # of log-scores: two tokens that near may change places between float32 implementations
CLAUSES = [  # and the positions that each selects
    (Where.of("each_last"), lambda position, length: position >= length - 1),
    (Where.of("all"), lambda position, length: True),
    (Where.of("generation"), lambda position, length: position >= length),
    (Where(prompt=[(0, 3)]), lambda position, length: position < min(3, length)),
]


def guidance(scale: float) -> Mix:
    """As Hugging Face's `guidance_scale`: u + scale * (c - u), of log-probabilities."""
    return Mix((Term(MAIN, scale, True), Term(Stream("", 1), 1 - scale, True)))


def ensemble(num: int) -> Mix:
    weights = [Term(Stream("", member), 1 / (member + 1.5), True) for member in range(1, num)]
    return Mix((Term(MAIN, 0.7, True), *weights))


@dataclass
class Bench:
    """An engine, its vectors, and the same models in transformers."""

    mode: str
    engine: EngineUnderTest
    vectors: dict[str, Vector]
    models: dict[str, Any]  # of transformers

    def scores(self, ask: Ask, tokens: list[int]) -> Tensor:
        """(len(tokens), V) what each token was chosen from, given those before it."""
        assert ask.plan is not None
        mix = ask.plan.decoding.mix if ask.plan.decoding else None
        prompts = [ask.prompt, *(list(member.prompt) for member in ask.plan.companions)]
        steering = [ask.plan.steering, *(member.steering for member in ask.plan.companions)]
        untils = [member.until for member in ask.plan.companions if member.until is not None]

        def logits(stream: Stream) -> Tensor:
            prompt, edits = (
                prompts[stream.companion],
                self._edits(steering[stream.companion] if not stream.model else None),
            )
            found = steered.logits(self.models[stream.model], prompt + tokens[:-1], len(prompt), edits)
            return found[len(prompt) - 1 :, : tiny.VOCABULARY]

        plain = logits(MAIN)
        if mix is None:
            return plain
        rows = [(term, logits(term.stream)) for term in mix.terms]
        mixed = sum(term.weight * (row.log_softmax(-1) if term.log_softmax else row) for term, row in rows)
        assert isinstance(mixed, Tensor)
        last = min(untils, default=len(tokens))
        return torch.cat([mixed[:last], plain[last:]])

    def _edits(self, plan: SteeringPlan | None) -> list[steered.Edit]:
        return [
            steered.Edit(
                site,
                layer,
                json.loads(planned.edit.setting)["scale"],
                parts.get("gain"),
                parts.get("add"),
                next(touches for where, touches in CLAUSES if where == planned.where),
            )
            for planned in (plan.edits if plan else ())
            for (site, layer), parts in self.vectors[planned.edit.digest].tensors.items()
        ]

    def check(self, ask: Ask, tokens: list[int]) -> bool:
        """Every token has the best score, ties apart. Whether there was none."""
        ask = replace(ask, plan=ask.plan or RequestPlan())
        scores = self.scores(ask, tokens)
        chosen = scores[torch.arange(len(tokens)), tokens]
        worst = float((scores.amax(-1) - chosen).max())
        assert worst < NEAR, f"{ask} chose a token that is {worst} below the best: {tokens}"
        return worst == 0


@pytest.fixture(scope="module", params=TRACED)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder, mode = tmp_path_factory.mktemp("models"), request.param
    shapes: dict[str, dict[str, Any]] = {"": {}, "expert": {"hidden_size": 64, "num_attention_heads": 2}}
    paths = {
        name: tiny.save("llama", folder / f"model{seed}", seed, **changes)
        for seed, (name, changes) in enumerate(shapes.items())
    }
    for path in paths.values():
        make_tokenizer(tiny.VOCABULARY).save_pretrained(path)
    with running(
        mode,
        paths[""],
        [("expert", paths["expert"])],
        num_slots=4,
        structured_outputs_config={"backend": "xgrammar"},
        max_model_len=MAX_LEN,
        max_num_batched_tokens=48,
        max_num_seqs=MOST_SEQUENCES,
        num_gpu_blocks_override=20,
        enable_prefix_caching=True,
    ) as engine:
        models = {name: AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for name, path in paths.items()}
        yield Bench(mode, engine, {vector.digest: vector for vector in _vectors(engine)}, models)


def _vectors(engine: EngineUnderTest) -> Iterator[Vector]:
    generator = torch.Generator().manual_seed(11)
    shape = engine.shape
    for _ in range(3):
        tensors = {}
        for layer in range(shape.num_layers):
            for name, size in (("resid_post", (shape.hidden_size,)), ("attn_head", (shape.num_heads, shape.head_dim))):
                tensors[f"{name}.{layer}.add"] = 0.3 * torch.randn(size, generator=generator)
        yield engine.add_vector(tensors)


@pytest.fixture
def nobody_left(bench: Bench) -> Iterator[None]:
    """After each test nothing of any request is left in the engine, and no group ever went in half."""
    yield
    assert bench.engine.run(bench.engine.engine.reset_prefix_cache()), "somebody holds blocks"
    bench.engine.generate(Ask([5, 6, 7], max_tokens=1))  # one more step, so that the worker hears of the last to finish
    counters = bench.engine.counters()
    held = ("requests_held", "slots_in_use", "requests_waiting_for_slots", "companions_running")
    assert [counters[name] for name in held] == [0] * len(held)
    assert counters["groups_half_scheduled"] == 0


class Traffic:
    """Makes requests: plain ones, steered ones and groups, over prompts that share beginnings."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench, self.chance = bench, random.Random(seed)
        self.stem = random.Random(1).choices(range(3, tiny.VOCABULARY), k=96)

    def asks(self, num: int) -> list[Ask]:
        """That many groups, and as many others."""
        found = [ask for _ in range(num) for ask in (self.group(), self.other())]
        self.chance.shuffle(found)
        return found

    def check(self, asks: list[Ask], outputs: list[Any]) -> None:
        both = zip(asks, outputs, strict=True)
        answered = [(ask, output.outputs[0]) for ask, output in both if ask.abort_after is None]
        assert all(len(answer.token_ids) == ask.max_tokens for ask, answer in answered)
        exact = [self.bench.check(ask, list(answer.token_ids)) for ask, answer in answered]
        assert sum(exact) > 0.97 * len(exact)
        assert len(answered) > 0.7 * len(asks)

    def prompt(self) -> list[int]:
        shared = self.stem[: self.chance.choice((0, 0, 1, 32, 33, 64, 65, 90))]
        return shared if len(shared) > 1 and self.chance.random() < 0.3 else [*shared, *self.words()]

    def words(self) -> list[int]:
        return self.chance.choices(range(3, tiny.VOCABULARY), k=self.chance.choice((1, 1, 2, 7, 20)))

    def steering(self) -> SteeringPlan:
        vectors = list(self.bench.vectors.values())
        chosen = edit(self.chance.choice(vectors), self.chance.choice((0.5, 1.0, -1.0)), self.chance.choice(CLAUSES)[0])
        return SteeringPlan((chosen,))

    def group(self) -> Ask:
        kind = self.chance.randrange(4)
        mine = self.steering() if self.chance.random() < 0.3 else None
        if kind == 0:
            mix, num = ensemble(num := self.chance.choice((2, 3, 4))), num
        else:
            mix, num = guidance(self.chance.choice((0.5, 1.5, 3.0))), 2
        if kind == 1:
            mix = Mix((*mix.terms, Term(Stream("expert", 1), 0.8, True)))
        members = tuple(
            CompanionPlan(tuple(self.prompt()), self.steering() if self.chance.random() < 0.3 else None)
            for _ in range(num - 1)
        )
        if kind == 2 and self.chance.random() < 0.5:
            members = (replace(members[0], until=self.chance.randint(1, 6)),)
        return self.ask(RequestPlan(mine, DecodingPlan(mix), companions=members))

    def other(self) -> Ask:
        return self.ask(RequestPlan(self.steering()) if self.chance.random() < 0.5 else None)

    def ask(self, plan: RequestPlan | None) -> Ask:
        ask = Ask(self.prompt(), plan, self.chance.randint(1, 14))
        if self.chance.random() < 0.1:
            ask.abort_after, ask.sampling = self.chance.randint(1, 3), {"output_kind": RequestOutputKind.DELTA}
        return ask


def test_random_groups_among_others(bench: Bench, nobody_left: None) -> None:
    traffic = Traffic(bench, seed=3)
    asks = traffic.asks(500 if SOAK else 8 if bench.mode.startswith("v2") else 60)
    waves = [asks[first : first + WAVE] for first in range(0, len(asks), WAVE)]
    traffic.check(asks, [output for wave in waves for output in bench.engine.run(_arriving(bench, wave))])


@pytest.mark.skipif(not SOAK_MINUTES, reason="WHIPSTAFF_SOAK_MINUTES is not set")
@pytest.mark.timeout(60 * SOAK_MINUTES + PATIENCE)
def test_soak(bench: Bench, nobody_left: None) -> None:
    started, num = time.monotonic(), 0
    while time.monotonic() - started < 60 * SOAK_MINUTES:
        traffic = Traffic(bench, seed=100 + num)
        asks = traffic.asks(WAVE // 2)
        traffic.check(asks, bench.engine.run(_arriving(bench, asks)))
        num += len(asks)
    minutes = (time.monotonic() - started) / 60
    print(f"{bench.mode}: {num} requests, half of them groups, in {minutes:.1f} minutes; {bench.engine.counters()}")


def test_pauses_and_resets(bench: Bench, nobody_left: None) -> None:
    """Whoever runs is thrown back and computed again, in mid-flight; new ones are kept waiting for a while."""
    traffic, engine = Traffic(bench, seed=4), bench.engine.engine
    asks = traffic.asks(5 if bench.mode.startswith("v2") else 40)

    async def meddling() -> list[Any]:
        answers = asyncio.create_task(_arriving(bench, asks))
        for mode in ("keep", "wait", "keep"):
            await asyncio.sleep(len(asks) / 250)
            assert await engine.reset_prefix_cache(reset_running_requests=True)
            await engine.pause_generation(mode=mode, clear_cache=False)
            await engine.resume_generation()
        return await answers

    traffic.check(asks, bench.engine.run(meddling()))


async def _arriving(bench: Bench, asks: list[Ask]) -> list[Any]:
    """What comes of requests that arrive within some seconds, at random."""

    async def late(ask: Ask) -> Any:
        await asyncio.sleep(random.uniform(0, len(asks) / 50))
        return await bench.engine.answer(ask)

    return await asyncio.gather(*map(late, asks))


def test_as_hugging_face_guidance(bench: Bench, nobody_left: None) -> None:
    traffic = Traffic(bench, seed=8)
    prompts = [(traffic.prompt(), traffic.prompt(), scale) for scale in (1.5, 3.0, 0.5)]
    asks = [
        Ask(prompt, RequestPlan(None, DecodingPlan(guidance(scale)), companions=(CompanionPlan(tuple(other)),)), 10)
        for prompt, other, scale in prompts
    ]
    for (prompt, other, scale), tokens in zip(prompts, bench.engine.tokens(*asks), strict=True):
        found = bench.models[""].generate(
            torch.tensor([prompt]),
            guidance_scale=scale,
            negative_prompt_ids=torch.tensor([other]),
            max_new_tokens=10,
            min_new_tokens=10,
            do_sample=False,
        )
        assert found[0, len(prompt) :].tolist() == tokens


def test_a_seed_draws_what_it_draws_alone(bench: Bench, nobody_left: None) -> None:
    """A group's random numbers are its primary's: with a companion that weighs nothing, those of a plain request."""
    traffic = Traffic(bench, seed=5)
    nothing = Mix((Term(MAIN, 1.0), Term(Stream("", 1), 0.0)))
    for length in (1, 3, 60):
        prompt, sampling = traffic.stem[:length], {"temperature": 1.0, "seed": 7 + length}
        coupled = RequestPlan(None, DecodingPlan(nothing), companions=(CompanionPlan(tuple(traffic.prompt())),))
        alone, beside, again = bench.engine.tokens(
            Ask(prompt, None, 8, sampling), Ask(prompt, coupled, 8, sampling), Ask(prompt, coupled, 8, sampling)
        )
        assert alone == beside == again


def test_a_seed_draws_what_a_plain_loop_draws(bench: Bench, nobody_left: None) -> None:
    """Plain, guided and beside others: the best token of what transformers computes, plus vLLM's noise for the seed."""
    traffic, temperature, num = Traffic(bench, seed=6), 0.8, 12
    asks = []
    for length, scale in ((3, None), (3, 1.5), (70, None), (70, 2.5), (1, 0.5)):
        members = (CompanionPlan(tuple(traffic.prompt())),)
        plan = None if scale is None else RequestPlan(None, DecodingPlan(guidance(scale)), companions=members)
        sampling = {"temperature": temperature, "seed": 40 + length}
        asks.append(Ask(traffic.stem[:length], plan, num, sampling))
    others = [traffic.group() for _ in range(2)]
    together = bench.engine.tokens(*asks, *(replace(ask, abort_after=None) for ask in others))[: len(asks)]
    assert bench.engine.tokens(asks[3]) == [together[3]]
    for ask, said in zip(asks, together, strict=True):
        scores = bench.scores(replace(ask, plan=ask.plan or RequestPlan()), said).double() / temperature
        drawn = seeded.noise(bench.mode[:2], ask.sampling["seed"], len(ask.prompt), num, tiny.VOCABULARY)
        noised = scores + torch.stack(list(drawn))
        assert float((noised.amax(-1) - noised[torch.arange(num), said]).max()) < NEAR, ask
        assert said != scores.argmax(-1).tolist()


def test_each_of_several_answers_is_a_group(bench: Bench, nobody_left: None) -> None:
    plan = RequestPlan(None, DecodingPlan(guidance(1.5)), companions=(CompanionPlan((4, 5, 6)),))
    drawn = [
        {"temperature": 1.0, "seed": 3} | more
        for more in ({"n": 2, "output_kind": RequestOutputKind.FINAL_ONLY}, {}, {"seed": 4})
    ]
    both, *each = bench.engine.generate(*(Ask([7, 8, 9], plan, 8, sampling) for sampling in drawn))
    assert [one.token_ids for one in both.outputs] == [one.outputs[0].token_ids for one in each]


def test_what_ends_a_group(bench: Bench, nobody_left: None) -> None:
    """The primary's own tokens and lengths; or, with a word of its own, the room that a companion has."""
    traffic = Traffic(bench, seed=6)
    long, short = tuple(traffic.stem * 3)[: MAX_LEN - 5], tuple(traffic.stem[:9])
    plan = RequestPlan(None, DecodingPlan(guidance(1.5)), companions=(CompanionPlan(short),))
    (output,) = bench.engine.generate(Ask([7, 8, 9], plan, 8, {"detokenize": True}))
    free, text = list(output.outputs[0].token_ids), output.outputs[0].text
    stop = free[4]
    asks = [
        Ask([7, 8, 9], plan, 8, {"stop_token_ids": [stop]}),
        Ask([7, 8, 9], plan, 1),
        Ask([7, 8, 9], replace(plan, companions=(CompanionPlan(long),)), 40),
        Ask([7, 8, 9], plan, 100, {"detokenize": True, "stop": [text[3:5]]}),
    ]
    stopped, single, full, cut = bench.engine.generate(*asks)
    assert list(stopped.outputs[0].token_ids) == free[: free.index(stop) + 1]
    assert (stopped.outputs[0].finish_reason, stopped.outputs[0].stop_reason) == ("stop", stop)
    assert list(single.outputs[0].token_ids) == free[:1]
    assert cut.outputs[0].text == text[: text.index(text[3:5])]
    assert len(full.outputs[0].token_ids) == 5
    assert (full.outputs[0].finish_reason, full.outputs[0].stop_reason) == ("length", MEMBER_CONTEXT)


@pytest.mark.parametrize("bench", TRACED[:2], indirect=True)
def test_structured_outputs(bench: Bench, nobody_left: None) -> None:
    """The grammar is the primary's; members' logits count for what it allows.

    Triton's interpreter cannot run the kernel with which V2 applies grammars.
    """
    choices = ["left", "right"]
    plan = RequestPlan(None, DecodingPlan(guidance(3.0)), companions=(CompanionPlan((5, 6, 7)), CompanionPlan((8,))))

    def ask(prompt: list[int]) -> Ask:
        wanted = StructuredOutputsParams(choice=choices)
        return Ask(prompt, plan, 12, {"structured_outputs": wanted, "ignore_eos": False, "detokenize": True})

    asks = [ask(prompt) for prompt in ([9], [9, 10, 11], [12] * 50)]
    tokenizer = bench.engine.engine.get_tokenizer()
    for one, output in zip(asks, bench.engine.generate(*asks), strict=True):
        assert output.outputs[0].text in choices
        first = [tokenizer.convert_tokens_to_ids(choice[:length]) for choice in choices for length in range(1, 6)]
        (scores,) = bench.scores(one, [0])
        best = max((token for token in first if token is not None), key=lambda token: float(scores[token]))
        assert output.outputs[0].token_ids[0] == best


def test_scores_of_a_prompt_are_its_own(bench: Bench, nobody_left: None) -> None:
    plan = RequestPlan(None, DecodingPlan(guidance(3.0)), companions=(CompanionPlan((5, 6, 7)),))
    for prompt in ([9], [9, 8, 7]):
        asks = [Ask(prompt, asked, 3, {"prompt_logprobs": 1}) for asked in (None, plan)]
        plain, coupled = (output.prompt_logprobs for output in bench.engine.generate(*asks))
        assert [set(one) if one else None for one in plain] == [set(one) if one else None for one in coupled]


def test_log_probabilities_are_the_mix(bench: Bench, nobody_left: None) -> None:
    plan = RequestPlan(None, DecodingPlan(guidance(2.0)), companions=(CompanionPlan((4, 5, 6, 7)),))
    ask = Ask([9, 8, 7], plan, 5, {"logprobs": 3})
    (output,) = bench.engine.generate(ask)
    tokens = list(output.outputs[0].token_ids)
    expected = bench.scores(ask, tokens).log_softmax(-1)
    for said, row in zip(output.outputs[0].logprobs, expected, strict=True):
        for token, entry in said.items():
            assert entry.logprob == pytest.approx(float(row[token]), abs=NEAR)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ([CompanionPlan((5, 6))] * MOST_SEQUENCES, "runs at most 10"),
        ([CompanionPlan(tuple([5] * MAX_LEN))], "may have 1 to 255"),
        ([CompanionPlan(())], "a prompt of 0 tokens"),
        ([CompanionPlan((5, 100_000))], "not in the vocabulary"),
        ([CompanionPlan(tuple([5] * 200))] * 3, "need 22 blocks"),
    ],
)
def test_what_cannot_run_is_refused(bench: Bench, members: list[CompanionPlan], said: str) -> None:
    plan = RequestPlan(None, DecodingPlan(guidance(1.5)), companions=tuple(members))
    with pytest.raises(ValueError, match=said):
        bench.engine.generate(Ask([5, 6], plan, 2))
