"""Explanations on their way out: from the worker that computed them to the request that asked.

Worker: `attach` lets a step's output carry them. Scheduler: `relay` moves each request's part into its own output.
Front end: `launch.Listening` hands it to the request before vLLM turns the output into text.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.searches import DRAFT_KEY

EXPLAIN_KEY = "whipstaff"


class Stops(Protocol):
    """Of one step; see `worker.edits.histories`."""

    def on_host(self) -> frozenset[str]:
        """The requests that end. Waits for the device."""


class Explanations(Protocol):
    """Of one step; see `worker.logits.explain`."""

    def to_json(self) -> dict[str, dict[str, Any]]:
        """By request. Waits for the device."""


def attach(output: Any, explanations: Explanations) -> Any:
    """Let a step's output carry its explanations to the scheduler."""
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


def attach_stops(output: Any, stops: Stops) -> Any:
    """Let a step's output carry to the scheduler who ends."""
    if isinstance(output, AsyncModelRunnerOutput):
        swap(output, _stopping(type(output), stops))
    else:
        output.whipstaff_stops = stops.on_host()
    return output


def _stopping(cls: Any, pending: Stops) -> type:
    """As `_explained`."""

    class Stopping(cls):
        def get_output(self) -> ModelRunnerOutput:
            ready: ModelRunnerOutput = cls.get_output(self)
            ready.whipstaff_stops = pending.on_host()
            return ready

    return Stopping


def relay(explained: Mapping[str, Any], by_client: Mapping[int, Any]) -> None:
    """Move a step's explanations, by request, into the outputs of these, in a field that only KV connectors use."""
    for outputs in by_client.values():
        for one in outputs.outputs:
            told = explained.get(one.request_id, {})
            if told and (one.new_token_ids or one.finish_reason is not None or DRAFT_KEY in told):
                one.kv_transfer_params = {EXPLAIN_KEY: told}
