"""Jobs on the disk, in the registry's folder, so that every API server tells of all of them and a crash loses none.

fits/{id}.json      what is known of a job, replaced as a whole
fits/{id}.lock      held by the process that works on it, as long as it lives
fits/{id}.cancel    somebody wants it to end
fits/{id}.rows/     what it has read so far
"""

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict

from whipstaff.server.errors import Conflict, NotFound, RateLimited
from whipstaff.server.registry.folder import telling_full

MOST_UNFINISHED = 4  # jobs of a server, waiting or at work
MOST_KEPT = 64  # jobs that ended, of which one can ask
LOST = "the server that worked on it ended"
_ID = re.compile(r"fit-[0-9a-f]{12}")
_WAIT = 5.0  # seconds that somebody is told to wait for another job's end
State = Literal["queued", "running", "cancelling", "done", "failed", "cancelled"]
UNFINISHED = ("queued", "running")


class Promotion(BaseModel):
    """A preset that names the vector now, and what it was before."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: str
    digest: str  # of what it became
    before: dict[str, Any] | None  # None: there was none


class Progress(BaseModel):
    """How far the present part of the work is."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: str
    done: int
    of: int


class Failure(BaseModel):
    """Why a job came to nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    message: str
    param: str | None = None


class Record(BaseModel):
    """What is known of a job."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    object: Literal["steering.fit"] = "steering.fit"
    state: State = "queued"
    method: str
    name: str
    created: int
    ended: int | None = None
    rows: dict[str, int]  # by split
    warnings: list[str] = []
    progress: Progress | None = None
    evaluation: dict[str, Any] | None = None
    error: Failure | None = None
    digest: str | None = None  # of the vector
    replaced: str | None = None  # the digest of what had its name before
    provenance: dict[str, Any] | None = None
    promoted: Promotion | None = None

    @property
    def is_unfinished(self) -> bool:
        return self.state in UNFINISHED

    def but(self, **fields: Any) -> "Record":
        return self.model_copy(update=fields)


class Book:
    """Of one registry folder."""

    def __init__(self, folder: Path) -> None:
        """Jobs that nobody works on any more have failed, and leave nothing. Raises: OSError."""
        self._folder = folder
        folder.mkdir(exist_ok=True)
        self.all()

    def add(self, method: str, name: str, rows: dict[str, int], warnings: list[str]) -> tuple[Record, BinaryIO]:
        """A new job, and what says that this process works on it. Raises: RateLimited, Conflict, StorageFull."""
        with telling_full(), self._alone():
            unfinished = [record for record in self.all() if record.is_unfinished or record.state == "cancelling"]
            if any(record.name == name for record in unfinished):
                raise Conflict(f"a fit is making {name!r} already; cancel it first", "name")
            if len(unfinished) >= MOST_UNFINISHED:
                raise RateLimited(f"{len(unfinished)} fits wait or run, as many as may at once", "concurrency", _WAIT)
            number = f"fit-{uuid4().hex[:12]}"
            record = Record(id=number, method=method, name=name, created=int(time.time()), rows=rows, warnings=warnings)
            lock = self._path(number, "lock").open("wb")
            fcntl.flock(lock, fcntl.LOCK_EX)
            self.write(record)
            self._forget_the_oldest()
        return record, lock

    def close(self, record: Record, lock: BinaryIO) -> None:
        """A job ended, so. Raises: OSError where it cannot be written; it is then one on which nobody works."""
        with lock:
            shutil.rmtree(self.rows(record.id), ignore_errors=True)
            self.write(record.but(ended=int(time.time())))
            self._path(record.id, "cancel").unlink(missing_ok=True)
            self._path(record.id, "lock").unlink(missing_ok=True)

    def get(self, number: str) -> Record:
        """Raises: NotFound."""
        record = self._read(number) if _ID.fullmatch(number) else None
        if record is None:
            raise NotFound(f"there is no fit {number!r}; GET /v1/steering/fits lists those that there are", "id")
        if record.is_unfinished and not self._is_worked_on(number):
            record = self._lost(number)
        if record.is_unfinished and self.is_cancelled(number):
            return record.but(state="cancelling")
        return record

    def all(self) -> list[Record]:
        """The newest first."""
        found = []
        for path in self._folder.glob("fit-*.json"):
            with suppress(NotFound):  # it was removed just now
                found.append(self.get(path.stem))
        return sorted(found, key=lambda record: (record.created, record.id), reverse=True)

    def write(self, record: Record) -> None:
        """Whole or not at all. What a crash of the machine takes is found as it was, or lost."""
        path = self._path(record.id, "json")
        temporary = path.with_suffix(f".{os.getpid()}.new")
        temporary.write_text(record.model_dump_json())
        temporary.replace(path)

    def cancel(self, number: str) -> Record:
        """Have a job end. Raises: NotFound."""
        if self.get(number).is_unfinished:
            self._path(number, "cancel").touch()
        return self.get(number)

    def is_cancelled(self, number: str) -> bool:
        return self._path(number, "cancel").exists()

    def remove(self, number: str) -> None:
        """Forget a job that ended."""
        self._path(number, "json").unlink(missing_ok=True)

    def rows(self, number: str) -> Path:
        """Where a job keeps what it reads."""
        return self._path(number, "rows")

    def _path(self, number: str, suffix: str) -> Path:
        return self._folder / f"{number}.{suffix}"

    def _read(self, number: str) -> Record | None:
        try:
            return Record.model_validate(json.loads(self._path(number, "json").read_text()))
        except FileNotFoundError:
            return None

    def _is_worked_on(self, number: str) -> bool:
        try:
            with self._path(number, "lock").open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    def _lost(self, number: str) -> Record:
        """What became of a job on which nobody works. Raises: NotFound."""
        record = self._read(number)  # once more: it may have ended just now
        if record is None:
            raise NotFound(f"there is no fit {number!r}", "id")
        if record.is_unfinished:
            shutil.rmtree(self.rows(number), ignore_errors=True)
            record = record.but(state="failed", error=Failure(message=LOST), ended=int(time.time()))
            self.write(record)
        for suffix in ("cancel", "lock"):
            self._path(number, suffix).unlink(missing_ok=True)
        return record

    def _forget_the_oldest(self) -> None:
        ended = [record for record in self.all() if record.ended is not None]
        for record in ended[MOST_KEPT:]:
            self.remove(record.id)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        with (self._folder / "lock").open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
