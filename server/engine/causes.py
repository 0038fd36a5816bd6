"""Why an engine did not start: the process in which it failed tells the one that started it, which then says so last.

vLLM's own error refers to what was logged above; here that is a file, named by an environment variable, into which the
first exception that an engine's process logs goes as one sentence.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_KEY = "WHIPSTAFF_CAUSE_FILE"
_REFERS = "root cause"  # what vLLM says where the cause is in the log
_PLAIN = (ValueError, RuntimeError, OSError)  # their messages are sentences; others need their class beside them
MAX_CHARACTERS = 500


class Causes:
    """What the engine's processes told."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def of(self, error: BaseException) -> str:
        """What an error comes from, in one line."""
        told = self._path.read_text(errors="replace") if _REFERS in str(error) else ""
        return told or sentence(error)


@contextmanager
def asked() -> Iterator[Causes]:
    """Processes that start in here `tell`."""
    with tempfile.NamedTemporaryFile(prefix="whipstaff-cause-") as file:
        os.environ[_KEY] = file.name
        try:
            yield Causes(Path(file.name))
        finally:
            del os.environ[_KEY]


def tell() -> None:
    """In a process of the engine: the first exception that is logged from here on goes to the one that asked."""
    logger = logging.getLogger("vllm")
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
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and self._path.exists() and not self._path.stat().st_size:
            self._path.write_text(sentence(error))
