"""The registry's folder: what came over HTTP, kept so that a crash at any moment leaves the old state or the new one.

    manifest.json            names -> digests of vectors, names -> presets; replaced as a whole by a rename
    objects/{digest}.safetensors
    lock                     held by whoever writes, of several processes
    fits/                    jobs that make vectors: see `server.fits.book`

Nothing is named after what a client says. Functions block; they are for threads.
"""

import errno
import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from whipstaff.server.errors import StorageFull, WrongSetup

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # a disk, a quota or a limit of this process
Stamp = tuple[int, ...]  # changes whenever what it was taken of does


class BadStore(WrongSetup):
    """A folder that is no registry, or one that was damaged."""


class Manifest(BaseModel):
    """Everything the registry holds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    vectors: dict[str, str] = {}  # name -> digest
    presets: dict[str, dict[str, Any]] = {}


class RegistryFolder:
    """One registry folder."""

    def __init__(self, folder: Path) -> None:
        """Makes the folder if there is none. Raises: BadStore."""
        self._folder, self._objects = folder, folder / "objects"
        try:
            self._objects.mkdir(parents=True, exist_ok=True)
            with self.locked():
                if not self._manifest.exists():
                    self.commit(Manifest())
                self.sweep()
        except OSError as error:
            raise BadStore(f"--registry {folder}: {error}") from error

    @property
    def _manifest(self) -> Path:
        return self._folder / "manifest.json"

    @property
    def fits(self) -> Path:
        """A folder for jobs that make vectors."""
        return self._folder / "fits"

    def stamp(self) -> Stamp:
        """Of the manifest, by one look at the file system."""
        return stamp_of(self._manifest)

    def read(self) -> Manifest:
        """Raises: BadStore."""
        try:
            return Manifest.model_validate_json(self._manifest.read_bytes())
        except (OSError, ValidationError) as error:
            raise BadStore(f"{self._manifest} cannot be read: {error}") from error

    def path_of(self, digest: str) -> Path:
        """Where the file of that digest is."""
        return self._objects / f"{digest}.safetensors"

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until nobody else writes, in this process or another."""
        lock = self.lock()
        try:
            yield
        finally:
            lock.close()

    def lock(self) -> BinaryIO:
        """The same, until the file is closed."""
        file = (self._folder / "lock").open("wb")
        fcntl.flock(file, fcntl.LOCK_EX)
        return file

    def put(self, data: bytes) -> Path:
        """Keep a file's bytes under their digest; a commit makes them part of the registry, a sweep throws them out."""
        path = self.path_of(hashlib.sha256(data).hexdigest())
        if not path.exists():
            write_whole(path, data, self._objects)
        return path

    def commit(self, manifest: Manifest) -> None:
        """Make this the registry. By someone who has the lock."""
        write_whole(self._manifest, manifest.model_dump_json(indent=1).encode(), self._objects)

    def sweep(self) -> None:
        """Remove the files that the manifest does not name, and halves of files. By someone who has the lock."""
        wanted = {self.path_of(digest) for digest in self.read().vectors.values()}
        for path in self._objects.iterdir():
            if path not in wanted:
                path.unlink()

    @contextmanager
    def spool(self) -> Iterator[BinaryIO]:
        """A file without a name, gone at the end or when this process dies. Raises: StorageFull."""
        with telling_full(), tempfile.TemporaryFile(dir=self._folder) as file:
            yield file


@contextmanager
def telling_full() -> Iterator[None]:
    """Raises: StorageFull where what is written in here finds no room."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise StorageFull("there is no room left where the registry is kept; nothing was changed") from error


def stamp_of(path: Path) -> Stamp:
    """Of one file; empty if there is none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return ()
    return found.st_ino, found.st_mtime_ns, found.st_size


def write_whole(path: Path, data: bytes, beside: Path) -> None:
    """All of it, on the disk, or nothing: half of it may be left in the folder `beside` when the machine stops."""
    handle, temporary = tempfile.mkstemp(prefix=".", dir=beside)
    try:
        with open(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
