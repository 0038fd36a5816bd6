"""A worker that installs routing and attention edits into a plain vLLM engine, and an engine that drives it.

Until a request's plan carries such edits, tests name them in SamplingParams.extra_args: `slot` is the routing slot of
all its tokens.
"""

from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.v1.worker.cpu_worker import CPUWorker

from whipstaff.server.engine.routing import install_routing


class SteppingWorker(CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner, asked = self.model_runner, self.vllm_config.additional_config["sites"]
        self._asks: dict[str, dict[str, Any]] = {}
        self._slots = torch.full((self.vllm_config.scheduler_config.max_num_batched_tokens,), -1, dtype=torch.int32)
        if "routing" in asked:
            self._routing = install_routing(runner.get_model(), self._slots, num_slots=8)
        worker, cls = self, type(runner)

        class SteppingRunner(cls):
            def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
                worker.begin_step(self.input_batch, self.query_start_loc.np)
                return super()._model_forward(*args, **kwargs)

        runner.__class__ = SteppingRunner

    def execute_model(self, scheduler_output: Any) -> Any:
        for new in scheduler_output.scheduled_new_reqs:
            self._asks[new.req_id] = (new.sampling_params.extra_args or {}) | {"prompt_len": new.prompt_len}
        return super().execute_model(scheduler_output)

    def begin_step(self, batch: Any, starts: Any) -> None:
        self._slots.fill_(-1)
        for row, request_id in enumerate(batch.req_ids):
            self._slots[int(starts[row]) : int(starts[row + 1])] = self._asks[request_id].get("slot", -1)

    def write_routing(self, slot: int, edits: list[tuple[int, dict[str, Any]]]) -> None:
        self._routing.write(slot, dict(edits))

    def routing_facts(self) -> list[Any]:
        tables = self._routing
        return [(layer, tables.num_experts(layer), list(tables.scheme(layer).modes)) for layer in tables.layers]


class SteppingEngine:
    """A plain engine under SteppingWorker, float32 and greedy. `close` it."""

    def __init__(self, model: str, *sites: str, **flags: Any) -> None:
        defaults: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "block_size": 32, "seed": 0}
        self.llm = LLM(
            model=model,
            worker_cls="stepping.SteppingWorker",
            additional_config={"sites": list(sites)},
            skip_tokenizer_init=True,
            kv_cache_memory_bytes=flags.pop("kv_cache_memory_bytes", 1 << 27),
            **defaults | flags,
        )

    def generate(self, *asks: tuple[list[int], dict[str, Any] | None, int]) -> list[Any]:
        """Every (prompt, extra_args, number of tokens) at once; their outputs with log-probabilities."""
        params = [
            SamplingParams(
                temperature=0, max_tokens=num, ignore_eos=True, detokenize=False, logprobs=5, extra_args=extra
            )
            for _, extra, num in asks
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _, _ in asks]
        return self.llm.generate(prompts, params, use_tqdm=False)

    def rpc(self, name: str, *args: Any) -> Any:
        return self.llm.collective_rpc(name, args=args)[0]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def steps(output: Any) -> list[dict[int, float]]:
    """Per generated token, the likeliest tokens and their log-probabilities."""
    return [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
