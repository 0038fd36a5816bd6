"""Servers that are told to end, and servers whose engine dies: what clients read, and how the process ends. Each test
has a server of its own, since it ends it."""

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from asking import PUSH, Samples, metrics, poll
from serving import MAX_LEN, MODEL, STOP_PATIENCE, Server, serving

from whipstaff.server.engine import ENGINE_DIED

pytestmark = pytest.mark.engine

LONG: dict[str, Any] = {"model": MODEL, "prompt": "def main(", "ignore_eos": True, "max_tokens": MAX_LEN - 20}
PLAIN, STEERED = LONG | {"stream": True}, LONG | {"stream": True, "steering": [PUSH]}
LONGER = 8192  # tokens: no machine comes to their end before somebody ends it
ENDLESS, STEERED_ENDLESS = ({**body, "max_tokens": LONGER - 20} for body in (PLAIN, STEERED))
ROOM = ("--max-model-len", str(LONGER), "--hf-overrides", json.dumps({"max_position_embeddings": LONGER}))
PATIENCE = 60.0  # seconds


@contextmanager
def streaming(server: Server, body: dict[str, Any]) -> Iterator[Iterator[str]]:
    """The events of an answer, of which the first has come."""
    with server.client() as http, http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        yield (line.removeprefix("data: ") for line in lines if line)


def ended(server: Server) -> tuple[int, str]:
    """The exit status, and the last line that was said."""
    status = server.process.wait(STOP_PATIENCE)
    return status, server.said().strip().splitlines()[-1]


def engine(server: Server) -> psutil.Process:
    """The engine's process. Its title may be that of the process that it was forked from."""
    found = psutil.Process(server.process.pid).children()
    return heaviest([process for process in found if "APIServer" not in " ".join(process.cmdline())])


def heaviest(found: list[psutil.Process]) -> psutil.Process:
    """Of several, the one that is no helper."""
    return max(found, key=lambda process: process.memory_info().rss)


def files_of(server: Server) -> Path:
    """The folder of what was read, in which there is a file."""
    body = LONG | {"max_tokens": 2, "capture": {"layers": [1]}, "capture_format": "download"}
    with server.client() as http:
        answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    (alive,) = [
        Path(one.path) for one in psutil.Process(server.process.pid).open_files() if one.path.endswith("/alive")
    ]
    assert (alive.parent / f"{answer.json()['whipstaff']['download']['id']}.safetensors").exists()
    return alive.parent


def until(what: Any) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_broken_off(events: Iterator[str], *said: str) -> None:
    *_, last = list(events)
    error = json.loads(last)["error"]  # and no [DONE] after it
    assert error["code"] == 503 and all(word in error["message"] for word in said), error


def test_what_runs_comes_to_its_end_and_nothing_new_is_taken(tmp_path: Path) -> None:
    with serving(tmp_path) as server, server.client() as other, ExitStack() as stack:
        assert other.get("/ready").json() == {"ready": True, "reason": None}
        running = [stack.enter_context(streaming(server, body)) for body in (PLAIN, STEERED)]
        with server.held():  # so that both run until all of this is asked
            server.process.send_signal(signal.SIGTERM)
            until(lambda: other.get("/ready").status_code == 503)
            told = time.monotonic()
            assert other.get("/ready").json() == {"ready": False, "reason": "the server is shutting down"}
            assert other.get("/health").status_code == 200  # it lives: nobody should kill it
            refused = other.post("/v1/completions", json=LONG)
            assert refused.status_code == 503 and refused.json()["error"]["message"] == "the server is shutting down"
            assert refused.headers["retry-after"] == "1" and refused.headers["connection"] == "close"
            now = metrics(other)
            assert now["whipstaff_refusals_total", (("reason", "draining"),)] == 1
            assert now["whipstaff_draining", ()] == 1
        for events in running:
            *_, last, done = list(events)
            assert done == "[DONE]" and json.loads(last)["choices"][0]["finish_reason"] == "length"
        assert ended(server)[0] == 0
        print(f"drained after {time.monotonic() - told:.2f} s")  # -s shows it


def test_a_second_signal_cuts_what_runs_and_no_answer_looks_whole(tmp_path: Path) -> None:
    with serving(tmp_path, "--drain-timeout", "600", *ROOM) as server, server.client() as other, ExitStack() as stack:
        running = [
            stack.enter_context(streaming(server, body)) for body in (ENDLESS, STEERED_ENDLESS, ENDLESS | {"n": 2})
        ]
        with ThreadPoolExecutor() as pool:
            with server.held():  # so that nothing ends before it is ended
                before, body = admitted(metrics(other)), STEERED_ENDLESS | {"stream": False}
                whole = [pool.submit(other.post, "/v1/completions", json=body) for _ in range(2)]
                poll(other, lambda now: admitted(now) == before + len(whole))
                server.process.send_signal(signal.SIGTERM)
                until(lambda: other.get("/ready").status_code == 503)
                server.process.send_signal(signal.SIGTERM)
            for events in running:
                assert_broken_off(events, "the server is shutting down")
            for answer in whole:
                assert answer.result().status_code == 503, answer.result().text
        assert ended(server)[0] == 128 + signal.SIGTERM


def admitted(now: Samples) -> float:
    """Requests with extra fields that were taken."""
    return sum(value for (name, _), value in now.items() if name == "whipstaff_admission_seconds_count")


def test_two_api_servers_end_together_when_their_patience_does(tmp_path: Path) -> None:
    flags = ("--api-server-count", "2", "--drain-timeout", "0.3")
    with serving(tmp_path, *flags, *ROOM) as server, ExitStack() as stack:
        files = files_of(server)
        running = [stack.enter_context(streaming(server, body)) for body in (ENDLESS, STEERED_ENDLESS) * 2]
        server.process.send_signal(signal.SIGTERM)
        for events in running:
            assert_broken_off(events, "the server is shutting down")
        assert ended(server)[0] == 0 and not files.exists()


@pytest.mark.parametrize(("count", "victim"), [("1", "Worker"), ("2", "EngineCore")])
def test_a_dead_process_of_the_engine_ends_the_server_and_everybody_is_told_why(
    tmp_path: Path, count: str, victim: str
) -> None:
    flags = ("--api-server-count", count, *(("--distributed-executor-backend", "mp") if victim == "Worker" else ()))
    with serving(tmp_path, *flags, *ROOM) as server, ExitStack() as stack:
        core, files = engine(server), files_of(server)
        process = core if victim == "EngineCore" else heaviest(core.children())
        running = [stack.enter_context(streaming(server, body)) for body in (ENDLESS, STEERED_ENDLESS)]
        os.kill(process.pid, signal.SIGKILL)
        killed = time.monotonic()
        for events in running:
            assert_broken_off(events, "the engine died", "signal 9")
        status, last = ended(server)
        assert status == ENGINE_DIED and time.monotonic() - killed < 30
        assert "whipstaff: the engine died: " in last and "signal 9" in last, last
        assert not files.exists()
