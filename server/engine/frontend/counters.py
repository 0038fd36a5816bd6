"""What the engine has counted, asked for now and then: nobody who wants to know has to wait for a long step."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from whipstaff.server.engine.frontend.launch import Engine

PAUSE = 1.0  # seconds


async def follow_counters(engine: Engine, note: Callable[[Mapping[str, Any]], None]) -> None:
    """Give `note` what the first worker has counted, for as long as the engine lives. One question at a time: a worker
    that hangs is not asked again."""
    while True:
        try:
            found = await engine.collective_rpc("whipstaff_counters")
        except EngineDeadError:
            return
        note(found[0])
        await asyncio.sleep(PAUSE)
