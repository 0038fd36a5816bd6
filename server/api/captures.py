"""What requests have read, as files to fetch: for the key that asked, and for administrators."""

from collections.abc import AsyncIterator, Iterator
from typing import Any, BinaryIO

from fastapi import APIRouter, Depends, Request
from fastapi.responses import StreamingResponse

from whipstaff.server.access.capture_files import ROOT, CaptureFiles
from whipstaff.server.api.descriptions import REFUSALS, CaptureDeleted, answers
from whipstaff.server.engine.frontend.lifecycle import Lifecycle
from whipstaff.server.errors import Unavailable

MEDIA = "application/octet-stream"
_PIECE = 1 << 20  # bytes

router = APIRouter(prefix=ROOT)


def files_of(raw: Request) -> CaptureFiles:
    """A dependency of every route here. Raises: Unavailable."""
    files: CaptureFiles | None = raw.app.state.whipstaff_captures
    if files is None:
        raise Unavailable("this server keeps no files of what was read; start it with --max-downloads N")
    return files


async def sending(raw: Request) -> AsyncIterator[None]:
    """While a file is sent, a server that was told to end waits for it."""
    life: Lifecycle = raw.app.state.whipstaff_life
    with life.answering():
        yield


@router.get(
    "/{id}",
    response_class=StreamingResponse,
    responses={200: {"content": {MEDIA: {}}, "description": "A safetensors file."}, **REFUSALS},
    dependencies=[Depends(sending)],
)
def fetch_capture(id: str, files: CaptureFiles = Depends(files_of)) -> StreamingResponse:
    """What a request with `"capture_format": "download"` has read, as safetensors: for the key that asked, and for
    administrators, until it expires."""
    file, kept = files.open(id)
    headers = {
        "Content-Length": str(kept.num_bytes),
        "Content-Disposition": f'attachment; filename="{id}.safetensors"',
        "Cache-Control": "no-store",
    }
    return StreamingResponse(_pieces(file), media_type=MEDIA, headers=headers)


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while piece := file.read(_PIECE):
            yield piece


@router.delete("/{id}", responses=answers(CaptureDeleted))
def delete_capture(id: str, files: CaptureFiles = Depends(files_of)) -> dict[str, Any]:
    """Delete such a file before it expires, and make room for others."""
    files.own(id)
    files.drop(id)
    return {"id": id, "object": "steering.capture", "deleted": True}
