"""LoRA adapters in whole engines: alone, steered, and as sequences of one request, against merged weights."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import tiny
import torch
from engines import Ask, EngineUnderTest, edit
from loras import merged, random_lora, save_lora
from modes import v2_on_cpu
from reference import dola, kwd, steered
from search_loop import JudgedLoop
from torch import Tensor
from transformers import AutoModelForCausalLM

from whipstaff.decoding.methods.adapter_ensemble import AdapterEnsemble, AdapterEnsembleParams
from whipstaff.decoding.methods.dola import DolaParams
from whipstaff.decoding.methods.kwd import KwdParams
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term
from whipstaff.decoding.plan import DecodingPlan, Rewrite, SearchPlan
from whipstaff.decoding.search.kcts import Kcts, KctsParams
from whipstaff.server.plan import CompanionPlan, RequestPlan
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Header, Vector
from whipstaff.steering.where import Where

pytestmark = pytest.mark.engine

NAMES = ("law", "math")
NEAR = 1e-3
PROMPTS = [[5, 6, 7, 8], [9], list(range(3, 60))]


@dataclass
class Bench:
    engine: EngineUnderTest
    models: dict[str, torch.nn.Module]  # "" is the one without an adapter
    adapters: dict[str, tuple[str, int, str]]
    vector: Vector

    def logits(self, name: str, prompt: list[int], said: list[int], scale: float = 0.0) -> Tensor:
        """(T, V) that each token was chosen from."""
        found = steered.logits(self.models[name], prompt + said[:-1], len(prompt), self.edits(scale))
        return found[len(prompt) - 1 :, : tiny.VOCABULARY]

    def hidden(self, name: str, ids: list[int], prompt_len: int, scale: float) -> Tensor:
        """(H,) after a text, after the final norm."""
        seen: list[Tensor] = []
        model: Any = self.models[name]
        handle = model.model.norm.register_forward_hook(lambda m, i, output: seen.append(output[0, -1]))
        try:
            steered.logits(model, ids, prompt_len, self.edits(scale))
        finally:
            handle.remove()
        return seen[0]

    def edits(self, scale: float) -> list[steered.Edit]:
        return [
            steered.Edit(site, layer, scale, parts.get("gain"), parts.get("add"), lambda position, length: True)
            for (site, layer), parts in (self.vector.tensors.items() if scale else ())
        ]

    def steering(self, scale: float) -> SteeringPlan:
        return SteeringPlan((edit(self.vector, scale, Where.of("all")),))


@pytest.fixture(scope="module", params=["v1", "v2"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    folder = tmp_path_factory.mktemp("models")
    path = tiny.save("llama", folder / "base")
    base = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    models, adapters = {"": base}, {}
    for number, name in enumerate(NAMES, 1):
        lora = random_lora(base, number)
        models[name] = merged(base, lora)
        adapters[name] = (name, number, save_lora(folder / name, lora))
    flags: dict[str, Any] = {"enable_lora": True, "max_loras": 2, "max_lora_rank": 8}
    with v2_on_cpu() if request.param == "v2" else nullcontext():
        engine = EngineUnderTest(
            path,
            lookahead=True,
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_num_seqs=16,
            max_num_batched_tokens=64,
            **flags,
        )
        try:
            assert engine.facts["runner"] == request.param
            generator = torch.Generator().manual_seed(3)
            sizes = {
                "resid_post": (engine.shape.hidden_size,),
                "attn_head": (engine.shape.num_heads, engine.shape.head_dim),
            }
            tensors = {f"{site}.1.add": torch.randn(size, generator=generator) for site, size in sizes.items()}
            yield Bench(engine, models, adapters, engine.add_vector(tensors))
        finally:
            engine.close()


def assert_best(scores: Tensor, said: list[int]) -> None:
    gaps = scores.amax(-1) - scores[torch.arange(len(said)), said]
    assert float(gaps.max()) < NEAR, gaps.tolist()


def test_an_ensemble(bench: Bench) -> None:
    """Beside plain and steered requests."""
    weights = {"law": 1.0, "math": 3.0}
    mix = AdapterEnsemble().mix(AdapterEnsembleParams(weights=weights))
    asks = []
    for prompt in PROMPTS:
        companions = tuple(CompanionPlan(tuple(prompt), adapter=bench.adapters[name]) for name in weights)
        asks += [Ask(prompt), Ask(prompt, RequestPlan(bench.steering(0.5)))]
        asks.append(Ask(prompt, RequestPlan(None, DecodingPlan(mix), companions=companions)))
    found = iter(bench.engine.tokens(*asks))
    for prompt in PROMPTS:
        said = next(found)
        assert_best(bench.logits("", prompt, said), said)
        said = next(found)
        assert_best(bench.logits("", prompt, said, 0.5), said)
        said = next(found)
        base, law, math = (bench.logits(name, prompt, said) for name in ("", *NAMES))
        assert_best(0.5 * base + 0.5 * (0.25 * law + 0.75 * math), said)


def test_adapters_that_are_steered(bench: Bench) -> None:
    """The same adapter over the same prompt, steered and not: activations are edited, and caches told apart."""
    mix = Mix((Term(MAIN, 1.0), Term(Stream("", 1), 1.0), Term(Stream("", 2), -0.5)))
    for prompt in PROMPTS:
        law = bench.adapters["law"]
        companions = (
            CompanionPlan(tuple(prompt), bench.steering(0.5), adapter=law),
            CompanionPlan(tuple(prompt), adapter=law),
        )
        (said,) = bench.engine.tokens(Ask(prompt, RequestPlan(None, DecodingPlan(mix), companions=companions)))
        rows = [
            bench.logits("", prompt, said),
            bench.logits("law", prompt, said, 0.5),
            bench.logits("law", prompt, said),
        ]
        assert_best(rows[0] + rows[1] - 0.5 * rows[2], said)


def test_tokens_are_tried_by_the_requests_own_adapter(bench: Bench) -> None:
    """With an adapter, without, steered, and without one but in front of sequences with some."""
    generator, k = torch.Generator().manual_seed(4), 4
    weight = torch.randn(2, bench.engine.shape.hidden_size, generator=generator)
    head = bench.engine.add_vector({"weight": weight}, Header(method="prefix_classifier", model=bench.engine.shape))
    setting = KwdParams(classifier="it", k=k).model_dump_json()
    rewrites = (Rewrite("kwd", setting, heads=(head.digest,)),)
    weights = {"law": 1.0, "math": 3.0}
    mix = AdapterEnsemble().mix(AdapterEnsembleParams(weights=weights))
    prompt, num = PROMPTS[0], 6
    companions = tuple(CompanionPlan(tuple(prompt), adapter=bench.adapters[name]) for name in weights)
    asks = [
        Ask(prompt, RequestPlan(None, DecodingPlan(mix, rewrites), companions=companions), num),
        Ask(prompt, RequestPlan(None, DecodingPlan(None, rewrites)), num, adapter=bench.adapters["law"]),
        Ask(
            prompt, RequestPlan(bench.steering(0.5), DecodingPlan(None, rewrites)), num, adapter=bench.adapters["math"]
        ),
        Ask(prompt, RequestPlan(None, DecodingPlan(None, rewrites)), num),
        Ask(prompt, None, num, adapter=bench.adapters["math"]),
    ]
    found = bench.engine.tokens(*asks)
    assert_best(bench.logits("math", prompt, found[-1]), found[-1])
    for said, name, scale in zip(found, ("", "law", "math", ""), (0.0, 0.0, 0.5, 0.0), strict=False):
        rows = bench.logits(name, prompt, said, scale)
        if said is found[0]:
            base, law, math = (bench.logits(one, prompt, said) for one in ("", *NAMES))
            rows = 0.5 * base + 0.5 * (0.25 * law + 0.75 * math)
        scores = []
        for index, row in enumerate(rows):
            ids = prompt + said[:index]

            def judge(token: int, ids: list[int] = ids, name: str = name, scale: float = scale) -> float:
                return float((weight @ bench.hidden(name, [*ids, token], len(prompt), scale)).softmax(-1)[1])

            scores.append(kwd.rewrite_ahead(row.tolist(), judge, k))
        assert_best(torch.tensor(scores), said)
    assert len(set(map(tuple, found))) == len(found)
    assert bench.engine.tokens(asks[3]) == [found[3]]  # where nobody uses an adapter


def test_a_classifier_under_an_adapter_of_its_own(bench: Bench) -> None:
    """The request's own model says what comes next: without an adapter, with another, and steered, beside others."""
    generator, size = torch.Generator().manual_seed(4), bench.engine.shape.hidden_size
    parts = {"weight": torch.randn(2, size, generator=generator), "bias": torch.tensor([0.5, -0.5])}
    head = bench.engine.add_vector(parts, Header(method="prefix_classifier", model=bench.engine.shape))
    params = KctsParams(classifier="it", adapter="law", k=6, simulations=8)
    search = SearchPlan("kcts", params.model_dump_json(), 1, (head.digest,))
    asks, told = [], list[list[dict[str, Any]]]()
    for prompt in PROMPTS:
        judge = CompanionPlan(tuple(prompt), adapter=bench.adapters["law"])
        judged = RequestPlan(None, DecodingPlan(search=search._replace(hidden_of=1)), companions=(judge,))
        alone = RequestPlan(None, DecodingPlan(search=search))
        told += [[], [], []]
        asks += [Ask(prompt, judged, 5, told=told[-3])]
        asks += [Ask(prompt, judged, 5, adapter=bench.adapters["math"], told=told[-2])]
        asks += [Ask(prompt, alone, 5, told=told[-1]), Ask(prompt, max_tokens=5)]
    found = bench.engine.tokens(*asks)
    names = (("", "law"), ("math", "law"), ("", ""))
    for index, prompt in enumerate(PROMPTS):
        mine = found[4 * index : 4 * index + 4]
        for (name, judge_name), said in zip(names, mine, strict=False):
            loop = JudgedLoop(bench.models[name], bench.models[judge_name])
            assert said == list(loop.run(Kcts(), params, prompt, 5, (), {"classifier": parts}).best)
        assert_best(bench.logits("", prompt, mine[3]), mine[3])
    assert found[0::4] != found[2::4]
    assert all(record["search"]["counts"]["tokens_computed"] > 5 for one in told for record in one[-1:])
    bench.engine.generate(Ask([5, 6, 7], max_tokens=1))  # so that the worker hears of the last to finish
    held = "requests_held", "searches_running", "search_sequences_living", "companions_running"
    counters = bench.engine.counters()
    assert counters["search_rollbacks"] > 0 and {name: counters[name] for name in held} == dict.fromkeys(held, 0)


def test_early_layers_are_read_by_the_requests_own_adapter(bench: Bench) -> None:
    """Fewer and more rows than the batch has pass the head."""
    layers = (0, 1)
    rewrites = (Rewrite("dola", DolaParams(layers=list(layers)).model_dump_json(), early=layers),)
    plan = RequestPlan(SteeringPlan((), keeps=layers), DecodingPlan(None, rewrites))
    asks = [Ask(prompt, plan, 6, adapter=bench.adapters.get(name)) for prompt in PROMPTS for name in ("", *NAMES)]
    found = [*bench.engine.tokens(*asks), *bench.engine.tokens(asks[1], *map(Ask, PROMPTS))]
    names = [name for _ in PROMPTS for name in ("", *NAMES)]
    for ask, name, said in zip([*asks, asks[1]], [*names, "law"], found, strict=False):
        ids, first = ask.prompt + said[:-1], len(ask.prompt) - 1
        assert_best(dola.scores(bench.models[name], ids, first + 1, layers, 0.1, [], {}, False, first), said)
