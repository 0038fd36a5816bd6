"""Processes for engines that are forked from one that has imported vLLM: an import takes longer than most tests.

The servers of the HTTP tests start as a user's do, with nothing imported.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver, popen_forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from typing import Any

import pytest

IMPORTED = ["vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "whipstaff.server.engine.worker.cpu_worker"]
_PARENTS: dict[str | None, forkserver.ForkServer] = {}  # by what V2's stand-in for a GPU is told, on import


def _parent() -> forkserver.ForkServer:
    """The process to fork from: one for each way to import vLLM."""
    key = os.environ.get("WHIPSTAFF_TEST_TRITON_CPU")
    if key not in _PARENTS:
        _PARENTS[key] = forkserver.ForkServer()
        _PARENTS[key].set_forkserver_preload(IMPORTED)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OMP_NUM_THREADS", "1")  # read on import; what vLLM sets for each worker comes too late
            _PARENTS[key].ensure_running()
    return _PARENTS[key]


class _Process(ForkServerProcess):
    """Runs in the environment of whoever starts it, as a spawned process does. Its own children are forked from it."""

    def start(self) -> None:
        self._environment = dict(os.environ) | {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()

    @staticmethod
    def _Popen(process: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", _parent().connect_to_new_process)
            return popen_forkserver.Popen(process)


class _Context(ForkServerContext):
    Process = _Process


@contextmanager
def warm_processes() -> Iterator[None]:
    """While an engine starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.engine.utils.get_mp_context", _Context)
        yield
