"""Keys at the door: whose request it is, what that key opens, and how much of it; and the log of what was refused."""

import time
from collections.abc import Collection, MutableMapping
from http import HTTPStatus
from typing import Any

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers, MutableHeaders

from whipstaff.server import metrics
from whipstaff.server.access.audit import Audit
from whipstaff.server.access.capture_files import ROOT as CAPTURES
from whipstaff.server.access.keys import HOLDER, Holder, Keyring
from whipstaff.server.errors import MESSAGES, Forbidden, RateLimited, Unauthorized, WhipstaffError

OPEN = ("/health", "/ready", "/ping", "/")  # to everybody; the page at / asks for a key
PAGE = "/playground/"  # its files
METRICS = "/metrics"
GENERATING = ("/v1/chat/completions", "/v1/completions", "/v1/chat/completions/batch", MESSAGES, "/v1/responses")
# What a user's key opens, beside looking at what is below /v1. Whatever else there is, now and in a later vLLM, is an
# administrator's: it may generate past the policy, or change the server.
POSTS = (*GENERATING, "/v1/steering/validate", "/tokenize", "/detokenize")
SEEN = ("/v1/", "/version")
ADMIN = "/v1/steering/"
_POLICY_VIOLATION = 1008  # of a WebSocket
_LOOKS = ("GET", "HEAD")


def bearer(headers: Headers) -> str:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key if scheme.lower() == "bearer" else ""


class Access:
    """Laid around the application, inside what counts refusals."""

    def __init__(self, app: Any, keyring: Keyring | None, audit: Audit, has_open_metrics: bool = False) -> None:
        """`keyring` None: vLLM's and our single keys say who may do what, and are checked further in."""
        self._app, self._keyring, self._audit = app, keyring, audit
        self._open = (*OPEN, METRICS) if has_open_metrics else OPEN

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        path = "" if scope["type"] != "http" else scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] == "websocket" and self._keyring is not None:
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION})  # policies are of requests
            return
        if scope["type"] != "http" or _is_open(scope["method"], path, self._open):
            await self._app(scope, receive, send)
            return
        call = _Call(scope, path, send, self._audit)
        try:
            call.holder = self._admit(scope, path)
            call.begin()
        except WhipstaffError as error:
            scope[metrics.REFUSED] = error
            answer = JSONResponse(error.body(path), error.status, headers_of(error))
            await answer(scope, receive, call.send)
            return
        token = HOLDER.set(call.holder)
        try:
            await self._app(scope, receive, call.send)
        finally:
            HOLDER.reset(token)
            if call.is_metered:
                call.holder.meter.end()  # type: ignore[union-attr]

    def _admit(self, scope: Any, path: str) -> Holder | None:
        """Who it is. Raises: Unauthorized, Forbidden."""
        if self._keyring is None:
            return None
        holder = self._keyring.find(bearer(Headers(scope=scope)))
        if holder is None:
            raise Unauthorized("send a key that is valid here, as `Authorization: Bearer KEY`")
        if not holder.is_admin and not _is_users(scope["method"], path):
            raise Forbidden("this key does not open that")
        return holder


def _is_open(method: str, path: str, open_: Collection[str]) -> bool:
    """Whether everybody may. What a browser asks before it asks, vLLM answers."""
    return method == "OPTIONS" or (method in _LOOKS and (path in open_ or path.startswith(PAGE)))


def _is_users(method: str, path: str) -> bool:
    if method == "DELETE":
        return path.startswith(f"{CAPTURES}/")  # its own
    return path.startswith(SEEN) if method in _LOOKS else method == "POST" and path in POSTS


class _Call:
    """One request."""

    def __init__(self, scope: MutableMapping[str, Any], path: str, send: Any, audit: Audit) -> None:
        self._scope, self._path, self._send, self._audit = scope, path, send, audit
        self.holder: Holder | None = None
        self.is_metered = False
        self._started = time.perf_counter()

    def begin(self) -> None:
        """Raises: RateLimited."""
        if self.holder is not None and self._scope["method"] == "POST" and not self.holder.meter.is_free:
            self.holder.meter.begin()
            self.is_metered = True

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            if self.holder is not None and not self.holder.meter.is_free:
                MutableHeaders(scope=message).update(self.holder.meter.headers())
            self._note(message["status"])
        await self._send(message)

    def _note(self, status: int) -> None:
        """Tell the log of a refusal, or of a change."""
        method, error = self._scope.get("method", ""), self._scope.get(metrics.REFUSED)
        is_change = method not in _LOOKS and self._path.startswith(ADMIN) and self._path not in POSTS
        if status < 400 and not is_change:
            return
        said: dict[str, Any] = {
            "peer": (self._scope.get("client") or ("",))[0],
            "method": method,
            "route": _route(self._scope, self._path),
            "status": status,
            "reason": None if status < 400 else reason_of(status, error),
            "param": getattr(error, "param", None),
            "took_ms": round((time.perf_counter() - self._started) * 1e3, 1),
        }
        key = "" if self.holder is None else self.holder.id
        if self.holder is not None:
            said |= {"role": "admin" if self.holder.is_admin else "user", "policy": self.holder.policy_name}
        if is_change:
            named = self._scope.get("path_params", {})
            self._audit.event("change", key=key, object=named.get("name", named.get("id")), **said)
        else:
            self._audit.refusal(key, **said)


def _route(scope: MutableMapping[str, Any], path: str) -> str:
    """As the application knows it; what it does not know could be anything that a client writes."""
    return str(getattr(scope.get("route"), "path", path if path in POSTS else ""))


def reason_of(status: int, error: Any) -> str:
    """Why a request was refused, from a closed set."""
    reason = getattr(error, "reason", None) or metrics.REASONS.get(status)
    return reason or HTTPStatus(status).phrase


def headers_of(error: WhipstaffError) -> dict[str, str]:
    """What an answer says beside its body."""
    return {"Retry-After": str(error.seconds)} if isinstance(error, RateLimited) else {}
