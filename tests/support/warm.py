"""Processes that are forked from one that has imported what they need: an import takes longer than most tests.

Engines are forked from one with vLLM in it, small programs from one with torch. The servers of the HTTP tests start as
a user's do, with nothing imported.
"""

import os
import runpy
import selectors
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import Pipe, forkserver, popen_forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

FOR_ENGINES = ("vllm.v1.engine.core", "vllm.v1.worker.cpu_worker", "whipstaff.server.engine.worker.worker")
FOR_PROGRAMS = ("warm", "numpy", "torch", "safetensors.torch")


@cache
def _parent(imported: tuple[str, ...], told: str | None = None) -> forkserver.ForkServer:
    """The process to fork from: one for each way to import vLLM, which is `told` what V2's stand-in for a GPU is."""
    parent = forkserver.ForkServer()
    parent.set_forkserver_preload(list(imported))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # read on import; what vLLM sets for each worker comes too late
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)  # of this file
        parent.ensure_running()
    return parent


class _Process(ForkServerProcess):
    """Runs in the environment of whoever starts it, as a spawned process does."""

    more: Mapping[str, str] = {}

    def start(self) -> None:
        self._environment = dict(os.environ) | self.more
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()

    @staticmethod
    def parent() -> forkserver.ForkServer:
        return _parent(FOR_PROGRAMS)

    @classmethod
    def _Popen(cls, process: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", cls.parent().connect_to_new_process)
            return popen_forkserver.Popen(process)


class _EngineProcess(_Process):
    """Its own children are forked from it."""

    more = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}  # noqa: RUF012

    @staticmethod
    def parent() -> forkserver.ForkServer:
        return _parent(FOR_ENGINES, os.environ.get("WHIPSTAFF_TEST_TRITON_CPU"))


class _EngineContext(ForkServerContext):
    Process = _EngineProcess


@contextmanager
def warm_processes() -> Iterator[None]:
    """While an engine starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.engine.utils.get_mp_context", _EngineContext)
        yield


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    timeout: float = 120,
    **_: Any,
) -> "subprocess.CompletedProcess[bytes]":
    """As `subprocess.run(capture_output=True)` for a program of Python's, a file or with -c, but warm. One that must
    have imported nothing, or be isolated from this environment, is to be started cold."""
    python, *words = command
    assert python == sys.executable
    words = [word for word in words if word != "-I"]
    said: dict[Connection, bytearray] = {}
    ends = []
    for _stream in ("stdout", "stderr"):
        there, here = Pipe(duplex=False)
        said[there] = bytearray()
        ends.append(here)
    process = _Process(target=_program, args=(*ends, words, None if env is None else dict(env), cwd))
    process.start()
    for end in ends:
        end.close()
    try:
        _listen(said, time.monotonic() + timeout)
    except TimeoutError as error:
        process.kill()
        raise subprocess.TimeoutExpired(list(command), timeout) from error
    finally:
        process.join()
        for there in said:
            there.close()
    return subprocess.CompletedProcess(list(command), process.exitcode or 0, *map(bytes, said.values()))


def _program(out: Connection, err: Connection, words: list[str], env: dict[str, str] | None, cwd: str | None) -> None:
    """In the process: a program, as Python starts it."""
    for number, end in enumerate((out, err), 1):
        os.dup2(end.fileno(), number)
        end.close()
    if env is not None:
        os.environ.clear()
        os.environ.update(env)
    os.chdir(cwd or os.getcwd())
    if words[0] == "-c":
        sys.argv = ["-c", *words[2:]]
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _listen(said: dict[Connection, bytearray], deadline: float) -> None:
    """Until both streams end. Raises: TimeoutError."""
    with selectors.DefaultSelector() as selector:
        for there in said:
            selector.register(there, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                there = key.fileobj
                assert isinstance(there, Connection)
                if data := os.read(there.fileno(), 1 << 16):
                    said[there] += data
                else:
                    selector.unregister(there)
