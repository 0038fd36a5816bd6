"""Several API servers around one engine, each a process of its own, as `vllm serve --api-server-count N` has them.

The engine is launched once, by the parent. The first API server tests and calibrates it; the others wait for that, and
learn from the workers what it found.
"""

import asyncio
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from typing import Any

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

from whipstaff.server.engine.frontend.launch import Engine
from whipstaff.steering.method import HookPoint

Serve = Callable[[Any, Namespace, dict[str, Any]], None]
_PAUSE = 0.2  # seconds between two looks


def run(args: Namespace, configure: Callable[[VllmConfig], object], serve: Serve) -> None:
    """Launch the engine and its API servers, and wait until they were told to stop.

    Args:
        configure: makes the engine's configuration ours.
        serve: what each API server runs: with the socket, the flags, and where the engine is. A function of a module.

    Raises:
        RuntimeError: when any of the processes dies.
    """
    count = args.api_server_count
    setup_multiprocess_prometheus()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _stop)
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
        launched.watched_frontend_processes = servers.processes
    try:
        wait_for_completion_or_failure(servers, launched.engine_manager)
    finally:
        servers.shutdown(timeout=config.shutdown_timeout)
        launched.engine_manager.shutdown(timeout=config.shutdown_timeout)


def _stop(number: int, frame: Any) -> None:
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    raise SystemExit(0)


def _child(serve: Serve, address: str, sock: Any, args: Namespace, client: dict[str, Any]) -> None:
    if getattr(args, "logging_config", None):
        configure_logging(args.logging_config)
    set_process_title("APIServer", str(client["client_index"]))
    decorate_logs()
    serve(sock, args, client)


def run_one(serving: Coroutine[Any, Any, None]) -> None:
    """Run one API server; its process ends with the reason where it cannot."""
    try:
        uvloop.run(serving)
    except (RuntimeError, KeyboardInterrupt) as error:
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
