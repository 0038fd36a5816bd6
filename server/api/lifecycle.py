"""What a server that ends says to who asks it for something, and whether it is one to ask."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from whipstaff.server import metrics
from whipstaff.server.api.descriptions import Ready
from whipstaff.server.engine.frontend.lifecycle import Lifecycle
from whipstaff.server.errors import NotReady

_ONLY_LOOKING = ("GET", "HEAD", "OPTIONS")
_HEADERS = {"Retry-After": "1", "Connection": "close"}  # else a client would come back to the same server

router = APIRouter()


@router.get(
    "/ready",
    responses={
        200: {"model": Ready},
        503: {"model": Ready, "description": "It ends, or its engine died: ask another."},
    },
)
async def ready(raw: Request) -> JSONResponse:
    """Whether requests are taken. A server that starts answers nothing at all: its self-test comes first."""
    life: Lifecycle = raw.app.state.whipstaff_life
    return JSONResponse({"ready": life.reason is None, "reason": life.reason}, 200 if life.reason is None else 503)


class Gate:
    """Laid around everything: knows what is being answered, and takes nothing new once the server is to end."""

    def __init__(self, app: Any, life: Lifecycle) -> None:
        self._app, self._life = app, life

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["method"] in _ONLY_LOOKING:
            await self._app(scope, receive, send)
        elif (reason := self._life.reason) is not None:
            metrics.REFUSALS.labels(metrics.DRAINING_REASON).inc()
            await JSONResponse(NotReady(reason).body(scope["path"]), NotReady.status, _HEADERS)(scope, receive, send)
        else:
            with self._life.answering():
                await self._app(scope, receive, send)
