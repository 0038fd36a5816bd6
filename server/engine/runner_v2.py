"""Model Runner V2 (vllm/v1/worker/gpu/model_runner.py; what CUDA runs by default) -> BatchView."""

from typing import Any

from whipstaff.server.engine.batch import BatchView
from whipstaff.server.engine.steerer import NOBODY, Steerer


def attach(runner: Any, steerer: Steerer) -> None:
    """Make `runner` tell `steerer` of every real step."""
    cls: Any = type(runner)

    class SteeredRunner(cls):
        def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
            input_batch = super().prepare_inputs(*args, **kwargs)  # real batches only; dummy ones are made elsewhere
            steerer.begin_step(view(input_batch, steerer), input_batch.input_ids)
            return input_batch

        def execute_model(self, *args: Any, **kwargs: Any) -> Any:
            try:
                return super().execute_model(*args, **kwargs)
            finally:
                steerer.end_step()

    SteeredRunner.__name__ = cls.__name__
    runner.__class__ = SteeredRunner


def view(input_batch: Any, steerer: Steerer) -> BatchView:
    """The rows of the step's input batch, in its order."""
    if not steerer.has_plans:
        return NOBODY
    return BatchView(
        plans=[steerer.plan_of(request_id) for request_id in input_batch.req_ids],
        starts=input_batch.query_start_loc_np[: input_batch.num_reqs + 1],
        positions=input_batch.num_computed_tokens_np[: input_batch.num_reqs],
        requests=input_batch.req_ids,
    )
