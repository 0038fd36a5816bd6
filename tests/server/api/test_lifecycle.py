"""How a server ends, around an application and an engine that are stand-ins, over real connections."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from whipstaff.server import metrics
from whipstaff.server.api import lifecycle
from whipstaff.server.api.lifecycle import Gate
from whipstaff.server.engine import EngineDied
from whipstaff.server.engine.frontend.lifecycle import Lifecycle, Server, keep_alive
from whipstaff.server.engine.frontend.openai import _ending_truly

SOON = 20.0  # seconds that nothing here takes


class Engine:
    """Lives, dies, and cuts what runs."""

    def __init__(self) -> None:
        self.errored, self.over = False, asyncio.Event()
        self.num_cut = 0

    async def cut(self) -> int:
        self.num_cut += 1
        self.over.set()
        return 1

    def mourn(self) -> None:
        self.errored = True
        self.over.set()

    async def cause_of_death(self) -> str:
        return "the engine died: of nothing"


class Running:
    """A server whose POST /long streams until the engine lets it, or `finish` is set."""

    def __init__(self, patience: float) -> None:
        self.engine, self.finish = Engine(), asyncio.Event()
        self.life = Lifecycle(self.engine, patience, [signal.SIGUSR2])  # type: ignore[arg-type]
        self.app = FastAPI()
        self.app.state.whipstaff_life = self.life
        self.app.include_router(lifecycle.router)
        self.app.post("/long")(self.long)
        self.app.get("/look")(self.look)
        self.sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.sock.getsockname()[1]}"

    async def long(self) -> StreamingResponse:
        async def body() -> AsyncIterator[str]:
            yield "begun "
            done = [asyncio.create_task(event.wait()) for event in (self.finish, self.engine.over)]
            await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.cancel()
            yield "whole" if self.finish.is_set() else "cut"

        return StreamingResponse(body())

    async def look(self) -> str:
        return "looked"

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[tuple[httpx.AsyncClient, "asyncio.Task[int]"]]:
        import uvicorn

        config = uvicorn.Config(Gate(self.app, self.life), log_level="error", timeout_graceful_shutdown=1)
        server, started = Server(config), asyncio.Event()
        server.on_started = started.set
        async with httpx.AsyncClient(base_url=self.url, timeout=SOON) as http:
            task = asyncio.create_task(self.life.run(server, self.sock))
            await asyncio.wait_for(started.wait(), SOON)
            try:
                yield http, task
            finally:
                self.finish.set()
                self.engine.over.set()
                await asyncio.wait({task}, timeout=SOON)


async def until(what: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(SOON):
        while not await what():
            await asyncio.sleep(0.01)


def told() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)


@asynccontextmanager
async def one_running(patience: float) -> AsyncIterator[tuple[Running, httpx.AsyncClient, Any, Any]]:
    """A server in the middle of an answer: it, a further client, the answer's pieces and what becomes of the server."""
    running = Running(patience)
    async with running.serving() as (http, task), http.stream("POST", "/long") as answer:
        pieces = answer.aiter_text()
        assert await anext(pieces) == "begun "
        async with httpx.AsyncClient(base_url=running.url, timeout=SOON) as other:
            yield running, other, pieces, task


def test_a_server_drains() -> None:
    async def run() -> None:
        async with one_running(patience=SOON) as (running, other, pieces, task):
            assert (await other.get("/ready")).json() == {"ready": True, "reason": None}
            told()
            await until(lambda: is_status(other, "/ready", 503))
            assert (await other.get("/look")).status_code == 200  # whoever only looks may
            refused = await other.post("/long")
            assert refused.status_code == 503 and refused.json()["error"]["type"] == "ServiceUnavailableError"
            assert refused.headers["retry-after"] == "1" and refused.headers["connection"] == "close"
            assert metrics.DRAINING._value.get() == 1 and not task.done()
            running.finish.set()
            assert await anext(pieces) == "whole"
            assert await asyncio.wait_for(task, SOON) == 0 and running.engine.num_cut == 0

    try:
        asyncio.run(run())
    finally:
        metrics.DRAINING.set(0)


async def is_status(http: httpx.AsyncClient, path: str, status: int) -> bool:
    return (await http.get(path)).status_code == status


def test_patience_ends() -> None:
    async def run() -> None:
        async with one_running(patience=0.1) as (running, _, pieces, task):
            told()
            assert await anext(pieces) == "cut"
            assert await asyncio.wait_for(task, SOON) == 0 and running.engine.num_cut == 1

    asyncio.run(run())


def test_a_second_signal_is_not_waited_after() -> None:
    async def run() -> None:
        async with one_running(patience=1e6) as (running, other, pieces, task):
            told()
            await until(lambda: is_status(other, "/ready", 503))
            told()
            assert await anext(pieces) == "cut"
            assert await asyncio.wait_for(task, SOON) == 128 + signal.SIGUSR2 and running.engine.num_cut == 1

    asyncio.run(run())


@pytest.mark.parametrize("is_draining", [False, True])
def test_a_dead_engine_is_the_cause_whatever_was_told_before_or_after(is_draining: bool) -> None:
    async def run() -> None:
        async with one_running(patience=1e6) as (running, other, pieces, task):
            if is_draining:
                told()
                await until(lambda: is_status(other, "/ready", 503))
            running.engine.errored = True
            told()
            assert await anext(pieces) == "cut"
            with pytest.raises(EngineDied, match="of nothing"):
                await asyncio.wait_for(task, SOON)

    asyncio.run(run())


def test_a_parent_can_say_that_the_engine_is_dead() -> None:
    async def run() -> None:
        async with one_running(patience=1e6) as (_, _, pieces, task):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert await anext(pieces) == "cut"
            with pytest.raises(EngineDied, match="of nothing"):
                await asyncio.wait_for(task, SOON)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("said", "passed"),
    [
        (['data: {"id": 1}\n\n', "data: [DONE]\n\n"], 2),
        (['data: {"id": 1}\n\n', 'data: {"error": {}}\n\n', "data: [DONE]\n\n"], 2),
    ],
)
def test_an_answer_that_broke_off_is_not_done(said: list[str], passed: int) -> None:
    async def events() -> AsyncIterator[str]:
        for event in said:
            yield event

    async def run() -> list[str]:
        return [event async for event in _ending_truly(events())]  # type: ignore[arg-type]

    assert asyncio.run(run()) == said[:passed]


def test_an_idle_connection_outlives_what_clients_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that server and client give up after the same time is closed under a request. Operators may say otherwise."""
    name = "VLLM_HTTP_TIMEOUT_KEEP_ALIVE"
    monkeypatch.delenv(name, raising=False)
    longest = httpx.Limits().keepalive_expiry
    assert longest is not None and keep_alive() > max(60, longest)
    monkeypatch.setenv(name, "7")
    assert keep_alive() == 7
