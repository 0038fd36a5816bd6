"""Explanations on their way out: from the worker that computed them to the request that asked.

Worker: `attach` lets a step's output carry them. Scheduler: `relay` moves each request's part into its own output.
Front end: `listen` hands it to the request before vLLM turns the output into text.
"""

from collections.abc import Mapping, MutableMapping
from typing import Any, Protocol
from weakref import WeakValueDictionary

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from whipstaff.server import plan as plans
from whipstaff.server.engine.patch import Swapped, swap

EXPLAIN_KEY = "whipstaff"


class Explanations(Protocol):
    """Of one step; see `worker.logits.explain`."""

    def to_json(self) -> dict[str, dict[str, Any]]:
        """By request. Waits for the device."""


def attach(output: Any, explanations: Explanations | None) -> Any:
    """Let a step's output carry its explanations to the scheduler."""
    if explanations is None or output is None:
        return output
    if isinstance(output, AsyncModelRunnerOutput):
        swap(output, _explained(type(output), explanations))
    else:
        output.whipstaff_explanations = explanations.to_json()
    return output


def _explained(cls: Any, pending: Explanations) -> type:
    """The class that is laid over that of an output which is still on its way from the device. It derives from it: an
    abstract base is among its bases, beside which another one would change the layout of instances."""

    class Explained(cls):
        def get_output(self) -> ModelRunnerOutput:
            ready: ModelRunnerOutput = cls.get_output(self)
            ready.whipstaff_explanations = pending.to_json()
            return ready

    return Explained


def relay(output: ModelRunnerOutput, by_client: Mapping[int, Any]) -> None:
    """Move explanations from a step's output into those of its requests, in a field that only KV connectors use."""
    explained: Mapping[str, Any] = getattr(output, "whipstaff_explanations", {})
    for outputs in by_client.values() if explained else ():
        for one in outputs.outputs:
            if (one.new_token_ids or one.finish_reason is not None) and one.request_id in explained:
                one.kv_transfer_params = {EXPLAIN_KEY: explained[one.request_id]}


def listen(processor: Any) -> None:
    """Make vLLM's output processor hand explanations to the requests that they are of."""
    swap(processor, Listening, whipstaff_plans=WeakValueDictionary())


class Listening(Swapped):
    """Laid over vLLM's output processor."""

    whipstaff_plans: MutableMapping[str, Any]  # by request, while somebody holds the plan

    def add_request(
        self, request: Any, prompt: Any, parent_req: Any = None, request_index: int = 0, *args: Any, **kwargs: Any
    ) -> None:
        extra = request.sampling_params.extra_args if request.sampling_params else None
        plan: Any = (extra or {}).get(plans.PLAN_KEY)
        if getattr(plan, "explained", None) is not None:
            self.whipstaff_plans[request.request_id] = plan
            plan.indices[request.request_id] = request_index
        super().add_request(request, prompt, parent_req, request_index, *args, **kwargs)

    def process_outputs(self, engine_core_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in engine_core_outputs if self.whipstaff_plans else ():
            if output.kv_transfer_params and (told := output.kv_transfer_params.pop(EXPLAIN_KEY, None)) is not None:
                output.kv_transfer_params = None
                if (plan := self.whipstaff_plans.get(output.request_id)) is not None:
                    plan.explained(plan.indices[output.request_id], told)
        return super().process_outputs(engine_core_outputs, *args, **kwargs)
