"""The legacy model runner (vllm/v1/worker/gpu_model_runner.py; what the CPU wheel runs) -> BatchView."""

from typing import Any

import numpy as np
from torch import Tensor

from whipstaff.server.engine.worker.batch import NOBODY, BatchView
from whipstaff.server.engine.worker.logits.pipeline import LogitsPipeline
from whipstaff.server.engine.worker.step import WorkerStep
from whipstaff.server.engine.worker.token_copies import TokenCopies


def attach(runner: Any, steerer: WorkerStep) -> None:
    """Make `runner` tell `steerer` of every real step."""
    cls: Any = type(runner)
    on_cpu, copies = runner.device.type == "cpu", TokenCopies()

    class SteeredRunner(cls):
        def _model_forward(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
            step = view(self, steerer)
            copies.companion_rows = step.companion_rows
            steerer.begin_step(step, input_ids)  # real steps only: dummy runs call the model itself
            try:
                return super()._model_forward(input_ids, *args, **kwargs)
            finally:
                steerer.end_step()

        def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
            # vLLM 0.32 rewinds the generator of a seeded request whose prefill is still incomplete, and CPU generators
            # cannot be rewound: it kills the engine. Such a row's sample is thrown away, so let it draw from the
            # default generator and leave the request's own untouched.
            held = unfinished_generators(self) if on_cpu else {}
            try:
                return super().sample_tokens(*args, **kwargs)
            finally:
                self.input_batch.generators.update(held)

        def _get_prompt_logprobs_dict(self, *args: Any, **kwargs: Any) -> Any:
            return steerer.pipeline.with_excess(super()._get_prompt_logprobs_dict(*args, **kwargs))

        def _sample(self, *args: Any, **kwargs: Any) -> Any:
            output = super()._sample(*args, **kwargs)
            copies.apply_(output.sampled_token_ids)
            return output

    SteeredRunner.__name__ = cls.__name__
    runner.__class__ = SteeredRunner
    _watch_draws(runner.sampler, steerer.pipeline)


def _watch_draws(sampler: Any, pipeline: LogitsPipeline) -> None:
    cls: Any = type(sampler)

    class WatchedSampler(cls):
        whipstaff_decoded: Any = None  # what is drawn from, where log-probabilities are taken of something else

        def forward(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
            scored = pipeline.scored(logits)
            self.whipstaff_decoded = None if scored is logits else logits
            return super().forward(scored, *args, **kwargs)

        def apply_logits_processors(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
            decoded = logits if self.whipstaff_decoded is None else self.whipstaff_decoded.float()
            return super().apply_logits_processors(decoded, *args, **kwargs)

        def sample(self, logits: Any, *args: Any, **kwargs: Any) -> Any:  # after penalties, before temperature
            drawn = pipeline.before_draw(logits, is_spare=True)  # vLLM's own changes them in place too
            sampled, log_probabilities = super().sample(drawn, *args, **kwargs)
            pipeline.after_draw(drawn, sampled)
            return sampled, log_probabilities

    WatchedSampler.__name__ = cls.__name__
    sampler.__class__ = WatchedSampler


def view(runner: Any, steerer: WorkerStep) -> BatchView:
    """The rows of the persistent batch, in its order."""
    if not steerer.has_plans:
        return NOBODY
    batch = runner.input_batch
    return BatchView(
        plans=[steerer.plan_of(request_id) for request_id in batch.req_ids],
        starts=runner.query_start_loc.np[: batch.num_reqs + 1],
        positions=batch.num_computed_tokens_cpu[: batch.num_reqs],
        requests=batch.req_ids,
        draws=~runner.discard_request_mask.np[: batch.num_reqs],
    ).in_groups(steerer.groups)


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
