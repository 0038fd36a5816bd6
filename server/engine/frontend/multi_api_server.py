"""Several API servers around one engine, each a process of its own, as `vllm serve --api-server-count N` has them.

The engine is launched once, by the parent. The first API server tests and calibrates it; the others wait for that, and
learn from the workers what it found. The parent passes on that it was told to end, and that the engine died.
"""

import asyncio
import logging
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import uvloop
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.launcher import setup_server
from vllm.logger import configure_logging
from vllm.usage.usage_lib import UsageContext
from vllm.utils.system_utils import decorate_logs, set_process_title
from vllm.v1.engine.utils import bind_engine_zmq_listeners, launch_core_engines
from vllm.v1.executor import Executor
from vllm.v1.metrics.prometheus import setup_multiprocess_prometheus
from vllm.v1.utils import APIServerProcessManager, wait_for_completion_or_failure

from whipstaff.server.engine import ENGINE_DIED, EngineDied, UnsupportedEngine, causes
from whipstaff.server.engine.frontend.launch import Engine
from whipstaff.server.engine.frontend.lifecycle import DIED, LONGEST_FAREWELL
from whipstaff.steering.method import HookPoint

logger = logging.getLogger("vllm.whipstaff")  # below vLLM's logger, so that its format and level apply
Serve = Callable[[Any, Namespace, dict[str, Any]], int]
# What an API server listens to: a terminal sends its Ctrl-C to all, and the parent passes it on.
SIGNALS = (signal.SIGTERM,)
_PAUSE = 0.2  # seconds between two looks


class _Told:
    """Hears signals: the first ends the wait, each further one goes to the API servers."""

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.servers: Sequence[Any] = ()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._hear)
        signal.signal(signal.SIGHUP, lambda number, frame: _send(self.servers, signal.SIGHUP))

    @property
    def status(self) -> int:
        """To exit with."""
        return 128 + self.numbers[-1] if len(self.numbers) > 1 else 0

    def _hear(self, number: int, frame: Any) -> None:
        self.numbers.append(number)
        if len(self.numbers) == 1:
            raise SystemExit(0)
        _send(self.servers, signal.SIGTERM)


def _send(servers: Sequence[Any], number: signal.Signals) -> None:
    for server in servers:
        if server.is_alive():
            with suppress(ProcessLookupError):
                os.kill(server.pid, number)


def run(args: Namespace, configure: Callable[[VllmConfig], object], serve: Serve, patience: float) -> int:
    """Launch the engine and its API servers, and wait until they were told to stop; the exit status.

    Args:
        configure: makes the engine's configuration ours.
        serve: what each API server runs: with the socket, the flags, and where the engine is; its exit status. A
            function of a module.
        patience: seconds that running answers have once the server was told to end.

    Raises:
        EngineDied: when the engine does.
        UnsupportedEngine: when an API server finds that it was started with something wrong.
        RuntimeError: when an API server ends otherwise.
    """
    count = args.api_server_count
    setup_multiprocess_prometheus()
    told = _Told()
    address, sock = setup_server(args, reuse_port=True)
    engine_args = AsyncEngineArgs.from_cli_args(args)
    engine_args._api_process_count, engine_args._api_process_rank = count, -1
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    configure(config)
    listeners = bind_engine_zmq_listeners(config, count)
    log_stats = not engine_args.disable_log_stats
    with launch_core_engines(config, Executor.get_class(config), log_stats, listeners.addresses) as launched:
        servers = APIServerProcessManager(
            address,
            sock,
            args,
            count,
            listeners.inputs,
            listeners.outputs,
            target_server_fn=partial(_child, serve),
            tensor_queue=launched.tensor_queue,
        )
        launched.watched_frontend_processes = told.servers = servers.processes
    try:
        wait_for_completion_or_failure(servers, launched.engine_manager)
    except RuntimeError as error:
        _bury(launched.engine_manager, servers.processes, error)
    except SystemExit:
        pass
    finally:
        servers.shutdown(timeout=patience + LONGEST_FAREWELL)
        launched.engine_manager.shutdown(timeout=config.shutdown_timeout)
    return told.status


def _bury(engine: Any, servers: Sequence[Any], error: RuntimeError) -> NoReturn:
    """Raises: EngineDied, once the API servers know and have told their clients; where it is one of them that ended,
    UnsupportedEngine or RuntimeError with what it said, or `error` where it could say nothing."""
    statuses = {server.exitcode for server in servers}
    if engine.failed_proc_name is None and ENGINE_DIED not in statuses:
        if causes.WRONG_CALL in statuses:
            raise UnsupportedEngine(causes.told() or str(error))
        raise RuntimeError(causes.told() or str(error)) if causes.CANNOT_RUN in statuses else error
    ended = (causes.ending(name, status) for name, status in engine.finished_procs().items() if status)
    cause = causes.told() or next(ended, str(error))
    causes.note(cause)  # the engine is nobody's child but this process's
    _send(servers, DIED)
    for server in servers:
        server.join(LONGEST_FAREWELL)
    raise EngineDied(f"the engine died: {cause}") from None


def _child(serve: Serve, address: str, sock: Any, args: Namespace, client: dict[str, Any]) -> None:
    if getattr(args, "logging_config", None):
        configure_logging(args.logging_config)
    set_process_title("APIServer", str(client["client_index"]))
    decorate_logs()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(serve(sock, args, client))


def run_one(serving: Coroutine[Any, Any, int]) -> int:
    """Run one API server; its exit status. Where it cannot, the parent is told why."""
    try:
        return uvloop.run(serving)
    except EngineDied:
        return ENGINE_DIED  # the parent knows why
    except (RuntimeError, ValueError, OSError) as error:
        causes.note(causes.of(error))
        logger.error("this API server cannot run", exc_info=error)
        return causes.status_of(error)
    except KeyboardInterrupt as error:
        sys.exit(f"whipstaff: {error}")


async def note_proven(engine: Engine, lengths: Mapping[HookPoint, float]) -> None:
    """Tell the other API servers that the engine obeys, and how long its activations are."""
    await engine.collective_rpc(
        "whipstaff_note_proven", args=([[*point, length] for point, length in lengths.items()],)
    )


async def proven(engine: Engine) -> dict[HookPoint, float]:
    """Wait until another API server has said so."""
    while (found := (await engine.collective_rpc("whipstaff_proven"))[0]) is None:
        await asyncio.sleep(_PAUSE)
    return {HookPoint(site, layer): length for site, layer, length in found}
