"""Counts every answer that refuses a request, ours and vLLM's, by why."""

from typing import Any

from whipstaff.server import metrics

ROOT = "/v1/"


class Refusals:
    """Laid around the application: the check of keys is inside."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(scope.get("root_path", "") + ROOT):
            await self._app(scope, receive, send)
            return

        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                metrics.note_status(message["status"])
            await send(message)

        await self._app(scope, receive, noting)
