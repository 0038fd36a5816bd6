"""Model Runner V2 (vllm/v1/worker/gpu/model_runner.py; what CUDA runs by default) -> BatchView."""

from typing import Any

import numpy as np
from torch import Tensor

from whipstaff.server.engine.patch import Swapped, swap
from whipstaff.server.engine.worker.batch import NOBODY, BatchView
from whipstaff.server.engine.worker.edits.forms import Forms
from whipstaff.server.engine.worker.step import WorkerStep


def attach(runner: Any, step: WorkerStep) -> None:
    """Let `runner` call `step` in every real step."""
    swap(runner, SteeredRunner, whipstaff_step=step)
    swap(runner.sampler, WatchedSampler, whipstaff_step=step)
    swap(runner.prompt_logprobs_worker, WatchedScorer, whipstaff_step=step)


class SteeredRunner(Swapped):
    """Laid over vLLM's runner."""

    whipstaff_step: WorkerStep

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        input_batch = super().prepare_inputs(*args, **kwargs)  # real batches only; dummy ones are made elsewhere
        self.whipstaff_step.begin(view(input_batch, self.whipstaff_step), input_batch.input_ids)
        return input_batch

    def execute_model(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().execute_model(*args, **kwargs)
        finally:
            self.whipstaff_step.end_forward()

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        forms = self.whipstaff_step.edits.forms
        if forms.warms_both:
            with forms.with_sites():
                super()._dummy_run(*args, **kwargs)
        return super()._dummy_run(*args, **kwargs)

    def capture_model(self, *args: Any, **kwargs: Any) -> Any:
        forms, manager = self.whipstaff_step.edits.forms, self.cudagraph_manager
        if forms.has_two and not isinstance(manager, GraphsOfForms):  # there is a new one for each set of KV caches
            swap(manager, GraphsOfForms, whipstaff_forms=forms, whipstaff_graphs={True: {}, False: {}})
        return super().capture_model(*args, **kwargs)

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        output, *counts = super().sample(*args, **kwargs)
        self.whipstaff_step.give_to_companions_(output.sampled_token_ids)
        return output, *counts


class GraphsOfForms(Swapped):
    """Laid over what captures and replays passes of the whole model: each of its forms has its own graphs."""

    whipstaff_forms: Forms
    whipstaff_graphs: dict[bool, dict[Any, Any]]  # by whether the form is the plain one

    def capture(self, *args: Any, **kwargs: Any) -> None:
        samples = self._capture_mem_samples  # bytes of each graph, where vLLM wants to know what all of them will take
        with self.whipstaff_forms.with_sites():
            self.graphs = self.whipstaff_graphs[False]
            super().capture(*args, **kwargs)
        self.graphs = self.whipstaff_graphs[True]
        super().capture(*args, **kwargs)
        if samples:
            half = len(samples) // 2
            samples[:] = [sum(both) for both in zip(samples[:half], samples[half:], strict=True)]

    def run_fullgraph(self, *args: Any, **kwargs: Any) -> Any:
        self.graphs = self.whipstaff_graphs[self.whipstaff_forms.runs_plain]
        return super().run_fullgraph(*args, **kwargs)

    def release_graphs(self) -> None:
        for graphs in self.whipstaff_graphs.values():
            graphs.clear()
        super().release_graphs()


class WatchedSampler(Swapped):
    """Laid over vLLM's sampler."""

    whipstaff_step: WorkerStep

    def __call__(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.whipstaff_step
        return super().__call__(logits if step.is_plain else step.pipeline.scored(logits), *args, **kwargs)

    def sample(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.whipstaff_step
        return super().sample(logits if step.is_plain else step.pipeline.to_draw_from(logits), *args, **kwargs)

    def _sample_random(self, logits: Any, *args: Any, **kwargs: Any) -> Any:  # after penalties and temperature
        if (step := self.whipstaff_step).is_plain:
            return super()._sample_random(logits, *args, **kwargs)
        drawn = step.pipeline.before_draw(logits)
        sampled, processed = super()._sample_random(drawn, *args, **kwargs)
        step.pipeline.after_draw(drawn, sampled)
        return sampled, processed


class WatchedScorer(Swapped):
    """Laid over what scores prompts."""

    whipstaff_step: WorkerStep

    def compute_prompt_logprobs(self, *args: Any, **kwargs: Any) -> Any:
        told, step = super().compute_prompt_logprobs(*args, **kwargs), self.whipstaff_step
        return told if step.is_plain else step.pipeline.with_excess(told)


def view(input_batch: Any, step: WorkerStep) -> BatchView:
    """The rows of the step's input batch, in its order."""
    if not step.requests:
        return NOBODY
    num, starts = input_batch.num_reqs, input_batch.query_start_loc_np[: input_batch.num_reqs + 1]
    positions = input_batch.num_computed_tokens_np[:num]
    found = BatchView(
        plans=step.requests.plans_of(input_batch.req_ids),
        starts=starts,
        positions=positions,
        requests=input_batch.req_ids,
        draws=positions + np.diff(starts) >= input_batch.prefill_len_np[:num],
    )
    return found.in_groups(step.groups) if step.requests.have_companions else found


def block_tables(runner: Any) -> list[tuple[Tensor, int]]:
    """Of every group of KV caches, the (rows, blocks) block table in the step's order, and the tokens of a block."""
    return list(zip(runner.block_tables.input_block_tables, runner.block_tables.block_sizes, strict=True))
