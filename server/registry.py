"""The vectors a server has: names to verified files, read once at start-up."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from whipstaff.server.errors import NotFound, VectorUnfit
from whipstaff.steering.artifacts import ModelShape, Vector, read
from whipstaff.steering.errors import SteeringError


class BadVectorFile(RuntimeError):
    """A file given at start-up that is not a sound vector; the server does not start with it."""


@dataclass(frozen=True)
class Entry:
    """One vector by name. `problem` says why it cannot be used on the served model; None when it can."""

    name: str
    path: Path
    vector: Vector
    problem: str | None


class Registry:
    """Vectors by name. The name of a vector is its file's name without the ending."""

    def __init__(self, paths: Iterable[Path], model: ModelShape) -> None:
        """Read every vector under `paths`, each a file or a folder of `.safetensors` files.

        Raises: BadVectorFile, naming the file and what is wrong with it.
        """
        self._entries: dict[str, Entry] = {}
        for path in _files(paths):
            name = path.name.removesuffix(".safetensors")
            if name in self._entries:
                raise BadVectorFile(f"two vectors are called {name!r}: {self._entries[name].path} and {path}")
            self._entries[name] = _load(name, path, model)

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


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        if path.is_dir():
            yield from sorted(path.glob("*.safetensors"))
        elif path.is_file():
            yield path
        else:
            raise BadVectorFile(f"{path}: no such file or folder")


def _load(name: str, path: Path, model: ModelShape) -> Entry:
    try:
        vector = read(path)
    except SteeringError as error:
        raise BadVectorFile(f"{path}: {error}") from error
    try:
        vector.check_fits(model)
    except SteeringError as error:
        return Entry(name, path, vector, str(error))
    return Entry(name, path, vector, None)
