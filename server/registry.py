"""The vectors a server has: names to verified files, read once at start-up."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from whipstaff.server.errors import NotFound, VectorUnfit
from whipstaff.steering.artifacts import Vector, read, without_file
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.shape import ModelShape


class BadVectorFile(RuntimeError):
    """A file given at start-up that is not a sound vector; the server does not start with it."""


class VectorFile(NamedTuple):
    """A sound vector file."""

    path: Path
    vector: Vector


@dataclass(frozen=True)
class Entry:
    """One vector by name. `problem` says why it cannot be used on the served model; None when it can."""

    name: str
    path: Path
    vector: Vector
    problem: str | None


class Registry:
    """Vectors by name."""

    def __init__(self, files: Mapping[str, VectorFile], model: ModelShape) -> None:
        """What was read, as it is on the served model."""
        self.model = model
        self.without_file = without_file(model)
        self._entries = {name: _entry(name, file, model) for name, file in files.items()}

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    @property
    def names(self) -> list[str]:
        """Of the vectors that fit the served model."""
        return [entry.name for entry in self if entry.problem is None]

    def entry(self, name: str, param: str | None = None) -> Entry:
        """Raises: NotFound."""
        if name not in self._entries:
            have = ", ".join(map(repr, self._entries)) or "none; start the server with --vectors"
            raise NotFound(f"there is no vector {name!r}; this server has: {have}", param)
        return self._entries[name]

    def usable(self, name: str, param: str) -> Vector:
        """Raises: NotFound, or VectorUnfit with both models' shapes."""
        entry = self.entry(name, param)
        if entry.problem is not None:
            raise VectorUnfit(f"vector {name!r} does not fit: {entry.problem}", param)
        return entry.vector


def read_vectors(paths: Iterable[Path]) -> dict[str, VectorFile]:
    """Read every vector under `paths`, each a file or a folder of `.safetensors` files, by name.

    The name of a vector is its file's name without the ending.

    Raises: BadVectorFile, naming the file and what is wrong with it.
    """
    found: dict[str, VectorFile] = {}
    for path in _files(paths):
        name = path.name.removesuffix(".safetensors")
        if name in found:
            raise BadVectorFile(f"two vectors are called {name!r}: {found[name].path} and {path}")
        try:
            found[name] = VectorFile(path, read(path))
        except SteeringError as error:
            raise BadVectorFile(f"{path}: {error}") from error
    return found


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(path.glob("*.safetensors"))
        elif path.is_file():
            yield path
        else:
            raise BadVectorFile(f"{path}: no such file or folder")


def _entry(name: str, file: VectorFile, model: ModelShape) -> Entry:
    try:
        file.vector.check_fits(model)
    except SteeringError as error:
        return Entry(name, file.path, file.vector, str(error))
    return Entry(name, file.path, file.vector, None)
