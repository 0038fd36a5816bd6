"""Soft prompts: the goldens, stretches of rows that are real tokens' embeddings, and crowds of requests against
transformers, in every way the engine can run."""

import json
import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import goldens
import numpy as np
import pytest
import torch
from engines import Ask, EngineUnderTest, plan
from modes import a_core_for_each_rank, v2_on_cpu
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from vllm.sampling_params import RequestOutputKind

from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.server.engine.worker.edits.soft_prompts import NOTHING, SoftRows
from whipstaff.server.plan import PositionedPlan, RequestPlan
from whipstaff.steering.inserts import Wanted, place_inserts
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector

LOGITS = 2e-4  # float32 engine against float64 references (goldens' README)
NUM_TOKENS = 8
MODES: dict[str, tuple[str, dict[str, Any]]] = {
    "chunked": ("llama_a", {"enforce_eager": True, "max_num_batched_tokens": 16, "num_gpu_blocks_override": 12}),
    "compiled": ("gemma2_a", {"max_num_batched_tokens": 48, "num_gpu_blocks_override": 24}),  # embeddings are scaled
    "two-ranks": ("llama_a", {"enforce_eager": True, "max_num_batched_tokens": 48, "tensor_parallel_size": 2}),
    "v2": ("llama_a", {"enforce_eager": True, "max_num_batched_tokens": 48}),
}


@dataclass
class Bench:
    mode: str
    name: str
    engine: EngineUnderTest
    model: Any

    @property
    def embeddings(self) -> Tensor:
        """As stored: before any scaling."""
        weight: Tensor = self.model.get_input_embeddings().weight.detach()
        return weight

    def soft(self, rows: Tensor) -> Vector:
        return self.engine.add_vector({"rows": rows}, Header(method="soft_prompt", model=self.engine.shape))

    def logits(self, ids: list[int], stretches: list[tuple[int, Tensor]]) -> Tensor:
        """(T, V), by transformers, with rows of embeddings put in at positions of the expanded prompt."""
        embedding = self.model.get_input_embeddings()

        def override(_: Any, __: Any, output: Tensor) -> Tensor:
            output = output.clone()
            scale = float(getattr(embedding, "scalar_embed_scale", 1.0))
            for start, rows in stretches:
                output[0, start : start + len(rows)] = rows * scale
            return output

        hook = embedding.register_forward_hook(override)
        try:
            with torch.no_grad():
                found: Tensor = self.model(torch.tensor([ids])).logits[0]
        finally:
            hook.remove()
        return found

    def greedy(self, ids: list[int], stretches: list[tuple[int, Tensor]], num: int) -> list[int]:
        prompt_len = len(ids)
        for _ in range(num):
            ids = [*ids, int(self.logits(ids, stretches)[-1].argmax())]
        return ids[prompt_len:]


@pytest.fixture(scope="module", params=MODES)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    name, flags = MODES[request.param]
    path = str(goldens.ROOT / "models" / name)
    with (
        v2_on_cpu() if request.param == "v2" else nullcontext(),
        a_core_for_each_rank() if request.param == "two-ranks" else nullcontext(),
    ):
        engine = EngineUnderTest(path, max_num_seqs=8, skip_tokenizer_init=True, max_logprobs=-1, **flags)
        try:
            assert engine.facts["takes_soft_prompts"]
            yield Bench(request.param, name, engine, AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
        finally:
            engine.close()


def ask(ids: list[int], wanted: list[tuple[Vector, int]], num: int = NUM_TOKENS, **sampling: Any) -> Ask:
    """A request for soft prompts before tokens of its prompt."""
    expanded, inserts = place_inserts(
        ids, [Wanted(vector.digest, len(vector.shared_parts["rows"]), before) for vector, before in wanted]
    )
    return Ask(expanded, plan(SteeringPlan((), inserts=inserts)), num, sampling)


def rows_of(output: Any) -> Tensor:
    """(T, V) log-probabilities of all the prompt's rows: those of its own tokens, and the first to be sampled from."""
    steps = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
    return torch.tensor([[step[token].logprob for token in range(len(step))] for step in steps])


@pytest.mark.engine
def test_golden_cases(bench: Bench) -> None:
    """Beside a plain request and each other, prefills chunked."""
    asks, wanted = [], []
    for folder in sorted((goldens.ROOT / "cases").glob("softprompt_*")):
        said = json.loads((folder / "case.json").read_text())
        if said["model"] == bench.name:
            (rows,) = load_file(folder / "params.safetensors").values()
            wanted.append(load_file(folder / "io.safetensors"))
            ids = wanted[-1]["input_ids"].tolist()
            asks.append(ask(ids, [(bench.soft(rows), said["insert_at"])], 16, prompt_logprobs=-1, logprobs=-1))
    assert bool(asks) == (bench.name == "llama_a")  # qwen2_a's: test_architectures.py
    plain = Ask([5, 9, 7, 30], max_tokens=4)
    *outputs, unchanged = bench.engine.generate(*asks, plain)
    for output, io in zip(outputs, wanted, strict=True):
        assert list(output.outputs[0].token_ids) == io["greedy_ids_f64"].tolist()
        torch.testing.assert_close(rows_of(output), io["logits_f64"].log_softmax(-1).float(), atol=LOGITS, rtol=0)
    assert list(unchanged.outputs[0].token_ids) == bench.greedy(plain.prompt, [], 4)


@pytest.mark.engine
def test_rows_that_are_embeddings_of_tokens_are_those_tokens(bench: Bench) -> None:
    """Bit for bit, where the model scales its embeddings too."""
    ids = [3, 17, 42, 5, 99, 120, 7, 8, 64, 31]
    both = {"prompt_logprobs": -1, "logprobs": -1}
    (expected,) = bench.engine.generate(Ask(ids, max_tokens=NUM_TOKENS, sampling=both))
    for first, last in ((0, 3), (4, 7), (9, 10), (0, 9)):
        vector = bench.soft(bench.embeddings[ids[first:last]])
        (output,) = bench.engine.generate(ask(ids[:first] + ids[last:], [(vector, first)], **both))
        assert len(output.prompt_token_ids) == len(ids)
        assert output.outputs[0].token_ids == expected.outputs[0].token_ids
        assert torch.equal(rows_of(output), rows_of(expected))


@pytest.mark.engine
def test_crowds(bench: Bench) -> None:
    """Requests with none to three soft prompts that share tokens, placeholders, vectors or all of them; blocks for few
    of them; the second round finds the first one's blocks."""
    rng = random.Random(1)
    generator = torch.Generator().manual_seed(1)
    scale = bench.embeddings.std()
    vectors = [
        bench.soft(scale * torch.randn(num, bench.embeddings.shape[1], generator=generator)) for num in (1, 5, 40)
    ]
    shared = [rng.randrange(3, 300) for _ in range(70)]
    asks, stretches = [], []
    for _ in range(6 if bench.mode == "v2" else 14):
        ids = shared[: rng.randint(1, 70)] + [rng.randrange(3, 300) for _ in range(rng.choice([0, 0, 5]))]
        chosen = [(rng.choice(vectors), rng.choice([0, len(ids) // 2, len(ids)])) for _ in range(rng.choice([0, 1, 3]))]
        asks.append(ask(ids, chosen) if chosen else Ask(ids, max_tokens=NUM_TOKENS))
        inserts = asks[-1].plan.steering.inserts if asks[-1].plan and asks[-1].plan.steering else ()
        rows = {vector.digest: vector.shared_parts["rows"] for vector in vectors}
        stretches.append([(insert.start, rows[insert.digest]) for insert in inserts])
        asks.append(Ask(asks[-1].prompt, max_tokens=NUM_TOKENS))  # the placeholders as the tokens that they are
        stretches.append([])
    expected = [bench.greedy(one.prompt, rows, NUM_TOKENS) for one, rows in zip(asks, stretches, strict=True)]
    assert len({tuple(tokens) for tokens in expected}) > len(asks) // 2
    for _ in range(2):
        assert bench.engine.tokens(*asks) == expected
    thrice = {"n": 3, "temperature": 1.0, "top_k": 1, "output_kind": RequestOutputKind.FINAL_ONLY}
    for one, tokens in (
        zip(asks[:4], expected, strict=False) if bench.mode != "v2" else ()
    ):  # no top_k in the interpreter
        (output,) = bench.engine.generate(Ask(one.prompt, one.plan, NUM_TOKENS, thrice))
        assert [list(each.token_ids) for each in output.outputs] == [tokens] * 3
    bench.engine.generate(Ask([5, 6, 7], max_tokens=1))
    assert bench.engine.counters()["requests_held"] == 0


def test_the_buffers_hold_what_the_step_has() -> None:
    """Random steps: every placeholder's row and nothing else, whatever stood there before."""
    rng = random.Random(0)
    shape = ModelShape(architecture="any", hidden_size=4, num_layers=1, num_heads=1, head_dim=4)
    vectors = {
        name: Vector(name, Header(method="soft_prompt", model=shape), {}, {"rows": torch.randn(num, 4)})
        for name, num in (("a", 1), ("b", 3), ("c", 9))
    }
    soft = SoftRows(64, 4, torch.float32, torch.device("cpu"), vectors.__getitem__)
    for _ in range(200):
        plans: list[PositionedPlan | None] = []
        starts, positions = [0], []
        expected: list[Tensor | None] = []
        for _ in range(rng.randint(0, 4)):
            names = rng.choices(["a", "b", "c"], k=rng.randint(0, 3))
            wanted = [Wanted(name, len(vectors[name].shared_parts["rows"]), rng.randint(0, 6)) for name in names]
            ids, inserts = place_inserts([1] * 6, wanted)
            rows: list[Tensor | None] = [None] * (len(ids) + 5)
            for digest, start, num in inserts:
                rows[start : start + num] = vectors[digest].shared_parts["rows"]
            first = rng.randrange(len(rows))
            last = rng.randint(first + 1, min(len(rows), first + 16))
            plans.append(PositionedPlan(RequestPlan(SteeringPlan((), inserts=inserts)), len(ids)) if names else None)
            positions.append(first)
            starts.append(starts[-1] + last - first)
            expected += rows[first:last]
        soft.begin_step(BatchView(plans, np.array(starts), np.array(positions)))
        for token, row in enumerate([*expected, *[None] * (64 - len(expected))]):
            index = int(soft.index[token])
            assert (index == NOTHING) == (row is None)
            assert row is None or torch.equal(soft.rows[index], row)
