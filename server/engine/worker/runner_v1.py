"""The legacy model runner (vllm/v1/worker/gpu_model_runner.py; what the CPU wheel runs) -> BatchView."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import numpy as np
from torch import Tensor
from vllm.compilation.cuda_graph import CUDAGraphWrapper

from whipstaff.server.engine.patch import Swapped, swap
from whipstaff.server.engine.worker.batch import NOBODY, BatchView
from whipstaff.server.engine.worker.edits.forms import Forms
from whipstaff.server.engine.worker.kv_cache import copy_blocks
from whipstaff.server.engine.worker.step import WorkerStep


def attach(runner: Any, step: WorkerStep) -> None:
    """Let `runner` call `step` in every real step."""
    swap(runner, SteeredRunner, whipstaff_step=step)
    swap(runner.sampler, WatchedSampler, whipstaff_step=step)
    if step.edits.forms.has_two and isinstance(runner.model, CUDAGraphWrapper):  # around the whole model
        swap(runner.model, GraphsOfForms, whipstaff_forms=step.edits.forms, whipstaff_graphs={True: {}, False: {}})


class SteeredRunner(Swapped):
    """Laid over vLLM's runner."""

    whipstaff_step: WorkerStep

    def _model_forward(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        self.whipstaff_step.begin(view(self, self.whipstaff_step), input_ids)  # dummy runs call the model itself
        try:
            return super()._model_forward(input_ids, *args, **kwargs)
        finally:
            self.whipstaff_step.end_forward()

    def _dummy_run(self, *args: Any, **kwargs: Any) -> Any:
        forms = self.whipstaff_step.edits.forms
        if forms.warms_both:
            with forms.with_sites():
                super()._dummy_run(*args, **kwargs)
        return super()._dummy_run(*args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        # vLLM 0.32 rewinds the generator of a seeded request whose prefill is still incomplete, and CPU generators
        # cannot be rewound: it kills the engine. Such a row's sample is thrown away, so let it draw from the
        # default generator and leave the request's own untouched.
        held = unfinished_generators(self) if self.device.type == "cpu" else {}
        try:
            return super().sample_tokens(*args, **kwargs)
        finally:
            self.input_batch.generators.update(held)

    def _update_states(self, scheduler_output: Any) -> Any:
        if seats := self.whipstaff_step.notes.seats:
            place_seats(self.requests, seats, scheduler_output.scheduled_cached_reqs.all_token_ids)
        copies = scheduler_output.kv_cache_block_copies
        if not copies or self.device.type != "cpu" or scheduler_output.new_block_ids_to_zero:
            return super()._update_states(scheduler_output)
        copy_blocks(self.kv_caches, self.kv_cache_config.num_blocks, copies)
        scheduler_output.kv_cache_block_copies = None
        try:
            return super()._update_states(scheduler_output)
        finally:
            scheduler_output.kv_cache_block_copies = copies

    def _get_prompt_logprobs_dict(self, *args: Any, **kwargs: Any) -> Any:
        told, step = super()._get_prompt_logprobs_dict(*args, **kwargs), self.whipstaff_step
        return told if step.is_plain else step.pipeline.with_excess(told)

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        output = super()._sample(*args, **kwargs)
        self.whipstaff_step.give_to_companions_(output.sampled_token_ids)
        return output


class GraphsOfForms(Swapped):
    """Laid over what captures and replays passes of the whole model: each of its forms has its own graphs."""

    whipstaff_forms: Forms
    whipstaff_graphs: dict[bool, dict[Any, Any]]  # by whether the form is the plain one

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.concrete_cudagraph_entries = self.whipstaff_graphs[self.whipstaff_forms.runs_plain]
        return super().__call__(*args, **kwargs)

    def clear_graphs(self) -> None:
        for graphs in self.whipstaff_graphs.values():
            graphs.clear()


class WatchedSampler(Swapped):
    """Laid over vLLM's sampler."""

    whipstaff_step: WorkerStep

    def forward(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.whipstaff_step
        return super().forward(logits if step.is_plain else step.pipeline.scored(logits), *args, **kwargs)

    def apply_logits_processors(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
        step = self.whipstaff_step
        own = logits if step.is_plain else step.pipeline.to_draw_from(logits).float()
        return super().apply_logits_processors(own, *args, **kwargs)

    def sample(self, logits: Any, *args: Any, **kwargs: Any) -> Any:  # after penalties, before temperature
        if (step := self.whipstaff_step).is_plain:
            return super().sample(logits, *args, **kwargs)
        drawn = step.pipeline.before_draw(logits, is_spare=True)  # vLLM's own changes them in place too
        sampled, log_probabilities = super().sample(drawn, *args, **kwargs)
        step.pipeline.after_draw(drawn, sampled)
        return sampled, log_probabilities


def view(runner: Any, step: WorkerStep) -> BatchView:
    """The rows of the persistent batch, in its order."""
    if not step.requests:
        return NOBODY
    batch = runner.input_batch
    drafts = [len(tokens) for tokens in batch.spec_token_ids[: batch.num_reqs]] if runner.num_spec_tokens else ()
    found = BatchView(
        plans=step.requests.plans_of(batch.req_ids),
        starts=runner.query_start_loc.np[: batch.num_reqs + 1],
        positions=batch.num_computed_tokens_cpu[: batch.num_reqs],
        requests=batch.req_ids,
        draws=~runner.discard_request_mask.np[: batch.num_reqs],
        num_drafts=np.array(drafts, np.int64) if any(drafts) else None,
    )
    return found.in_groups(step.groups) if step.requests.have_companions else found


def place_seats(known: dict[str, Any], seats: Mapping[str, str], tokens: Mapping[str, Sequence[int]]) -> None:
    """Make sequences of searches known that are told anew, with the tokens that they have generated.

    Args:
        known: vLLM's states of requests.
        seats: whom each is like.
        tokens: all of each.
    """
    for name, origin in seats.items():
        if name not in known:
            known[name] = copy(known[origin])
            known[name].req_id = name
        known[name].output_token_ids = list(tokens[name][known[name].num_prompt_tokens :])


def unfinished_generators(runner: Any) -> dict[int, Any]:
    """Take the generators of rows whose sample will be discarded out of the batch."""
    generators = runner.input_batch.generators
    if not generators:
        return {}
    rows = np.nonzero(runner.discard_request_mask.np[: runner.input_batch.num_reqs])[0]
    return {int(row): generators.pop(int(row)) for row in rows if int(row) in generators}


def block_tables(runner: Any) -> list[tuple[Tensor, int]]:
    """Of every group of KV caches, the (rows, blocks) block table in the step's order, and the tokens of a block."""
    num_rows = runner.input_batch.num_reqs
    return [
        (table.get_device_tensor(num_rows), table.block_size) for table in runner.input_batch.block_table.block_tables
    ]
