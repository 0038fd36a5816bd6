"""Every decoding method through the engine, token by token against a loop over plain transformers.

The loop recomputes everything at every token, one sequence at a time: logits and the last hidden state from
transformers, then the request's methods by the plain computations of tests/reference, then the draw with vLLM's own
noise. Nothing of it is the product's but the vectors that both are given.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import tiny
import torch
from decodings import StubPrompt
from engines import Ask, EngineUnderTest, edit
from modes import ON_V1
from reference import seeded, steered
from reference.decoded import Decoding, Seen
from torch import Tensor

from whipstaff.decoding.method import StreamMixer
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.mix import Mix, added
from whipstaff.decoding.plan import DecodingPlan, Rewrite, SamplerSettings
from whipstaff.server.plan import RequestPlan
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Header, Vector
from whipstaff.steering.where import Where

from .conftest import Shared

pytestmark = pytest.mark.engine

NUM_TOKENS, SEED, HIDDEN = 12, 17, 96
TEMPERATURE, TOP_K = 0.9, 60  # of requests that draw
NEAR = 1e-3  # of scores: two tokens that near may change places between float32 implementations
PAIR = {"expert": "expert", "antiexpert": "anti"}
ENTRIES: dict[str, list[dict[str, Any]]] = {
    "proxy_tuning": [{"method": "proxy_tuning", **PAIR}],
    "proxy_tuning_twice": [
        {"method": "proxy_tuning", **PAIR},
        {"method": "proxy_tuning", **PAIR, "alpha": -0.5},
    ],
    "dexperts": [{"method": "dexperts", **PAIR}],
    "dexperts_expert_only": [{"method": "dexperts", "expert": "expert", "top_p": 0.5}],
    "contrastive": [{"method": "contrastive", "amateur": "anti", "amateur_temperature": 0.5}],
    "contrastive_beta": [{"method": "contrastive_beta", "amateur": "anti"}],
    "ensemble": [{"method": "adapter_free_ensemble", "weights": {"expert": 0.75, "anti": 0.25}}],
    "co_llm": [{"method": "co_llm", "assistant": "expert", "head": "defer_head"}],
    "co_llm_compose": [
        {"method": "co_llm", "assistant": "expert", "head": "defer_head", "strategy": "compose", "warmup": "linear"}
    ],
    "kwd": [{"method": "kwd", "classifier": "token_classifier", "k": 20}],
    "rule_adapter": [{"method": "rule_adapter"}],
    "rules_and_mix": [
        {"method": "proxy_tuning", **PAIR},
        {"method": "rule_adapter"},
        {"method": "dry", "multiplier": 6.0, "allowed_length": 0},
    ],
    "dry": [{"method": "dry", "multiplier": 6.0, "allowed_length": 0}],
}
SAMPLED: dict[str, list[dict[str, Any]]] = {
    "adaptive_temperature": [{"method": "adaptive_temperature", "head": "temperature_head"}],
    "adaptive_temperature_sequence": [
        {"method": "adaptive_temperature", "head": "temperature_head", "level": "sequence", "choose": "sample"}
    ],
    "edt": [{"method": "edt"}],
    "dynatemp": [{"method": "dynatemp", "range": 0.8, "exponent": 12.0}, {"method": "top_n_sigma", "n": 3.0}],
    "top_n_sigma": [{"method": "top_n_sigma", "n": 1.0}],
    "typical_p": [{"method": "typical_p", "p": 0.5}],
    "top_a": [{"method": "top_a", "a": 0.9}],
    "epsilon_cutoff": [{"method": "epsilon_cutoff", "epsilon": 0.05}],
    "eta_cutoff": [{"method": "eta_cutoff", "epsilon": 0.5}],
    "xtc": [{"method": "xtc", "probability": 0.7, "threshold": 0.05}],
    "mirostat": [{"method": "mirostat", "tau": 2.0}],
    "mirostat_mixed": [{"method": "proxy_tuning", **PAIR}, {"method": "mirostat", "tau": 1.5, "eta": 0.3}],
}


class Letters:
    """A vocabulary whose token v is one letter; 2 ends a text."""

    eos = (2,)

    def id_of(self, text: str) -> int | None:
        return ord(text) % tiny.VOCABULARY if len(text) == 1 else None

    def ids_with(self, text: str) -> Sequence[int]:
        return [ord(letter) % tiny.VOCABULARY for letter in text[:1]]

    def encode(self, text: str) -> Sequence[int]:
        return [ord(letter) % tiny.VOCABULARY for letter in text]


LETTERS: dict[str, Any] = {  # what the rules come to: those of their texts that are one letter
    "style": {ord("<"): -4.0, ord("|"): -4.0, ord("I"): -5.0, ord("\n"): 1.0, ord("!"): 1.0},
    "ends": (2,),
    "user": StubPrompt().user,
    "breakers": frozenset(map(ord, '\n:"*')),
}


@dataclass
class Bench:
    mode: str
    engine: EngineUnderTest
    heads: dict[str, Vector]
    vector: Vector
    models: dict[str, Any]

    def plan(self, entries: Sequence[Mapping[str, Any]], draw: SamplerSettings | None = None) -> DecodingPlan:
        """Entries as the front end would compile them."""
        mixes: list[Mix] = []
        rewrites: list[Rewrite] = []
        for entry in entries:
            method: Any = METHODS[entry["method"]]
            params = method.params.model_validate(entry)
            if isinstance(method, StreamMixer):
                mixes.append(method.mix(params))
                continue
            setting = method.at_prompt(method.resolve(params, Letters()), StubPrompt())
            heads = tuple(self.heads[kind].digest for kind in method.head_fields.values())
            streams = tuple(method.streams(params).values())
            rewrites.append(Rewrite(method.name, setting.model_dump_json(), streams, heads))
        mix = mixes[0] if len(mixes) == 1 else added(mixes)
        return DecodingPlan(mix, tuple(rewrites), draw, SEED)

    def ask(self, name: str, prompt: list[int], steering: SteeringPlan | None = None) -> Ask:
        sampling: dict[str, Any] = {"temperature": 1.0, "seed": SEED} if name in SAMPLED else {}
        draw = SamplerSettings(temperature=TEMPERATURE, top_k=TOP_K) if name in SAMPLED else None
        plan = self.plan((ENTRIES | SAMPLED)[name], draw)
        return Ask(prompt, RequestPlan(steering, plan), NUM_TOKENS, sampling)

    def logits(self, model: str, ids: list[int], prompt_len: int, steering: SteeringPlan | None) -> Tensor:
        """(V,) of the next token."""
        found = steered.logits(self.models[model], ids, prompt_len, self.edits(steering) if model == "base" else [])
        return found[-1, : tiny.VOCABULARY]

    def hidden(self, ids: list[int], prompt_len: int, steering: SteeringPlan | None) -> Tensor:
        """(H,) after the final norm."""
        seen: list[Tensor] = []
        handle = self.models["base"].model.norm.register_forward_hook(lambda m, i, output: seen.append(output[0, -1]))
        try:
            self.logits("base", ids, prompt_len, steering)
        finally:
            handle.remove()
        return seen[0]

    def edits(self, steering: SteeringPlan | None) -> list[steered.Edit]:
        found = []
        for planned in steering.edits if steering else ():
            scale = json.loads(planned.edit.setting)["scale"]
            for (site, layer), parts in self.vector.tensors.items():
                found.append(steered.Edit(site, layer, scale, None, parts["add"], lambda position, prompt_len: True))
        return found

    def decoding(self, name: str, prompt: list[int]) -> Decoding:
        """A request as the loop decodes it."""
        drawn: dict[str, Any] = {"seed": SEED, "temperature": TEMPERATURE, "top_k": TOP_K} if name in SAMPLED else {}
        heads = {kind: {part: x.tolist() for part, x in file.shared_parts.items()} for kind, file in self.heads.items()}
        return Decoding((ENTRIES | SAMPLED)[name], len(prompt), heads, **drawn, **LETTERS)

    def seen(self, ids: list[int], num_prompt: int, steering: SteeringPlan | None) -> Seen:
        others = {name: self.logits(name, ids, 0, None).tolist() for name in ("expert", "anti")}
        base = self.logits("base", ids, num_prompt, steering).tolist()
        return Seen(base, others, self.hidden(ids, num_prompt, steering).tolist())

    def wrong(self, names: Sequence[str], asks: Sequence[Ask], answers: Sequence[list[int]]) -> set[str]:
        """The requests of which a token is not the best one, or not the one that is drawn."""
        found = set()
        for name, ask, tokens in zip(names, asks, answers, strict=True):
            key = repr((self.mode[:2], name, ask.prompt, tokens, ask.plan and ask.plan.steering))
            if key not in CHECKED:
                CHECKED[key] = all(gap < NEAR for gap in self.gaps(self.decoding(name, ask.prompt), ask, tokens))
            found |= set() if CHECKED[key] else {name}
        return found

    def needs_all(self, name: str, ask: Ask, tokens: list[int]) -> bool:
        """Whether none of its methods could be left out, or do nothing in its place, and the answer be the same."""
        whole = self.decoding(name, ask.prompt)
        less = [replace(whole, idle=entry["method"]) for entry in whole.entries]
        less += [
            replace(whole, entries=[*whole.entries[:index], *whole.entries[index + 1 :]])
            for index in range(len(whole.entries))
        ]
        return all(any(gap >= NEAR for gap in self.gaps(one, ask, tokens)) for one in less)

    def gaps(self, one: Decoding, ask: Ask, tokens: list[int]) -> Iterator[float]:
        """By how much each token is worse than the best."""
        assert ask.plan is not None
        ids, noise = list(ask.prompt), seeded.noise(self.mode[:2], SEED, len(ask.prompt), len(tokens), tiny.VOCABULARY)
        for token, drawn in zip(tokens, noise, strict=True):
            row = one.row(ids, self.seen(ids, len(ask.prompt), ask.plan.steering))
            scores = torch.tensor(row, dtype=torch.float64) + (0 if one.temperature is None else drawn)
            yield float(scores.max() - scores[token])
            one.note(row, token)
            ids.append(token)


CHECKED: dict[str, bool] = {}  # by request and answer: every mode serves the same models


@pytest.fixture(scope="module")
def bench(shared: Shared) -> Bench:
    engine = shared.engine
    return Bench(shared.mode, engine, _heads(engine), _vector(engine), shared.models)


def _heads(engine: EngineUnderTest) -> dict[str, Vector]:
    random = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    files = {
        "defer_head": {"weight": normal(HIDDEN), "bias": torch.tensor(0.3)},
        "token_classifier": {"weight": normal(tiny.VOCABULARY, HIDDEN)},
        "temperature_head": {
            **{"temperatures": torch.tensor([0.0, 0.7, 1.3]), "w0": normal(8, HIDDEN), "b0": normal(8)},
            **{"w1": normal(8, 8), "b1": normal(8), "w2": normal(3, 8), "b2": normal(3)},
        },
    }
    return {kind: engine.add_vector(parts, Header(method=kind, model=engine.shape)) for kind, parts in files.items()}


def _vector(engine: EngineUnderTest) -> Vector:
    random = torch.Generator().manual_seed(5)
    return engine.add_vector(
        {f"resid_post.{layer}.add": 0.4 * torch.randn(HIDDEN, generator=random) for layer in (0, 2)}
    )


def prompts(num: int, seed: int) -> list[list[int]]:
    """Of many lengths, some longer than a step, over few distinct tokens, so that they repeat."""
    random = torch.Generator().manual_seed(seed)
    lengths = [(3, 9, 33, 70)[index % 4] + index % 5 for index in range(num)]
    return [(3 + torch.randint(24, (length,), generator=random)).tolist() for length in lengths]


def test_every_method_at_once(bench: Bench) -> None:
    """All of them in one batch, under chunked prefill and preemption; the second time their prefixes are cached."""
    names = [*ENTRIES, *SAMPLED]
    if bench.mode.startswith("v2"):
        names = names[::2]
    asks = [bench.ask(name, prompt) for name, prompt in zip(names, prompts(len(names), 1), strict=True)]
    plain = [Ask(prompt, None, NUM_TOKENS) for prompt in prompts(3, 2)]
    for _ in range(1 if bench.mode.startswith("v2") else 2):
        found = bench.engine.tokens(*asks, *plain)
        assert not bench.wrong(names, asks, found[: len(asks)])
        for ask, tokens in zip(plain, found[len(asks) :], strict=True):
            assert tokens == steered.greedy(bench.models["base"], ask.prompt, NUM_TOKENS)
    if bench.mode in ON_V1:
        needed = [bench.needs_all(*one) for one in zip(names, asks, found, strict=False)]
        assert all(needed), dict(zip(names, needed, strict=True))
    bench.engine.generate(Ask([5, 6, 7], max_tokens=1))  # so that the worker hears of the last to finish
    assert bench.engine.counters()["requests_held"] == 0


@pytest.mark.parametrize("shared", ON_V1, indirect=True)
def test_a_request_alone_and_in_a_crowd(bench: Bench) -> None:
    """Seeded draws too: what others ask for changes nothing."""
    names = [*ENTRIES, *SAMPLED][::2]
    asks = [bench.ask(name, prompt) for name, prompt in zip(names, prompts(len(names), 4), strict=True)]
    together = bench.engine.tokens(*asks)
    assert [bench.engine.tokens(ask)[0] for ask in asks] == together


def test_steering_and_decoding_in_one_request(bench: Bench) -> None:
    steering = SteeringPlan((edit(bench.vector, 1.5, Where.of("all")),))
    names = ["rules_and_mix", "co_llm", "kwd", "mirostat_mixed"]
    asks = [bench.ask(name, prompt, steering) for name, prompt in zip(names, prompts(4, 6), strict=True)]
    assert not bench.wrong(names, asks, bench.engine.tokens(*asks))
    unsteered = [
        Ask(ask.prompt, ask.plan and replace(ask.plan, steering=None), NUM_TOKENS, ask.sampling) for ask in asks
    ]
    assert bench.engine.tokens(*unsteered) != bench.engine.tokens(*asks)


def test_penalties_follow_the_mix(bench: Bench) -> None:
    """vLLM's repetition penalty acts on mixed scores: seen tokens with positive ones are divided."""
    ask = bench.ask("contrastive", prompts(1, 8)[0])
    ask.sampling = {"repetition_penalty": 1.4}
    (tokens,) = bench.engine.tokens(ask)
    one, ids = bench.decoding("contrastive", ask.prompt), list(ask.prompt)
    for token in tokens:
        row = torch.tensor(one.row(ids, bench.seen(ids, len(ask.prompt), None)))
        seen = torch.zeros_like(row, dtype=torch.bool)
        seen[ids] = True
        row = torch.where(seen, torch.where(row > 0, row / 1.4, row * 1.4), row)
        assert token == int(row.argmax())
        ids.append(token)


def test_banned_tokens_stay_banned(bench: Bench) -> None:
    """What a request may not say is not revived by any stage; not where a method excludes all that it may say."""
    allowed = [40, 41]
    names = [
        "proxy_tuning",
        "contrastive",
        "dexperts",
        "co_llm",
        "kwd",
        "rule_adapter",
        "dry",
        "mirostat",
        "xtc",
        "typical_p",
    ]
    asks = [bench.ask(name, prompt) for name, prompt in zip(names, prompts(len(names), 9), strict=True)]
    for ask in asks:
        ask.sampling = {**ask.sampling, "allowed_token_ids": allowed}
    assert all(set(tokens) <= set(allowed) for tokens in bench.engine.tokens(*asks))


def test_a_bias_bans_and_forces_what_masks_keep_and_exclude(bench: Bench) -> None:
    """As it does where nothing is masked: what was said first is not said any more, and a token is said alone."""
    names = ["contrastive", "contrastive_beta", "dexperts", "kwd"]
    forced = 40
    asks = [bench.ask(name, prompt) for name, prompt in zip(names, prompts(len(names), 11), strict=True)]
    said = bench.engine.tokens(*asks)
    banning = [
        replace(ask, sampling={**ask.sampling, "logit_bias": dict.fromkeys(tokens, -100.0)})
        for ask, tokens in zip(asks, said, strict=True)
    ]
    forcing = [replace(ask, sampling={**ask.sampling, "logit_bias": {forced: 100.0}}) for ask in asks]
    found = bench.engine.tokens(*banning, *forcing)
    for tokens, others in zip(said, found, strict=False):
        assert not set(tokens) & set(others)
    assert found[len(asks) :] == [[forced] * len(tokens) for tokens in said]


def test_prompt_log_probabilities_are_those_of_the_decoded_model(bench: Bench) -> None:
    """Of every method whose stages come before penalties; chunk by chunk, beside others."""
    names = ["contrastive_beta", "rule_adapter", "co_llm_compose", "kwd"]
    asks = [bench.ask(name, prompt) for name, prompt in zip(names, prompts(8, 10)[3::4] * 2, strict=True)]
    for ask in asks:
        ask.max_tokens, ask.sampling = 1, {"prompt_logprobs": 0}
    outputs = bench.engine.generate(*asks, bench.ask("dry", [5, 6, 7]))
    for name, ask, output in zip(names, asks, outputs, strict=False):
        one = bench.decoding(name, ask.prompt)
        for position in range(1, len(ask.prompt), 7):
            ids = ask.prompt[:position]
            row = torch.tensor(one.row(ids, bench.seen(ids, len(ask.prompt), None))).log_softmax(-1)
            said = output.prompt_logprobs[position][ask.prompt[position]].logprob
            assert said == pytest.approx(float(row[ask.prompt[position]]), abs=5e-4)
