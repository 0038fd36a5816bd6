"""Processes that are forked from one that has imported what they need: an import takes longer than most tests.

Engines are forked from one with vLLM in it, and so are command lines that come to one; small programs from one with
torch.
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

FOR_ENGINES: tuple[str, ...] = (
    *("warm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"),
    *("whipstaff.server.engine.worker.cpu_worker", "whipstaff.server.commands.main", "whipstaff.server.app"),
)
FOR_PROGRAMS: tuple[str, ...] = ("warm", "numpy", "torch", "safetensors.torch")


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

    imported = FOR_PROGRAMS
    more: dict[str, str] = {}  # noqa: RUF012

    def start(self) -> None:
        self._environment = dict(os.environ) | self.more
        super().start()

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()

    @staticmethod
    def _Popen(process: Any) -> Any:
        parent = _parent(process.imported, os.environ.get("WHIPSTAFF_TEST_TRITON_CPU"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", parent.connect_to_new_process)
            return popen_forkserver.Popen(process)


class _CommandLine(_Process):
    imported = FOR_ENGINES


class _EngineProcess(_Process):
    """Its own children are forked from it."""

    imported = FOR_ENGINES
    more = {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}  # noqa: RUF012


class _EngineContext(ForkServerContext):
    Process = _EngineProcess


@contextmanager
def warm_processes() -> Iterator[None]:
    """While an engine starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.engine.utils.get_mp_context", _EngineContext)
        yield


class CommandLine:
    """As `subprocess.Popen(start_new_session=True)` for a program of Python's that comes to an engine, but warm. What
    it says goes to a file."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self._process = _CommandLine(target=_session, args=(str(log), _words(command), dict(env)))
        self._process.start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Nothing happens where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, timeout: float) -> int:
        """Raises: TimeoutError."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise TimeoutError
        return self._process.exitcode


def run(
    command: Sequence[str],
    *,
    env: Mapping[str, str] | None = None,
    cwd: str | None = None,
    timeout: float = 120,
    has_vllm: bool = False,
    **_: Any,
) -> "subprocess.CompletedProcess[bytes]":
    """As `subprocess.run(capture_output=True)` for a program of Python's, a file or with -c, but warm. One that must
    have imported nothing, or be isolated from this environment, is to be started cold."""
    said: dict[Connection, bytearray] = {}
    ends = []
    for _stream in ("stdout", "stderr"):
        there, here = Pipe(duplex=False)
        said[there] = bytearray()
        ends.append(here)
    kind = _CommandLine if has_vllm else _Process
    process = kind(target=_program, args=(*ends, _words(command), dict(os.environ if env is None else env), cwd))
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


def _words(command: Sequence[str]) -> list[str]:
    python, *words = command
    assert python == sys.executable
    return [word for word in words if word != "-I"]


def _session(log: str, words: list[str], env: dict[str, str]) -> None:
    """In the process."""
    os.setsid()
    said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(said, number)
    os.close(said)
    _run(words, env)


def _program(out: Connection, err: Connection, words: list[str], env: dict[str, str], cwd: str | None) -> None:
    """In the process."""
    for number, end in enumerate((out, err), 1):
        os.dup2(end.fileno(), number)
        end.close()
    os.chdir(cwd or os.getcwd())
    _run(words, env)


def _run(words: list[str], env: dict[str, str]) -> None:
    """A program, as Python starts it."""
    os.environ.clear()
    os.environ.update(env)
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
            selector.register(there, selectors.EVENT_READ, there)
        while selector.get_map():
            ready = selector.select(deadline - time.monotonic())
            if not ready:
                raise TimeoutError
            for key, _ in ready:
                there = key.data
                if data := os.read(there.fileno(), 1 << 16):
                    said[there] += data
                else:
                    selector.unregister(there)
