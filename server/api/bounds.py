"""Bounds on what a client may send and how slowly, before anything of it is looked at.

Uvicorn waits for the end of a head, of a body and of a reader for ever, and takes heads of any length.
"""

import asyncio
import json
import re
from asyncio import TimerHandle
from typing import Any

from fastapi.responses import JSONResponse
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from whipstaff.server.errors import BadRequest, TimedOut, TooLarge, WhipstaffError

HEAD_SECONDS = 10.0  # for a request's line and headers, from the connection or the first byte on
HEAD_BYTES, HEADERS = 1 << 16, 100
BODY_SECONDS = 30.0  # for a body, and a second more for every
BODY_RATE = 1 << 14  # bytes
BODY_BYTES = 1 << 23  # of JSON
DEPTH = 64  # of JSON
STALL_SECONDS = 60.0  # that a client may leave what it asked for unread
UPLOADS = "/v1/steering/vectors"  # whose body is no JSON, and has a limit of its own
_LONG = 431  # Request Header Fields Too Large
_LATE = 408
# Strings and brackets: what opens or shuts in JSON. A string that does not end is not JSON, whatever it holds.
_NESTING = re.compile(rb'"(?:[^"\\]|\\.)*+"?|[\[{]|[\]}]', re.S)


class Protocol(HttpToolsProtocol):
    """Uvicorn's, which does not wait for ever."""

    _deadline: TimerHandle | None = None  # of the head that is coming
    _stall: TimerHandle | None = None  # of a reader that does not read
    _num_bytes = 0  # of that head
    _status = 400  # of what cannot be read

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._resumed()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._deadline is not None and not self.transport.is_closing():
            self._num_bytes += len(data)
            if self._num_bytes > HEAD_BYTES:
                self._refuse(_LONG)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._await_head()

    def on_headers_complete(self) -> None:
        self._head_came()
        num_bytes = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if num_bytes > HEAD_BYTES or len(self.headers) > HEADERS:
            self._status = _LONG
            raise ValueError("the head is too long")  # the parser then answers as for what is no HTTP
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        if self._status == 400:
            super().send_400_response(msg)
        else:
            self._refuse(self._status)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall = self.loop.call_later(STALL_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        self._resumed()
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_came()
        self._deadline = self.loop.call_later(HEAD_SECONDS, self._refuse, _LATE)

    def _head_came(self) -> None:
        self._num_bytes = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _resumed(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _refuse(self, status: int) -> None:
        self._head_came()
        self.transport.write(STATUS_LINE[status] + b"content-length: 0\r\nconnection: close\r\n\r\n")
        self.transport.close()


class Bounds:
    """Laid around the application: it sees whole bodies of bounded size and depth, but for uploads."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            await self._app(scope, receive, send)
            return
        if scope["path"].removeprefix(scope.get("root_path", "")) == UPLOADS:
            await self._app(scope, _in_time(receive), send)
            return
        try:
            body = await _whole(scope, receive)
            check_depth(body)
            if _is_json(scope):
                check_text(body)
        except WhipstaffError as error:
            await JSONResponse(error.body(scope["path"]), error.status, {"Connection": "close"})(scope, receive, send)
            return
        except _Gone:
            return
        said = False

        async def again() -> Any:
            nonlocal said
            if said:
                return await receive()  # that the client is gone
            said = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, again, send)


class _Gone(Exception):
    """The client is."""


async def _whole(scope: Any, receive: Any) -> bytes:
    """Raises: TooLarge, TimedOut, _Gone."""
    length = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    if length.isdigit() and int(length) > BODY_BYTES:
        raise _too_large()
    parts, size, timely = list[bytes](), 0, _in_time(receive)
    while True:
        message = await timely()
        if message["type"] == "http.disconnect":
            raise _Gone
        parts.append(message.get("body", b""))
        if (size := size + len(parts[-1])) > BODY_BYTES:
            raise _too_large()
        if not message.get("more_body", False):
            return b"".join(parts)


def _too_large() -> TooLarge:
    return TooLarge(f"the body has more than {BODY_BYTES} bytes, the most that is taken")


def _in_time(receive: Any) -> Any:
    """What comes too slowly is not waited for. Raises: TimedOut."""
    loop, size, is_over = asyncio.get_running_loop(), 0, False
    started = loop.time()

    async def timely() -> Any:
        nonlocal size, is_over
        if is_over:
            return await receive()  # that the client is gone, for which one waits
        try:
            async with asyncio.timeout_at(started + BODY_SECONDS + size / BODY_RATE):
                message = await receive()
        except TimeoutError:
            raise TimedOut("the body did not come in time") from None
        size += len(message.get("body", b""))
        is_over = not message.get("more_body", False)
        return message

    return timely


def _is_json(scope: Any) -> bool:
    return any(name == b"content-type" and b"json" in value.lower() for name, value in scope["headers"])


def check_text(body: bytes) -> None:
    """Raises: BadRequest for what is no UTF-8, as JSON has to be."""
    if not (encoding := json.detect_encoding(body)).startswith(
        "utf-8"
    ):  # which a parser would take, and check_depth not
        raise BadRequest(f"the body is no UTF-8 but {encoding}")
    try:
        body.decode()
    except UnicodeDecodeError as error:
        raise BadRequest(f"the body is no UTF-8: {error.reason} at byte {error.start}") from None


def check_depth(body: bytes) -> None:
    """Raises: BadRequest for JSON that is nested deeper than anything that is meant."""
    if body.count(b"[") + body.count(b"{") <= DEPTH:
        return
    depth = 0
    for found in _NESTING.finditer(body):
        sign = found[0]
        if sign in b"[{":
            if (depth := depth + 1) > DEPTH:
                raise BadRequest(f"the JSON is nested more than {DEPTH} deep")
        elif sign in b"]}":
            depth -= 1
