"""A steerable engine for tests: started in this process, driven from a loop in its own thread."""

import asyncio
import json
import os
import threading
from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from uuid import uuid4

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from modes import MODES, run_as
from prometheus_client import REGISTRY
from vllm import SamplingParams
from vllm.config import CompilationMode
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.lora.request import LoRARequest
from warm import warm_processes

from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.engine.frontend.launch import Engine, PlanDict, Setup, start
from whipstaff.server.engine.frontend.selftest import describe
from whipstaff.server.plan import PLAN_KEY, RequestPlan
from whipstaff.steering.edits import weigh
from whipstaff.steering.needs import Hook
from whipstaff.steering.plan import Edit, PlannedEdit, SteeringPlan
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector, packed, parse
from whipstaff.steering.where import Where

R = TypeVar("R")
PATIENCE = 600  # seconds; every wait on an engine is bounded
CLOSING: list[threading.Thread] = []  # of engines that were told to end


@dataclass
class Ask:
    """One request: a prompt, what to do to it, and how much to generate."""

    prompt: list[int]
    plan: RequestPlan | None = None
    max_tokens: int = 16
    sampling: dict[str, Any] = field(default_factory=dict)
    adapter: tuple[str, int, str] | None = None  # of LoRA: name, number and path
    abort_after: int | None = None  # outputs after which the client goes away
    told: list[dict[str, Any]] | None = None  # where explanations of its tokens go
    names: list[str] | None = None  # where the engine's names of its sequences go


def plan(steering: SteeringPlan | None = None, mix: dict[str, float] | None = None) -> RequestPlan | None:
    """Steering, and weights of auxiliary models' logits."""
    return RequestPlan(steering, DecodingPlan(Mix.of(mix)) if mix else None) if steering or mix else None


def weights(asked: RequestPlan | None) -> dict[str, float]:
    """The weights that a plan gives auxiliary models."""
    mix = asked.decoding.mix if asked and asked.decoding else None
    return {term.stream.model: term.weight for term in mix.terms[1:]} if mix else {}


def edit(vector: Vector, scale: float, where: Where, layers: tuple[int, ...] | None = None) -> PlannedEdit:
    """A vector at a strength, as the front end would plan it."""
    bare = Edit(vector.digest, json.dumps({"scale": scale}), layers)
    weight = weigh(vector, bare)
    return PlannedEdit(bare._replace(num_lines=weight.num_lines, num_instructions=weight.num_instructions), where)


class EngineUnderTest:
    """An engine with greedy defaults. `close` it: nothing waits until its processes are gone, which takes vLLM 10 s."""

    def __init__(
        self,
        model: str,
        aux: Iterable[tuple[str, str]] = (),
        num_slots: int | None = None,
        sites: Iterable[Hook] = (),
        vectors: Iterable[Vector] = (),
        lookahead: bool = False,
        max_search_seqs: int | None = None,
        attention_rows: bool = False,
        hidden_states: int = 0,
        attention_layers: Sequence[int] = (),
        **flags: Any,
    ):
        defaults = {"dtype": "float32", "max_model_len": 256, "block_size": 32, "kv_cache_memory_bytes": 1 << 27}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        args = AsyncEngineArgs(model=model, **defaults | flags)
        reads: dict[str, Any] = {"attention_rows": attention_rows, "hidden_states": hidden_states}
        reads["attention_layers"] = attention_layers
        setup = Setup(aux, num_slots, vectors, sites, lookahead=lookahead, max_search_seqs=max_search_seqs, **reads)
        with warm_processes():
            self.engine: Engine = self.run(self._start(args, setup))
        self.facts = self.run(describe(self.engine))
        self.shape = ModelShape.model_validate(self.facts["model"])

    async def _start(self, args: AsyncEngineArgs, setup: Setup) -> Engine:
        return start(args, setup)

    def run(self, work: Coroutine[Any, Any, R]) -> R:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE)

    def close(self) -> None:
        CLOSING.append(threading.Thread(target=self._close))
        CLOSING[-1].start()

    def _close(self) -> None:
        self.engine.shutdown(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def add_vector(self, tensors: dict[str, Any], header: Header | None = None) -> Vector:
        """Make a vector of tensors named as in a vector file, and give it to the workers."""
        data = packed(header or Header(method="vector", model=self.shape), tensors)
        (digest, *_) = self.run(self.engine.collective_rpc("whipstaff_add_vector", args=(data,)))
        vector = parse(data)
        assert vector.digest == digest
        return vector

    @property
    def num_preemptions(self) -> float:
        """Since it started."""
        return vllm_counters(self.engine.model_config.served_model_name)["vllm:num_preemptions_total"]

    def call(self, method: str) -> Any:
        """A method of the workers; what the first says."""
        return self.run(self.engine.collective_rpc(method))[0]

    def counters(self) -> dict[str, Any]:
        counters: dict[str, Any] = self.call("whipstaff_counters")
        return counters

    def generate(self, *asks: Ask) -> list[Any]:
        """Run all at once; each one's final output, None where the client went away."""

        async def all_of_them() -> list[Any]:
            return await asyncio.gather(*map(self.answer, asks))

        return self.run(all_of_them())

    def tokens(self, *asks: Ask) -> list[list[int]]:
        return [list(output.outputs[0].token_ids) for output in self.generate(*asks)]

    async def answer(self, ask: Ask) -> Any:
        told = ask.told
        explained = None if told is None else lambda index, record: told.append(record)
        names = ask.names
        named = None if names is None else lambda index, name: names.append(name)
        extra = {PLAN_KEY: PlanDict(ask.plan.to_wire(), explained=explained, named=named)} if ask.plan else None
        settings = {"temperature": 0, "ignore_eos": True, "detokenize": False} | ask.sampling
        params = SamplingParams(max_tokens=ask.max_tokens, extra_args=extra, **settings)
        adapter = LoRARequest(*ask.adapter) if ask.adapter else None
        prompt = {"prompt_token_ids": ask.prompt}
        outputs = self.engine.generate(prompt, params, f"test-{uuid4()}", lora_request=adapter)
        seen: list[Any] = []
        async for output in outputs:
            seen.append(output)
            if len(seen) == ask.abort_after:
                await outputs.aclose()
                return None
        return seen[-1]


@contextmanager
def running(mode: str, model: str, aux: Iterable[tuple[str, str]] = (), **flags: Any) -> Iterator[EngineUnderTest]:
    """An engine in one of MODES: that it really is, is checked."""
    with run_as(mode):
        engine = EngineUnderTest(model, aux, **MODES[mode], **flags)
    try:
        assert engine.facts["runner"] == mode[:2]
        config = engine.engine.vllm_config
        assert config.scheduler_config.async_scheduling == MODES[mode]["async_scheduling"]
        if not config.model_config.enforce_eager:
            assert config.compilation_config.mode == CompilationMode.DYNAMO_TRACE_ONCE
            assert config.compilation_config.backend == ("eager" if "traced" in mode else "inductor")
        yield engine
    finally:
        engine.close()


def vllm_counters(model: str) -> dict[str, float]:
    """vLLM's own of engines in this process that serve a model of that name, summed over their other labels."""
    found: dict[str, float] = {}
    for metric in REGISTRY.collect():
        for sample in metric.samples:
            if sample.labels.get("model_name") == model:
                found[sample.name] = found.get(sample.name, 0) + sample.value
    return found
