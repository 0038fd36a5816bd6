"""What ends an engine's process is said by the one that started it, in one line."""

import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

from whipstaff.server.engine import UnsupportedEngine, causes
from whipstaff.server.engine.frontend import multi_api_server

LOST = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}")
CHILD = """
import logging
from whipstaff.server.engine import causes
causes.tell(); causes.tell()
logger = logging.getLogger("vllm.v1.engine.core")
logger.error("no exception")
for text in ("the first\\nreason", "another"):
    try: raise {kind}(text)
    except Exception: logger.exception("EngineCore failed to start.")
"""


def fail(kind: str) -> None:
    subprocess.run([sys.executable, "-c", CHILD.format(kind=kind)], check=True, capture_output=True, timeout=120)


@pytest.mark.parametrize(("kind", "said"), [("ValueError", "the first reason"), ("KeyError", "KeyError: 'the first")])
def test_the_first_exception_of_a_process_is_the_cause(kind: str, said: str) -> None:
    with causes.asked():
        assert causes.of(LOST) == str(LOST)  # nobody has told anything yet
        fail(kind)
        assert causes.of(LOST).startswith(said) and "\n" not in causes.of(LOST)
        assert causes.of(ValueError("a clear\nsentence")) == "a clear sentence"
        causes.forget()
        assert causes.told() == ""


def test_a_worker_that_is_lost_is_named_with_its_signal() -> None:
    program = CHILD.partition("for text")[0] + (
        "logger.error('Worker proc %s died unexpectedly (exit code: %s), shutting down executor.', 'VllmWorker-0', -9)"
    )
    with causes.asked():
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, timeout=120)
        assert causes.told() == "worker VllmWorker-0 was killed by signal 9"


def test_nothing_is_told_where_nobody_asked() -> None:
    before = list(logging.getLogger("vllm").handlers)
    causes.tell()
    assert logging.getLogger("vllm").handlers == before
    fail("ValueError")


def test_errors_without_words_say_their_class() -> None:
    assert causes.sentence(AssertionError()) == "AssertionError"
    assert causes.sentence(ValueError("x")) == "x"


# ---- what one API server of several ends with


async def failing(error: Exception) -> int:
    raise error


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (UnsupportedEngine("no such flag"), UnsupportedEngine),
        (OSError(28, "no room"), UnsupportedEngine),
        (RuntimeError("out of memory"), RuntimeError),
    ],
)
def test_why_an_api_server_ends_is_said_by_its_parent(error: Exception, kind: type[Exception]) -> None:
    with causes.asked():
        status = multi_api_server.run_one(failing(error))
        engine, server = SimpleNamespace(failed_proc_name=None), SimpleNamespace(exitcode=status)
        with pytest.raises(kind) as raised:
            multi_api_server._bury(engine, [server], RuntimeError("Process ApiServer_0 died"))
    assert str(raised.value) == causes.sentence(error)
    assert causes.status_of(raised.value) == causes.status_of(error) == status


def test_one_that_was_killed_could_not_say_why() -> None:
    with causes.asked(), pytest.raises(RuntimeError, match="Process ApiServer_0 died"):
        engine, server = SimpleNamespace(failed_proc_name=None), SimpleNamespace(exitcode=-9)
        multi_api_server._bury(engine, [server], RuntimeError("Process ApiServer_0 died"))
