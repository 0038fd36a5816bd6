"""Why an engine did not start, or died: the process in which it failed tells those that it served, which say so last.

vLLM's own error refers to what was logged above; here that is a file, named by an environment variable, into which the
first exception that an engine's process logs goes as one sentence, or which worker it lost.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import SIG_IGN, SIGINT, signal
from threading import current_thread, main_thread

from whipstaff.server.errors import WrongSetup

CANNOT_RUN, WRONG_CALL = 1, 2  # exit statuses
_KEY = "WHIPSTAFF_CAUSE_FILE"
_REFERS = "root cause"  # what vLLM says where the cause is in the log
_LOST_WORKER = "Worker proc %s died unexpectedly"  # how vLLM begins to say that one is gone
_PLAIN = (ValueError, RuntimeError, OSError)  # their messages are sentences; others need their class beside them
MAX_CHARACTERS = 500


@contextmanager
def asked() -> Iterator[None]:
    """Processes that start in here `tell`."""
    with tempfile.NamedTemporaryFile(prefix="whipstaff-cause-") as file:
        os.environ[_KEY] = file.name
        try:
            yield
        finally:
            del os.environ[_KEY]


def is_asked() -> bool:
    """Whether somebody in this process has asked."""
    return _KEY in os.environ


def told() -> str:
    """What a process of the engine has told first; "" where none has, or where nobody asked."""
    path = os.environ.get(_KEY)
    return Path(path).read_text(errors="replace") if path else ""


def note(said: str) -> None:
    """Where a process that serves knows what none of the engine's could tell, for the others that serve."""
    if (path := os.environ.get(_KEY)) and not told():
        Path(path).write_text(said)


def forget() -> None:
    """The engine has started: what its processes stumbled on until now did not end it."""
    if path := os.environ.get(_KEY):
        os.truncate(path, 0)


def status_of(error: Exception) -> int:
    """To exit with: WRONG_CALL where whoever started the server is to change something, CANNOT_RUN for all else."""
    return CANNOT_RUN if isinstance(error, RuntimeError) and not isinstance(error, WrongSetup) else WRONG_CALL


def of(error: BaseException) -> str:
    """What an error comes from, in one line."""
    return (told() if _REFERS in str(error) else "") or sentence(error)


def ending(process: str, status: int) -> str:
    """How a process ended, by what `multiprocessing` calls its exit code."""
    return f"{process} " + (f"was killed by signal {-status}" if status < 0 else f"ended with status {status}")


def tell() -> None:
    """In a process of the engine: the first exception that is logged from here on goes to the one that asked. When to
    end is for that one to say: a terminal sends its Ctrl-C to all."""
    logger = logging.getLogger("vllm")
    if _KEY in os.environ and current_thread() is main_thread():
        signal(SIGINT, SIG_IGN)
    if (path := os.environ.get(_KEY)) and not any(isinstance(handler, _Telling) for handler in logger.handlers):
        logger.addHandler(_Telling(Path(path)))


def sentence(error: BaseException) -> str:
    """An exception's message as one line."""
    said = " ".join(str(error).split())[:MAX_CHARACTERS]
    return said if said and isinstance(error, _PLAIN) else f"{type(error).__name__}: {said}".rstrip(": ")


class _Telling(logging.Handler):
    def __init__(self, path: Path) -> None:
        super().__init__(logging.ERROR)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        said = _said(record)
        if said and self._path.exists() and not self._path.stat().st_size:
            self._path.write_text(said)


def _said(record: logging.LogRecord) -> str:
    """What a record says of an ending; "" where it says nothing of one."""
    if str(record.msg).startswith(_LOST_WORKER) and isinstance(record.args, tuple):
        name, status = record.args
        return ending(f"worker {name}", status) if isinstance(status, int) else f"worker {name} is lost"
    error = record.exc_info[1] if record.exc_info else None
    return "" if error is None else sentence(error)
