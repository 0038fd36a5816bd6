"""vLLM's check of the user's key, and a way past it for who has another."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import Headers
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware


class Guard(AuthenticationMiddleware):
    """vLLM's check of the user's key, but for requests that `admits` knows by path and headers."""

    def __init__(self, app: Any, tokens: list[str], admits: Callable[[str, Headers], bool]) -> None:
        super().__init__(app, tokens)
        self._admits = admits

    def __call__(self, scope: Any, receive: Any, send: Any) -> Any:
        if scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if self._admits(path, Headers(scope=scope)):
                return self.app(scope, receive, send)
        return super().__call__(scope, receive, send)


def admit(app: FastAPI, admits: Callable[[str, Headers], bool]) -> None:
    """Let requests that `admits` knows by path and headers through without the user's key."""
    for layer in app.user_middleware:
        if layer.cls is AuthenticationMiddleware:
            layer.cls = partial(Guard, admits=admits)
