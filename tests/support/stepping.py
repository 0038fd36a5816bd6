"""A worker that installs attention edits into a plain vLLM engine, and an engine that drives it without plans.

Requests name edits, given before over `rpc`, in SamplingParams.extra_args: `attention` is a list of [name, first
position, end of positions or None]. What plans cannot say, such as any bias on any key, can be said here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any

from safetensors.torch import load
from vllm import LLM, SamplingParams
from vllm.v1.worker.cpu_worker import CPUWorker
from warm import warm_processes

from whipstaff.server.engine.config import require_eager_attention
from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.worker.edits.attention import AttentionEdits, AttentionSpan, LayerEdit
from whipstaff.steering.kinds.attention import RowOverride, ScoreBias


def spans(
    row: int, start: int, end: int, position: int, edit: LayerEdit, intervals: Iterable[tuple[int, int | None]]
) -> Iterator[AttentionSpan]:
    """What of the absolute `intervals` lies in a row's tokens [start, end), the first of them at `position`."""
    for first, stop in intervals:
        begin = max(first, position) - position + start
        finish = end if stop is None else min(end, stop - position + start)
        if begin < finish:
            yield AttentionSpan(row, begin, finish, position + begin - start, edit)


class SteppingWorker(CPUWorker):
    def load_model(self, *args: Any, **kwargs: Any) -> None:
        super().load_model(*args, **kwargs)
        runner = self.model_runner
        self._asks: dict[str, dict[str, Any]] = {}
        require_eager_attention(self.vllm_config.compilation_config)
        self._attention = AttentionEdits(runner.get_model())
        self._edits: dict[str, LayerEdit] = {}
        worker: Any = self
        cls: Any = type(runner)

        class SteppingRunner(cls):
            def _model_forward(self, *args: Any, **kwargs: Any) -> Any:
                worker.begin_step(self.input_batch, self.query_start_loc.np)
                return super()._model_forward(*args, **kwargs)

        swap(runner, SteppingRunner)

    def initialize_from_config(self, *args: Any, **kwargs: Any) -> None:
        super().initialize_from_config(*args, **kwargs)
        self._attention.learn_layouts()

    def execute_model(self, scheduler_output: Any) -> Any:
        for new in scheduler_output.scheduled_new_reqs:
            self._asks[new.req_id] = (new.sampling_params.extra_args or {}) | {"prompt_len": new.prompt_len}
        return super().execute_model(scheduler_output)

    def begin_step(self, batch: Any, starts: Any) -> None:
        found: list[Any] = []
        for row, request_id in enumerate(batch.req_ids):
            start, end, asked = int(starts[row]), int(starts[row + 1]), self._asks[request_id]
            position = int(batch.num_computed_tokens_cpu[row])
            for name, first, stop in asked.get("attention", ()):
                found += spans(row, start, end, position, self._edits[name], [(first, stop)])
        self._attention.begin_step(found)

    def attention_facts(self) -> dict[str, Any]:
        return asdict(self._attention.abilities)

    def add_bias(self, name: str, layer: int, heads: list[int], spans: list[tuple[int, int, float]]) -> None:
        self._add(name, ScoreBias(layer, tuple(heads), tuple((start, end, amount) for start, end, amount in spans)))

    def add_override(self, name: str, layer: int, head: int, keys: list[int], weights: list[float]) -> None:
        self._add(name, RowOverride(layer, head, tuple(keys), tuple(weights)))

    def add_side(self, name: str, data: bytes) -> None:
        """safetensors `{layer}.rows` (N, hidden_size) and `{layer}.gate`, a scalar or (heads,)."""
        parts = load(data)
        layers = [int(key.split(".")[0]) for key in parts if key.endswith("rows")]
        rows, gates = ({layer: parts[f"{layer}.{part}"] for layer in layers} for part in ("rows", "gate"))
        self._add(name, self._attention.side_attention(rows, gates))

    def add_prefix(self, name: str, data: bytes) -> None:
        """safetensors `rows` (P, 2 * layers, kv heads, D), keys and values by turns."""
        rows = load(data)["rows"]
        pairs = {layer: (rows[:, 2 * layer], rows[:, 2 * layer + 1]) for layer in range(rows.shape[1] // 2)}
        self._add(name, self._attention.prefix_kv(pairs))

    def _add(self, name: str, edit: LayerEdit) -> None:
        self._attention.check(edit)
        self._edits[name] = edit


class SteppingEngine:
    """A plain engine under SteppingWorker, float32 and greedy. `close` it."""

    def __init__(self, model: str, **flags: Any) -> None:
        defaults: dict[str, Any] = {"dtype": "float32", "max_model_len": 256, "block_size": 32, "seed": 0}
        with warm_processes():
            self.llm = LLM(
                model=model,
                worker_cls="stepping.SteppingWorker",
                skip_tokenizer_init=True,
                kv_cache_memory_bytes=flags.pop("kv_cache_memory_bytes", 1 << 27),
                **defaults | flags,
            )

    def generate(self, *asks: tuple[list[int], dict[str, Any] | None, int, str]) -> list[Any]:
        """Every (prompt, extra_args, number of tokens, cache salt) at once; their outputs with log-probabilities."""
        params = [
            SamplingParams(
                temperature=0, max_tokens=num, ignore_eos=True, detokenize=False, logprobs=5, extra_args=extra
            )
            for _, extra, num, _ in asks
        ]
        prompts = [{"prompt_token_ids": prompt, "cache_salt": salt} for prompt, _, _, salt in asks]
        return self.llm.generate(prompts, params, use_tqdm=False)

    def metrics(self) -> dict[str, float]:
        """vLLM's counters."""
        return {metric.name: metric.value for metric in self.llm.get_metrics() if hasattr(metric, "value")}

    def rpc(self, name: str, *args: Any) -> Any:
        return self.llm.collective_rpc(name, args=args)[0]

    def close(self) -> None:
        self.llm.llm_engine.engine_core.shutdown()


def steps(output: Any) -> list[dict[int, float]]:
    """Per generated token, the likeliest tokens and their log-probabilities."""
    return [{token: entry.logprob for token, entry in step.items()} for step in output.outputs[0].logprobs]
