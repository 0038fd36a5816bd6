"""Explanations on their way out: from the worker that computed them to the request that asked.

Worker: `attach` lets a step's output carry them. Scheduler: `relay` moves each request's part into its own output.
Front end: `launch.Listening` hands it to the request before vLLM turns the output into text.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from whipstaff.server.engine.patch import carry
from whipstaff.server.engine.searches import SEARCH_KEY

EXPLAIN_KEY = "whipstaff"
READINGS = "readings"  # of what is said of a token: what probes read of the one before it


class Explanations(Protocol):
    """Of one step; see `worker.logits.explain` and `worker.edits.histories`."""

    def to_json(self) -> dict[str, dict[str, Any]]:
        """By request. Waits for the device."""


def attach(output: Any, told: Sequence[Explanations]) -> Any:
    """Let a step's output carry what is said of its tokens to the scheduler."""
    return carry(output, "whipstaff_explanations", partial(_together, told))


def _together(told: Sequence[Explanations]) -> dict[str, dict[str, Any]]:
    """By request."""
    found: dict[str, dict[str, Any]] = {}
    for some in told:
        for name, said in some.to_json().items():
            found[name] = found.get(name, {}) | said
    return found


def relay(explained: Mapping[str, Any], by_client: Mapping[int, Any]) -> None:
    """Move a step's explanations, by request, into the outputs of these, in a field that only KV connectors use."""
    for outputs in by_client.values():
        for one in outputs.outputs:
            told = explained.get(one.request_id, {})
            if told and (one.new_token_ids or one.finish_reason is not None or SEARCH_KEY in told):
                one.kv_transfer_params = {EXPLAIN_KEY: told}
