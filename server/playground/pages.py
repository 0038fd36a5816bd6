"""What is served to browsers: the playground, and FastAPI's documentation of the API, both without another host.

Every file goes out with a policy that lets a page load from this server alone and run no script but its files: a text
that came from a model, a vector's name or a link cannot become a program.
"""

from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.staticfiles import StaticFiles
from starlette.responses import FileResponse, Response

FILES = Path(__file__).parent / "static"
MOUNT = "/playground"
_SAME_FOR_ALL = (
    "default-src 'none'; script-src 'self'; img-src 'self' data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
POLICY = f"{_SAME_FOR_ALL}; style-src 'self'; require-trusted-types-for 'script'; trusted-types 'none'"
DOCS_POLICY = f"{_SAME_FOR_ALL}; style-src 'self' 'unsafe-inline'"  # Swagger UI writes style attributes
HEADERS = {
    "Cache-Control": "no-cache",  # files are asked for by their ETag: those of two versions never mix
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class _Files(StaticFiles):
    """Static files under the page's policy."""

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update({**HEADERS, "Content-Security-Policy": POLICY})
        return response


def _page(name: str, policy: str) -> FileResponse:
    return FileResponse(FILES / name, headers={**HEADERS, "Content-Security-Policy": policy})


def serve_playground(app: FastAPI) -> None:
    """Put the page at `/`, its files below `MOUNT`."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    async def playground() -> FileResponse:
        return _page("index.html", POLICY)

    app.include_router(router)
    app.mount(MOUNT, _Files(directory=FILES))


def serve_docs(app: FastAPI, route: str = "/docs") -> None:
    """Put our page of Swagger UI in the place of one that starts by a script within the page. The files that it loads
    are vLLM's (`--enable-offline-docs`)."""
    router = APIRouter(include_in_schema=False)

    @router.get(route)
    async def docs() -> FileResponse:
        return _page("docs.html", DOCS_POLICY)

    @router.get(f"{route}/start.js")
    async def start() -> FileResponse:
        return _page("docs.js", DOCS_POLICY)

    app.router.routes[:] = [each for each in app.router.routes if getattr(each, "path", None) != route]
    app.include_router(router)
