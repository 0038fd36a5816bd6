"""OPERA's whole generations, as its authors' own code recorded them, through an engine: attention of the last layer out
of paged keys, candidates that are tried, beams that go back, beside requests that do nothing of the kind."""

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest
import torch
from decodings import GOLDEN, golden
from engines import Ask, EngineUnderTest, running
from transformers import LlamaForCausalLM
from vllm import SamplingParams

from whipstaff.decoding.plan import DecodingPlan, SearchPlan
from whipstaff.decoding.search.opera import OperaParams, OperaSetting
from whipstaff.server.engine.frontend.launch import PlanDict
from whipstaff.server.plan import PLAN_KEY, RequestPlan

pytestmark = pytest.mark.engine

CASES = {case["id"]: case for case in golden("opera")[0]["cases"]}
NUM_PLAIN = 20  # tokens of each plain neighbour


@pytest.fixture(scope="module", params=[("v1-eager-async", "roll0"), ("v1-traced-sync", "roll1")], ids="-".join)
def bench(request: pytest.FixtureRequest) -> Iterator[tuple[dict[str, Any], EngineUnderTest]]:
    mode, name = request.param
    with running(
        mode,
        str(GOLDEN / CASES[name]["model"]),
        lookahead=True,
        attention_rows=True,
        skip_tokenizer_init=True,
        max_num_batched_tokens=64,
        max_num_seqs=16,
    ) as engine:
        yield CASES[name], engine


def plan_of(case: dict[str, Any], **own: Any) -> RequestPlan:
    params = OperaParams(
        beams=case["num_beams"],
        candidates=case["num_attn_candidates"],
        scale_factor=case["scale_factor"],
        **{"threshold": case["threshold"], "penalty_weight": case["penalty_weights"], "official_fp16": True} | own,
    )
    start, last = case["image"]
    setting = OperaSetting(**params.model_dump(exclude={"span"}), trusted=((start, last + 1),))
    return RequestPlan(decoding=DecodingPlan(search=SearchPlan("opera", setting.model_dump_json(), params.beams)))


async def answer(engine: EngineUnderTest, case: dict[str, Any], **own: Any) -> tuple[list[int], dict[str, Any]]:
    told: dict[str, Any] = {}
    plan = PlanDict(plan_of(case, **own).to_wire(), explained=lambda index, record: told.update(record))
    params = SamplingParams(
        max_tokens=case["max_new_tokens"],
        temperature=0,
        ignore_eos=True,
        stop_token_ids=[1],
        detokenize=False,
        extra_args={PLAN_KEY: plan},
    )
    found: list[int] = []
    async for output in engine.engine.generate({"prompt_token_ids": case["prompt"]}, params, f"opera-{uuid4()}"):
        found = list(output.outputs[0].token_ids)
    return found, told["search"]


async def plain(engine: EngineUnderTest, prompt: list[int]) -> list[int]:
    params = SamplingParams(max_tokens=NUM_PLAIN, temperature=0, ignore_eos=True, detokenize=False)
    found: list[int] = []
    async for output in engine.engine.generate({"prompt_token_ids": prompt}, params, f"plain-{uuid4()}"):
        found = list(output.outputs[0].token_ids)
    return found


def test_the_recorded_generation_beside_others(bench: tuple[dict[str, Any], EngineUnderTest]) -> None:
    case, engine = bench

    async def all_of_them() -> tuple[list[Any], list[Any]]:
        searching = [answer(engine, case), answer(engine, case), answer(engine, case, threshold=99)]
        alone = [plain(engine, case["prompt"][:length]) for length in (24, 7, 13)]
        return await asyncio.gather(asyncio.gather(*searching), asyncio.gather(*alone))

    searched, alone = engine.run(all_of_them())
    rollbacks = sum(step["rollback"] for step in case["steps"])
    assert rollbacks > 0
    for tokens, told in searched[:2]:
        assert tokens == case["output"]
        assert told["counts"]["rollbacks"] == rollbacks and told["counts"]["tried"] > 0
    assert searched[2][0] != case["output"] and searched[2][1]["counts"].get("rollbacks", 0) == 0
    model = LlamaForCausalLM.from_pretrained(GOLDEN / case["model"], dtype=torch.float32)
    for length, tokens in zip((24, 7, 13), alone, strict=True):
        prompt = torch.tensor([case["prompt"][:length]])
        wanted = model.generate(prompt, max_new_tokens=NUM_PLAIN, min_new_tokens=NUM_PLAIN, do_sample=False)
        assert tokens[:5] == wanted[0, length : length + 5].tolist()
    engine.generate(Ask([5, 6, 7], max_tokens=1))  # so that the worker hears of the last to finish
    counters = engine.counters()
    held = "requests_held", "searches_running", "search_sequences_living"
    assert {name: counters[name] for name in held} == dict.fromkeys(held, 0)


def test_without_its_penalty_the_answer_is_another(bench: tuple[dict[str, Any], EngineUnderTest]) -> None:
    case, engine = bench
    tokens, _ = engine.run(answer(engine, case, penalty_weight=0.0))
    assert tokens != case["output"]
