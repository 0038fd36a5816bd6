"""How much of their prompts plain, steered and guided requests find in the prefix cache, each for themselves.

A request counts once, when it is first scheduled, as in vLLM's own counters; those of a group count one by one.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from vllm.v1.request import Request

from whipstaff.server.engine.step_notes import CacheUse
from whipstaff.server.plan import PLAN_KEY

PLAIN, STEERED, GUIDED = "plain", "steered", "guided"


class CacheHits:
    """Of one scheduler."""

    def __init__(self) -> None:
        self._queries = dict.fromkeys((PLAIN, STEERED, GUIDED), 0)
        self._hits = dict(self._queries)
        self.use = CacheUse(self._queries, self._hits)

    def note(self, new: Iterable[Any], requests: Mapping[str, Request], in_groups: Collection[str]) -> None:
        """Requests that a step takes for the first time, as vLLM tells the worker of them."""
        for told in new:
            request = requests[told.req_id]
            if request.num_preemptions or request.num_prompt_tokens == 1:
                continue  # comes again, or has nothing that could be there
            traffic = GUIDED if told.req_id in in_groups else _traffic(request)
            self._queries[traffic] += request.num_prompt_tokens
            self._hits[traffic] += told.num_computed_tokens


def _traffic(request: Request) -> str:
    extra = request.sampling_params.extra_args if request.sampling_params else None
    plan = (extra or {}).get(PLAN_KEY)
    return STEERED if plan and plan["steering"] else PLAIN
