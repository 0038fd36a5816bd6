"""DoLa through the engine: the authors' tokens, and plain transformers token for token in mixed batches.

Each engine has a step budget smaller than the long prompts (chunked prefill), blocks for a part of the requests only
(preemption) and prompts that share prefixes, which the second round finds cached.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from decodings import GOLDEN, golden
from engines import Ask, EngineUnderTest, edit, running
from modes import WITH_RANKS
from reference import dola as reference
from reference.steered import Edit
from transformers import AutoModelForCausalLM

from whipstaff.decoding.methods.dola import DolaParams
from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan, Rewrite
from whipstaff.server.plan import RequestPlan
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.vector_file import Vector
from whipstaff.steering.where import Where

pytestmark = pytest.mark.engine

MODELS = GOLDEN / "models"
CASES = [case for case in golden("dola")[0]["cases"] if case["kind"].startswith("greedy")]
SCORED = [case for case in golden("dola")[0]["cases"] if case.get("mode", "").startswith("dola")]
NUM_TOKENS = 8
HALVES = {"low": [0, 2], "high": [4, 6]}  # of eight blocks, as in Hugging Face's port


@dataclass
class Case:
    """A request in both worlds."""

    prompt: list[int]
    params: DolaParams | None = None
    scale: float = 0.0  # of the vector, on every token
    weight: float = 0.0  # of the auxiliary model
    num_tokens: int = NUM_TOKENS

    @property
    def layers(self) -> list[int]:
        named = self.params.layers if self.params else []
        return HALVES[named] if isinstance(named, str) else sorted(named)

    def ask(self, vector: Vector, **sampling: Any) -> Ask:
        edits = (edit(vector, self.scale, Where.of("all")),) if self.scale else ()
        rewrites = (Rewrite("dola", self.params.model_dump_json(), early=tuple(self.layers)),) if self.params else ()
        decoding = DecodingPlan(Mix.of({"other": self.weight}) if self.weight else None, rewrites)
        steering = SteeringPlan(edits, keeps=tuple(self.layers))
        return Ask(self.prompt, RequestPlan(steering, decoding), self.num_tokens, sampling)


@dataclass
class Bench:
    is_slow: bool  # Triton's interpreter takes minutes
    engine: EngineUnderTest
    vector: Vector
    base: Any
    other: Any

    def scores(self, case: Case, ids: list[int], first: int) -> torch.Tensor:
        """(len(ids) - first, V) by plain transformers."""
        params = case.params or DolaParams(layers=[0])
        edits = [
            Edit("resid_post", place.layer, case.scale, None, parts["add"], lambda position, prompt_len: True)
            for place, parts in self.vector.tensors.items()
        ]
        args = self.base, ids, len(case.prompt)
        edits, others = edits if case.scale else [], {self.other: case.weight} if case.weight else {}
        if case.params is None:
            return reference.mixed(*args, edits, others)[0][first:]
        norm = params.final_norm_on_candidates
        return reference.scores(*args, case.layers, params.relative_top, edits, others, norm, first)

    def greedy(self, case: Case) -> list[int]:
        key = repr(case)
        if key not in KNOWN:
            ids = list(case.prompt)
            for _ in range(case.num_tokens):
                ids.append(int(self.scores(case, ids, len(ids) - 1)[0].argmax()))
            KNOWN[key] = ids[len(case.prompt) :]
        return KNOWN[key]


KNOWN: dict[str, list[int]] = {}  # by request: every mode serves the same models and vectors


@pytest.fixture(scope="module", params=WITH_RANKS)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    with running(
        request.param,
        str(MODELS / "dola8"),
        [("other", str(MODELS / "expert_bigvocab"))],
        skip_tokenizer_init=True,
        max_num_batched_tokens=40,
        max_num_seqs=12,
        num_gpu_blocks_override=16,
        enable_prefix_caching=True,
    ) as engine:
        generator = torch.Generator().manual_seed(3)
        vector = engine.add_vector(
            {f"resid_post.{layer}.add": 0.4 * torch.randn(64, generator=generator) for layer in (1, 4)}
        )
        models = [
            AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
            for name in ("dola8", "expert_bigvocab")
        ]
        yield Bench(request.param.startswith("v2"), engine, vector, *models)


def test_tokens_are_those_of_the_official_loops(bench: Bench) -> None:
    """All recorded generations at once; their repetition penalty is vLLM's own."""
    asks = []
    for said in CASES:
        layers = said.get("candidate_layers", [said.get("premature_layer")])
        params = DolaParams(layers=layers, relative_top=said["relative_top"])
        penalty = said.get("repetition_penalty", 1.0)
        case = Case(said["prompt"], params, num_tokens=len(said["output"]))
        asks.append(case.ask(bench.vector, repetition_penalty=penalty))
    assert bench.engine.tokens(*asks) == [said["output"] for said in CASES]


def mixed_cases(num: int, seed: int) -> list[Case]:
    """Plain, steered, proxy-tuned, DoLa of every kind, and all of it together, over shared prefixes."""
    generator = torch.Generator().manual_seed(seed)

    def ids(most: int) -> list[int]:
        return torch.randint(3, 259, (most,), generator=generator).tolist()

    stem = ids(70)
    kinds = [
        DolaParams(layers=[0, 2, 4, 6]),
        None,
        DolaParams(layers=[5], relative_top=0.3),
        DolaParams(layers="high", relative_top=0.02),
        DolaParams(layers="low", final_norm_on_candidates=True),
    ]
    return [
        Case(
            stem[: (7, 35, 66)[index % 3]] + ids(1 + index % 4),
            kinds[index % 5],
            scale=(0.0, 0.7, 0.0, 1.3)[index % 4],
            weight=(0.0, 0.5, 0.0, 0.0, 0.0, -0.4, 0.0)[index % 7],
        )
        for index in range(num)
    ]


def test_mixed_batches(bench: Bench) -> None:
    cases = mixed_cases(14, seed=5)[:: 2 if bench.is_slow else 1]
    expected = [bench.greedy(case) for case in cases]
    assert len({tuple(tokens) for tokens in expected}) > len(cases) - 3
    for _ in range(1 if bench.is_slow else 2):
        assert bench.engine.tokens(*(case.ask(bench.vector) for case in cases)) == expected
    bench.engine.generate(Ask([5, 6, 7], max_tokens=1))
    assert bench.engine.counters()["requests_held"] == 0


def test_scores_are_those_of_the_official_class(bench: Bench) -> None:
    """Sums over an answer's tokens, -1000 for implausible ones, beside requests that want log-probabilities."""
    asks, answers = [], []
    for said in SCORED:
        layers = said.get("candidate_premature_layers", [said.get("premature_layer")])
        names = ("relative_top", "relative_top_value", "post_softmax")
        params = DolaParams(layers=layers, **{name: said[name] for name in names})
        context, whole = ([0, *(byte + 3 for byte in text.encode())] for text in (said["context"], _whole(said)))
        asks.append(Case(whole, params, num_tokens=1).ask(bench.vector, prompt_logprobs=0))
        answers.append(range(len(context), len(whole)))
    others = [replace(case, num_tokens=1).ask(bench.vector, prompt_logprobs=0) for case in mixed_cases(3, seed=8)]
    outputs = bench.engine.generate(*asks, *others)
    for said, ask, answer, output in zip(SCORED, asks, answers, outputs, strict=False):
        total = sum(output.prompt_logprobs[position][ask.prompt[position]].logprob for position in answer)
        assert total == pytest.approx(said["sum_logprob"], abs=2e-3)


def _whole(said: dict[str, Any]) -> str:
    return said["context"] + said["answer"]


def test_prompts_are_scored_too(bench: Bench) -> None:
    """Chunk by chunk, beside others."""
    cases = [replace(case, num_tokens=1) for case in mixed_cases(15, seed=6) if len(case.prompt) > 50 and case.params]
    for case in cases:
        assert case.params is not None
        case.params = case.params.model_copy(update={"relative_top": 0.0})
    outputs = bench.engine.generate(*(case.ask(bench.vector, prompt_logprobs=1) for case in cases))
    for case, output in zip(cases, outputs, strict=True):
        expected = bench.scores(case, case.prompt, 0).log_softmax(-1)
        for position, said in enumerate(output.prompt_logprobs[1:]):
            for token, entry in said.items():
                assert entry.logprob == pytest.approx(expected[position, token].item(), abs=1e-3)
