"""What the engine counts is asked for where something may have changed, and an idle engine is left alone."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from whipstaff.server.engine.frontend import counters


def followed(monkeypatch: pytest.MonkeyPatch, events: list[tuple[int, int]], is_alone: bool = True) -> int:
    """How often an engine is asked that has (asked, generating) of `events`, one look after the other."""
    engine = SimpleNamespace(num_asked=0, num_generating=0)
    noted: list[Any] = []

    async def collective_rpc(method: str) -> list[Any]:
        assert method == "whipstaff_counters"
        return [{"steps": len(noted)}]

    async def sleep(seconds: float) -> None:
        if not events:
            raise asyncio.CancelledError
        engine.num_asked, engine.num_generating = events.pop(0)

    engine.collective_rpc = collective_rpc
    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(counters.follow_counters(engine, noted.append, is_alone))  # type: ignore[arg-type]
    return len(noted)


def test_an_idle_engine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(monkeypatch, [(0, 0)] * 9) == 2


def test_whatever_happens_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(monkeypatch, [(1, 1), (1, 1), (2, 0), (2, 0), (2, 0), (3, 0)]) == 6


def test_what_the_worker_learns_a_step_after_the_end_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(monkeypatch, [(1, 1), (2, 0)]) == 3
    assert followed(monkeypatch, [(1, 1), (2, 0), (2, 0)]) == 4
    assert followed(monkeypatch, [(1, 1), (2, 0), (2, 0), (2, 0), (2, 0)]) == 4


def test_what_others_ask_for_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert followed(monkeypatch, [(0, 0)] * 4, is_alone=False) == 5
