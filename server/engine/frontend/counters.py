"""What the engine has counted, asked for now and then: nobody who wants to know has to wait for a long step."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.engine.exceptions import EngineDeadError

from whipstaff.server.engine.frontend.launch import COUNTERS, Engine

PAUSE = 1.0  # seconds
PAUSE_UNSEEN = 5.0  # where other API servers ask the engine for things, too


async def follow_counters(engine: Engine, note: Callable[[Mapping[str, Any]], None], is_alone: bool = True) -> None:
    """Give `note` what the first worker has counted, for as long as the engine lives. One question at a time: a worker
    that hangs is not asked again.

    An engine that was asked for nothing since is left alone, after one question more: the first may come before the
    step in which the worker learns what ended. A worker looks for what comes next without a rest for a second after
    each question, so that an idle server that is asked every second would take a core.

    Args:
        is_alone: whether everything that the engine is asked for passes through `engine`.
    """
    known, was_busy = -1, False
    while True:
        asked = engine.num_asked
        is_busy = asked != known or engine.num_generating > 0
        if is_busy or was_busy or not is_alone:
            known, was_busy = asked, is_busy
            try:
                found = await engine.collective_rpc(COUNTERS)
            except EngineDeadError:
                return
            note(found[0])
        await asyncio.sleep(PAUSE if is_alone else PAUSE_UNSEEN)
