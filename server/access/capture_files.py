"""Activations that wait to be fetched: files in a folder that all API servers of one engine share, each its asker's,
for a while. Room is taken before a request is scheduled, so what was read is never lost for want of it.

{id}.json           whose it is, how much room it has or may take, and until when it is there
{id}.safetensors    what was read, once the answer is whole
alive               held by the process that made the folder, as long as it lives
"""

import asyncio
import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file
from torch import Tensor

from whipstaff.server.access.keys import HOLDER
from whipstaff.server.errors import Forbidden, NotFound, RateLimited, Unavailable

FIELD = "capture_format"  # of a request, by which one asks for a file
ROOT = "/v1/steering/captures"
_PREFIX = "whipstaff-captures-"  # of folders
_ID = re.compile(r"cap-[0-9a-f]{32}")
_PAUSE = 1.0  # seconds between two looks for what has expired
_WAIT = 1.0  # seconds that somebody is told to wait where nothing that is kept has an end yet


class Kept(BaseModel):
    """What is known of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    owner: str  # the key's id; "": there is no file of keys, and who may ask may fetch
    num_bytes: int  # as long as it is not written, the most that it may have
    expires: float | None = None  # seconds since 1970; None: it is not written yet

    def is_over(self, now: float) -> bool:
        return self.expires is not None and self.expires <= now


class CaptureFiles:
    """Of one server, in each of its processes."""

    def __init__(self, folder: Path, most: int, most_bytes: int, seconds: float) -> None:
        """
        Args:
            folder: see `folder_of_captures`.
            most, most_bytes: of files that are kept or expected at once, all together.
            seconds: for which one is kept.
        """
        self._folder, self._most, self._most_bytes, self._seconds = folder, most, most_bytes, seconds

    def reserve(self, num_bytes: int) -> Kept:
        """Take room for what a request may come to. Raises: Unavailable, RateLimited."""
        if num_bytes > self._most_bytes:
            raise Unavailable(
                f"this may come to a file of {num_bytes} bytes, and this server keeps {self._most_bytes}; say less in "
                "`capture` or max_tokens, or start it with a larger --max-download-bytes",
                FIELD,
            )
        holder = HOLDER.get()
        with self._alone():
            there = self._swept()
            room = self._most_bytes - sum(one.num_bytes for one in there)
            if len(there) >= self._most or num_bytes > room:
                ends = [one.expires for one in there if one.expires is not None]
                raise RateLimited(
                    f"{FIELD}: {len(there)} files are kept or being made, and one of up to {num_bytes} bytes has no "
                    "room beside them; fetch yours and DELETE them, or come back when they have expired",
                    "concurrency",
                    min(ends) - time.time() if ends else _WAIT,
                )
            kept = Kept(id=f"cap-{uuid4().hex}", owner="" if holder is None else holder.id, num_bytes=num_bytes)
            self._write(kept)
        return kept

    def fill(self, kept: Kept, tensors: Mapping[str, Tensor]) -> Kept:
        """Write what was read; from now on it can be fetched. Raises: OSError, and then nothing is left."""
        path = self._path(kept.id, "safetensors")
        try:
            save_file(dict(tensors), path, {"format": "pt"})
            kept = kept.model_copy(
                update={"num_bytes": path.stat().st_size, "expires": time.time() + self._seconds},
            )
            self._write(kept)
        except BaseException:
            self.drop(kept.id)
            raise
        return kept

    def drop(self, number: str) -> None:
        """Forget a file, whether it was written or not."""
        for suffix in ("json", "safetensors"):
            self._path(number, suffix).unlink(missing_ok=True)

    def open(self, number: str) -> tuple[BinaryIO, Kept]:
        """A file of who asks, which stays readable though it expires meanwhile. Raises: NotFound, Forbidden."""
        kept = self.own(number)
        try:
            return self._path(number, "safetensors").open("rb"), kept
        except FileNotFoundError:
            raise _missing(number) from None

    def own(self, number: str) -> Kept:
        """What is known of a file of who asks; an administrator's are all. Raises: NotFound, Forbidden."""
        kept = self._read(number) if _ID.fullmatch(number) else None
        if kept is None or kept.expires is None or kept.is_over(time.time()):
            raise _missing(number)
        holder = HOLDER.get()
        if holder is not None and not holder.is_admin and holder.id != kept.owner:
            raise Forbidden("what another key's request has read is not this key's", "id")
        return kept

    async def sweep_for_ever(self) -> None:
        """Delete what has expired."""
        while True:
            await asyncio.sleep(_PAUSE)
            await asyncio.to_thread(self.sweep)

    def sweep(self) -> None:
        """Delete what has expired."""
        with self._alone():
            self._swept()

    def _swept(self) -> list[Kept]:
        """What is left once that is gone which has expired."""
        found, now = [], time.time()
        for path in self._folder.glob("cap-*.json"):
            kept = self._read(path.stem)
            if kept is not None and kept.is_over(now):
                self.drop(kept.id)
            elif kept is not None:
                found.append(kept)
        return found

    def _path(self, number: str, suffix: str) -> Path:
        return self._folder / f"{number}.{suffix}"

    def _read(self, number: str) -> Kept | None:
        try:
            return Kept.model_validate_json(self._path(number, "json").read_bytes())
        except FileNotFoundError:
            return None

    def _write(self, kept: Kept) -> None:
        """Whole or not at all."""
        path = self._path(kept.id, "json")
        temporary = path.with_suffix(".new")
        temporary.write_text(kept.model_dump_json())
        temporary.replace(path)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Among all processes and threads."""
        with (self._folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _missing(number: str) -> NotFound:
    return NotFound(f"there is no file {number!r}; what a request has read is kept for a while only", "id")


class Download:
    """The file of one request."""

    def __init__(self, files: CaptureFiles) -> None:
        self._files = files
        self._kept: Kept | None = None

    def reserve(self, num_bytes: int) -> None:
        """Before it is scheduled. Raises: Unavailable, RateLimited."""
        self._kept = self._files.reserve(num_bytes)

    def fill(self, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
        """Once it was answered; what the receipt says of it."""
        assert self._kept is not None
        try:
            self._kept = kept = self._files.fill(self._kept, tensors)
        except OSError as error:
            return {"problem": f"what was read could not be written: {error.strerror}"}
        assert kept.expires is not None
        return {"id": kept.id, "url": f"{ROOT}/{kept.id}", "bytes": kept.num_bytes, "expires": int(kept.expires)}

    def end(self) -> None:
        """The request ended, however that was: room that was not used is free again."""
        if self._kept is not None and self._kept.expires is None:
            self._files.drop(self._kept.id)


@contextmanager
def folder_of_captures(is_wanted: bool) -> Iterator[Path | None]:
    """A new folder among the machine's temporary files, gone at the end with what is in it; and those are removed that
    servers left which were killed."""
    if not is_wanted:
        yield None
        return
    _remove_left()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    try:
        with (folder / "alive").open("wb") as alive:
            fcntl.flock(alive, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_left() -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # it is another user's, or its server lives
            if folder.stat().st_uid == os.getuid():
                with (folder / "alive").open("rb") as alive:
                    fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder)
