"""Activations that this server itself wants to know, read beside what its clients ask for."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple
from uuid import uuid4

from vllm import SamplingParams

from whipstaff.server.engine.frontend.launch import ENDING, Engine, PlanDict
from whipstaff.server.plan import PLAN_KEY, PositionedPlan, RequestPlan
from whipstaff.steering.plan import PlannedCapture, SteeringPlan

_LAST = 1 << 20  # priority of what may wait for all others, under --scheduling-policy priority
Told = dict[str, list[dict[str, Any]]]  # by sequence, as `worker.whipstaff_captures` says it


class Read(NamedTuple):
    """One text that was read."""

    name: str  # as the engine calls its sequence
    placed: PositionedPlan


async def read_activations(
    engine: Engine, texts: Sequence[Sequence[int]], captures: Sequence[Sequence[PlannedCapture]]
) -> tuple[list[Read], list[Told]]:
    """Have the model read some texts together, and take what was captured of each: (what was read, what each rank
    tells). However that ends, the workers hold nothing of it then.

    Raises: asyncio.CancelledError, RuntimeError where the server ends, EngineDeadError.
    """
    captures_id = f"fit-{uuid4()}"
    plans = [
        RequestPlan(SteeringPlan((), captures=tuple(each)), captures_id=captures_id, max_fed=len(ids))
        for ids, each in zip(texts, captures, strict=True)
    ]
    running = [_read(engine, ids, plan) for ids, plan in zip(texts, plans, strict=True)]
    try:
        ended = await asyncio.gather(*running, return_exceptions=True)
    finally:
        told = await asyncio.shield(_take(engine, captures_id))
    reads = []
    for name, ids, plan in zip(ended, texts, plans, strict=True):
        if isinstance(name, BaseException):
            raise name
        reads.append(Read(name, PositionedPlan(plan, len(ids))))
    return reads, told


async def _take(engine: Engine, captures_id: str) -> list[Told]:
    """What nobody takes is held until others need the room."""
    if engine.errored:
        return []
    told: list[Told] = await engine.collective_rpc("whipstaff_captures", args=(captures_id,))
    return told


async def _read(engine: Engine, ids: Sequence[int], plan: RequestPlan) -> str:
    """The engine's name of the sequence. Raises: RuntimeError where it was cut."""
    names: dict[int, str] = {}
    extra = {PLAN_KEY: PlanDict(replace(plan, label="fit").to_wire(), named=names.__setitem__)}
    params = SamplingParams(temperature=0, max_tokens=1, detokenize=False, extra_args=extra)
    if engine.is_cut:
        raise RuntimeError(ENDING)
    prompt = {"prompt_token_ids": list(ids)}
    priority = _LAST if engine.vllm_config.scheduler_config.policy == "priority" else 0
    async for output in engine.unwatched(prompt, params, f"fit-{uuid4()}", priority=priority):
        if any(one.finish_reason == "abort" for one in output.outputs):
            raise RuntimeError(ENDING)
    return names[0]
