"""Model Runner V2 (vllm/v1/worker/gpu/model_runner.py; what CUDA runs by default) -> BatchView."""

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
    copies = TokenCopies()

    class SteeredRunner(cls):
        def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            input_batch = super().prepare_inputs(*args, **kwargs)  # real batches only; dummy ones are made elsewhere
            step = view(input_batch, steerer)
            copies.companion_rows = step.companion_rows
            steerer.begin_step(step, input_batch.input_ids)
            return input_batch

        def execute_model(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().execute_model(*args, **kwargs)
            finally:
                steerer.end_step()

        def sample(self, *args: Any, **kwargs: Any) -> Any:
            output, *counts = super().sample(*args, **kwargs)
            copies.apply_(output.sampled_token_ids)
            return output, *counts

    SteeredRunner.__name__ = cls.__name__
    runner.__class__ = SteeredRunner
    _watch_draws(runner.sampler, steerer.pipeline)
    _watch_prompts(runner.prompt_logprobs_worker, steerer.pipeline)


def _watch_prompts(scorer: Any, pipeline: LogitsPipeline) -> None:
    cls: Any = type(scorer)

    class WatchedScorer(cls):
        def compute_prompt_logprobs(self, *args: Any, **kwargs: Any) -> Any:
            return pipeline.with_excess(super().compute_prompt_logprobs(*args, **kwargs))

    WatchedScorer.__name__ = cls.__name__
    scorer.__class__ = WatchedScorer


def _watch_draws(sampler: Any, pipeline: LogitsPipeline) -> None:
    cls: Any = type(sampler)

    class WatchedSampler(cls):
        whipstaff_decoded: Any = None  # what is drawn from, where log-probabilities are taken of something else

        def __call__(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
            scored = pipeline.scored(logits)
            self.whipstaff_decoded = None if scored is logits else logits
            return super().__call__(scored, *args, **kwargs)

        def sample(self, logits: Any, *args: Any, **kwargs: Any) -> Any:
            decoded = logits if self.whipstaff_decoded is None else self.whipstaff_decoded
            return super().sample(decoded, *args, **kwargs)

        def _sample_random(self, logits: Any, *args: Any, **kwargs: Any) -> Any:  # after penalties and temperature
            drawn = pipeline.before_draw(logits)
            sampled, processed = super()._sample_random(drawn, *args, **kwargs)
            pipeline.after_draw(drawn, sampled)
            return sampled, processed

    WatchedSampler.__name__ = cls.__name__
    sampler.__class__ = WatchedSampler


def view(input_batch: Any, steerer: WorkerStep) -> BatchView:
    """The rows of the step's input batch, in its order."""
    if not steerer.has_plans:
        return NOBODY
    num, starts = input_batch.num_reqs, input_batch.query_start_loc_np[: input_batch.num_reqs + 1]
    positions = input_batch.num_computed_tokens_np[:num]
    return BatchView(
        plans=[steerer.plan_of(request_id) for request_id in input_batch.req_ids],
        starts=starts,
        positions=positions,
        requests=input_batch.req_ids,
        draws=positions + np.diff(starts) >= input_batch.prefill_len_np[:num],
    ).in_groups(steerer.groups)


def block_tables(runner: Any) -> list[tuple[Tensor, int]]:
    """Of every group of KV caches, the (rows, blocks) block table in the step's order, and the tokens of a block."""
    return list(zip(runner.block_tables.input_block_tables, runner.block_tables.block_sizes, strict=True))
