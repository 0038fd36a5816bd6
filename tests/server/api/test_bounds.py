"""Clients that send too much, too slowly or never, and clients that do not read, over real connections."""

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from threading import Thread
from typing import Any

import httpx
import pytest
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

from whipstaff.server.api import bounds
from whipstaff.server.api.bounds import BODY_BYTES, DEPTH, HEAD_BYTES, HEADERS, Bounds, Protocol, check_depth
from whipstaff.server.errors import BadRequest

SOON = 30.0  # seconds that nothing here takes
SHORT = 1.0  # seconds that stand for the bounds
HEAD = b"POST /x HTTP/1.1\r\nHost: x\r\n"


class Served:
    """A server whose POST says how long its body was, and whose GET never stops talking."""

    def __init__(self) -> None:
        app = FastAPI()
        self.num_gone = 0

        @app.post("/{rest:path}")
        async def length(raw: Request) -> int:
            return len(await raw.body())

        @app.get("/talk")
        async def talk() -> StreamingResponse:
            async def words() -> AsyncIterator[bytes]:
                try:
                    while True:
                        yield b"x" * (1 << 16)
                        await asyncio.sleep(0)
                finally:
                    self.num_gone += 1

            return StreamingResponse(words())

        self.sock = socket.create_server(("127.0.0.1", 0))
        self.port = self.sock.getsockname()[1]
        config = uvicorn.Config(Bounds(app), http=Protocol, log_level="critical", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = Thread(target=self.server.run, args=([self.sock],))
        thread.start()
        try:
            yield
        finally:
            self.server.should_exit = True
            thread.join(SOON)

    @contextmanager
    def connected(self, size: int = 0) -> Iterator[socket.socket]:
        with socket.socket() as sock:
            if size:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
            sock.settimeout(SOON)
            sock.connect(("127.0.0.1", self.port))
            yield sock

    def answer(self, *parts: bytes) -> bytes:
        """What comes back until the connection is closed, on parts that are sent as far as they are taken."""
        with self.connected() as sock:
            try:
                for part in parts:
                    sock.sendall(part)
            except OSError:
                pass
            said = bytearray()
            try:
                while data := sock.recv(1 << 16):
                    said += data
            except ConnectionResetError:
                pass
            return bytes(said)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HEAD_SECONDS", "BODY_SECONDS", "STALL_SECONDS"):
            patch.setattr(bounds, name, SHORT)
        made = Served()
        with made.running():
            yield made


def works(served: Served) -> bool:
    answer = httpx.post(f"http://127.0.0.1:{served.port}/x", content=b"{}", timeout=SOON)
    return answer.status_code == 200 and answer.json() == 2


@pytest.mark.parametrize("said", [b"", b"POST /x HT", HEAD, HEAD + b"A: " + b"b" * 1000])
def test_a_head_that_does_not_end_is_not_waited_for(served: Served, said: bytes) -> None:
    assert served.answer(said).startswith(b"HTTP/1.1 408 ") and works(served)


def test_nor_is_the_second_one_of_a_connection(served: Served) -> None:
    with served.connected() as sock:
        sock.sendall(HEAD + b"Content-Length: 2\r\n\r\n{}")
        assert b" 200 OK" in sock.recv(1 << 16)
        sock.sendall(HEAD)
        assert sock.recv(1 << 16).startswith(b"HTTP/1.1 408 ") and not sock.recv(1)


@pytest.mark.parametrize(
    "parts",
    [
        [HEAD, b"A: " + b"b" * (2 * HEAD_BYTES) + b"\r\n\r\n"],
        [HEAD, b"A: " + b"b" * (100 * HEAD_BYTES)],  # and never an end
        [HEAD, b"".join(b"A%d: b\r\n" % number for number in range(HEADERS + 1)), b"\r\n"],
        [b"POST /" + b"x" * (2 * HEAD_BYTES) + b" HTTP/1.1\r\n\r\n"],
    ],
)
def test_heads_have_an_end(served: Served, parts: list[bytes]) -> None:
    said = served.answer(*parts)
    assert said.startswith(b"HTTP/1.1 431 ") or not said  # what was not read resets the connection
    assert works(served)


def test_many_headers_and_a_long_body_are_taken(served: Served) -> None:
    headers = {f"A{number}": "b" * 200 for number in range(60)}
    answer = httpx.post(f"http://127.0.0.1:{served.port}/x", content=b"x" * BODY_BYTES, headers=headers, timeout=SOON)
    assert answer.status_code == 200 and answer.json() == BODY_BYTES


@pytest.mark.parametrize("path", [b"/x", b"/v1/steering/vectors"])
def test_a_body_that_does_not_end_is_not_waited_for(served: Served, path: bytes) -> None:
    said = served.answer(b"POST " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n12345")
    assert (b" 408 " in said or path != b"/x") and works(served)


def test_long_bodies_are_refused_before_they_are_read(served: Served) -> None:
    said = served.answer(HEAD + b"Content-Length: %d\r\n\r\n" % (BODY_BYTES + 1))
    assert said.startswith(b"HTTP/1.1 413 ") and b"PayloadTooLarge" in said and b"connection: close" in said.lower()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounds, "BODY_SECONDS", SOON)
        chunk = b"10000\r\n" + b"x" * (1 << 16) + b"\r\n"
        said = served.answer(HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[chunk] * (BODY_BYTES // (1 << 16) + 1))
    assert said.startswith(b"HTTP/1.1 413 ") or not said
    assert works(served)


def test_who_does_not_read_is_let_go_of(served: Served) -> None:
    gone = served.num_gone
    with served.connected(size=4096) as sock:
        sock.sendall(b"GET /talk HTTP/1.1\r\nHost: x\r\n\r\n")
        deadline = time.monotonic() + SOON
        while served.num_gone == gone:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert works(served)


def test_hundreds_of_idle_connections_do_not_stay(served: Served) -> None:
    socks = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(300)]
    assert works(served)
    for sock in socks:
        sock.settimeout(SOON)
        assert sock.recv(100).startswith(b"HTTP/1.1 408 ")
        sock.close()


@pytest.mark.parametrize(
    "body", [b'{"a\xf9": 1}', *(r'{"a": "\ud800"}'.encode(name) for name in ("utf-16", "utf-32-le"))]
)
def test_json_is_utf_8(served: Served, body: bytes) -> None:
    """Not another encoding that Python's parser would guess, where nothing that looks at bytes sees what they mean."""
    for kind, status in (("application/json", 400), ("Application/JSON", 400), ("application/octet-stream", 200)):
        answer = httpx.post(
            f"http://127.0.0.1:{served.port}/x", content=body, headers={"content-type": kind}, timeout=SOON
        )
        assert answer.status_code == status, answer.text


def nested(depth: int, inner: str = "") -> bytes:
    return ("[" * depth + inner + "]" * depth).encode()


@pytest.mark.parametrize(
    ("body", "is_taken"),
    [
        (nested(DEPTH), True),
        (nested(DEPTH + 1), False),
        (nested(100_000), False),
        (b'{"a":' * (DEPTH + 1) + b"1" + b"}" * (DEPTH + 1), False),
        (json.dumps({"text": "[{" * 1000}).encode(), True),
        (json.dumps({"text": '"\\' + "[" * 1000}).encode(), True),
        (json.dumps([[number] for number in range(1000)]).encode(), True),
        (b'"' + b"[" * 1000, True),  # is no JSON, which is somebody else's to say
        (b"", True),
    ],
)
def test_depth_is_of_brackets_that_are_no_text(body: bytes, is_taken: bool) -> None:
    if is_taken:
        check_depth(body)
    else:
        with pytest.raises(BadRequest, match="nested"):
            check_depth(body)


def test_depth_is_looked_for_in_no_time() -> None:
    worst: list[Any] = [b'"\\' * (BODY_BYTES // 2), b'["' * (BODY_BYTES // 2), b"[]" * (BODY_BYTES // 2)]
    for body in worst:
        started = time.process_time()
        with suppress(BadRequest):
            check_depth(body)
        assert time.process_time() - started < 10
