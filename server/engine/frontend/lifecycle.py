"""How one API server ends: told to, it answers what it has taken and then ends; without an engine, it says why.

vLLM's own launcher lets the engine abort what runs while it goes on taking requests, hears one signal, and ends a
server whose engine died with status 0.
"""

import asyncio
import logging
import signal
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import uvicorn
import vllm.envs as envs
from fastapi import FastAPI
from vllm.entrypoints.launchers.launcher import NoSignalServer
from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config
from vllm.entrypoints.launchers.utils.ssl import SSLCertRefresher

from whipstaff.server import metrics
from whipstaff.server.engine import EngineDied
from whipstaff.server.engine.frontend.launch import ENDING, Engine

logger = logging.getLogger("vllm.whipstaff")  # below vLLM's logger, so that its format and level apply
DIED = signal.SIGUSR1  # by which the parent of several API servers says that their engine is dead
DONE = 0  # the exit status of a server that was told to end, and did
_PAUSE = 0.2  # seconds between two looks at whether the engine lives
_FAREWELL = 2.0  # seconds for those to be told whose answers broke off
_SLOW = 5  # seconds for clients to read the rest of what was said to them
_KEEP_ALIVE = 75  # seconds
LONGEST_FAREWELL = 10.0  # seconds from the last answer to the end of the process


class Server(NoSignalServer):
    """Uvicorn's, which says when it takes connections."""

    on_started: Callable[[], None]

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.on_started()


class Lifecycle:
    """Of one API server, in its event loop."""

    def __init__(self, engine: Engine, patience: float, signals: Sequence[signal.Signals]) -> None:
        """
        Args:
            patience: seconds that running answers have once the server was told to end.
            signals: that tell it to; a second one ends it at once.
        """
        self._engine, self._patience, self._signals = engine, patience, signals
        self._num_running, self._idle = 0, asyncio.Event()
        self._idle.set()
        self._told: asyncio.Queue[signal.Signals] = asyncio.Queue()
        self._death: str | None = None
        self.is_draining = False

    @property
    def reason(self) -> str | None:
        """Why nothing new is taken, in a sentence; None while it is."""
        if self._engine.errored:
            return self._death or "the engine died"
        return ENDING if self.is_draining else None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """While a request is answered that was taken."""
        self._num_running += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._num_running -= 1
            if not self._num_running:
                self._idle.set()

    async def run(self, server: uvicorn.Server, sock: Any) -> int:
        """Serve until the end; the exit status. Raises: EngineDied."""
        loop = asyncio.get_running_loop()
        for number in self._signals:
            loop.add_signal_handler(number, self._told.put_nowait, number)
        loop.add_signal_handler(DIED, self._engine.mourn)
        serving = asyncio.create_task(server.serve([sock]))
        dying, told = asyncio.create_task(self._dying()), asyncio.create_task(self._told.get())
        try:
            await asyncio.wait({serving, dying, told}, return_when=asyncio.FIRST_COMPLETED)
            status = DONE
            if not self._engine.errored and not serving.done():
                status = await self._drain(dying)
            if self._engine.errored:
                await self._mourn()
            server.should_exit, server.force_exit = True, status != DONE
            await serving
        finally:
            dying.cancel()
            told.cancel()
        if self._death is not None:
            raise EngineDied(self._death)
        return status

    async def _dying(self) -> None:
        while not self._engine.errored:
            await asyncio.sleep(_PAUSE)

    async def _drain(self, dying: "asyncio.Task[None]") -> int:
        """Answer what was taken, as long as there is patience and no second signal; the exit status."""
        self.is_draining = True
        metrics.DRAINING.set(1)
        logger.warning("%s: %d running requests have %g s", ENDING, self._num_running, self._patience)
        again, idle = asyncio.create_task(self._told.get()), asyncio.create_task(self._idle.wait())
        await asyncio.wait({again, idle, dying}, timeout=self._patience, return_when=asyncio.FIRST_COMPLETED)
        if not idle.done() and not self._engine.errored:
            logger.warning("%s: %d answers are cut", ENDING, await self._engine.cut())
            await asyncio.wait({idle, dying}, timeout=_FAREWELL, return_when=asyncio.FIRST_COMPLETED)
        idle.cancel()
        if again.done():
            return 128 + again.result()
        again.cancel()
        return DONE

    async def _mourn(self) -> None:
        """Tell those who wait for an answer why there will be none."""
        self._death = await self._engine.cause_of_death()
        logger.error("%s", self._death)
        self._engine.mourn()
        try:
            await asyncio.wait_for(self._idle.wait(), _FAREWELL)
        except TimeoutError:
            logger.error("%d clients could not be told", self._num_running)


def keep_alive() -> int:
    """Seconds that a connection may lie idle: more than clients keep theirs (httpx, and so OpenAI's, 5 s, which is what
    vLLM waits, too; load balancers 60 s), since a request meets a closed door where the server closes first."""
    return envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE if envs.is_set("VLLM_HTTP_TIMEOUT_KEEP_ALIVE") else _KEEP_ALIVE


async def serve(
    app: FastAPI,
    args: Namespace,
    sock: Any,
    life: Lifecycle,
    on_started: Callable[[], None],
    peer_loads: tuple[Any, int] | None = None,
    protocol: type[asyncio.Protocol] | str = "auto",
) -> int:
    """Serve until told to stop; the exit status.

    Args:
        on_started: called when connections are taken.
        peer_loads: the loads of all API servers that share the socket, and which of them is this one's.
        protocol: HTTP, as uvicorn takes it.

    Raises: EngineDied.
    """
    for route in app.routes:
        logger.debug("route: %s %s", getattr(route, "path", route), ", ".join(getattr(route, "methods", None) or ()))
    log_config = get_uvicorn_log_config(args)
    config = uvicorn.Config(
        app,
        http=protocol,
        host=args.host,
        port=args.port,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=keep_alive(),
        timeout_graceful_shutdown=_SLOW,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        ssl_ciphers=args.ssl_ciphers,
        **({} if log_config is None else {"log_config": log_config}),
    )
    config.load()
    server = Server(config, peer_loads=peer_loads)
    server.on_started = on_started
    app.state.server = server  # which vLLM's error handlers end when the engine is dead
    refresher = (
        SSLCertRefresher(config.ssl, args.ssl_keyfile, args.ssl_certfile, args.ssl_ca_certs)
        if args.enable_ssl_refresh
        else None
    )
    try:
        return await life.run(server, sock)
    finally:
        if refresher is not None:
            refresher.stop()
