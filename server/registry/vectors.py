"""The vectors a server has: names to verified files. One never changes; `library` replaces it by the next."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import NamedTuple

from whipstaff.server.errors import NotFound, VectorUnfit, WrongSetup
from whipstaff.server.registry.folder import RegistryFolder
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Vector, read, without_file

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")  # of what comes over HTTP
_MAX_LISTED, _MAX_NEAR = 20, 3  # names in a message: all of them, or the nearest


class BadVectorFile(WrongSetup):
    """A file given at start-up that is not a sound vector; the server does not start with it."""


class VectorFile(NamedTuple):
    """A sound vector file."""

    path: Path
    vector: Vector
    is_fixed: bool = True  # given at start-up, so that no request changes it
    problem: str | None = None  # why this server's workers cannot hold it


@dataclass(frozen=True)
class Entry:
    """One vector by name. `problem` says why it cannot be used on the served model; None when it can."""

    name: str
    path: Path
    vector: Vector
    problem: str | None
    is_fixed: bool


class VectorSnapshot:
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

    def only(self, names: Collection[str]) -> "VectorSnapshot":
        """As if there were no others."""
        found = copy(self)
        found._entries = {name: entry for name, entry in self._entries.items() if name in names}
        return found

    def entry(self, name: str, param: str | None = None) -> Entry:
        """Raises: NotFound."""
        if name not in self._entries:
            names = _listed(name, list(self._entries))
            raise NotFound(
                f"there is no vector {name!r}; this server has: {names}; start it with --vectors, or upload one", param
            )
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
    path, vector, is_fixed, problem = file
    return Entry(name, path, vector, misfit(vector, model) or problem, is_fixed)


def misfit(vector: Vector, model: ModelShape) -> str | None:
    """Why a vector does not fit a model, with both shapes; None if it does."""
    try:
        vector.check_fits(model)
    except SteeringError as error:
        return str(error)
    return None


def read_stored(store: RegistryFolder, taken: Mapping[str, VectorFile]) -> dict[str, VectorFile]:
    """Every vector of a registry folder, by name. Raises: BadVectorFile, BadStore."""
    found: dict[str, VectorFile] = {}
    for name, digest in store.read().vectors.items():
        path = store.path_of(digest)
        if name in taken:
            raise BadVectorFile(f"two vectors are called {name!r}: {taken[name].path}, and one of the registry")
        try:
            found[name] = VectorFile(path, read(path), is_fixed=False)
        except (SteeringError, OSError) as error:
            raise BadVectorFile(f"the registry's vector {name!r}, {path}: {error}") from error
        if found[name].vector.digest != digest:
            raise BadVectorFile(f"the registry's vector {name!r}, {path}: the file was changed")
    return found


def _listed(name: str, known: list[str]) -> str:
    """The names that there are; of more than a reader looks through, those most like one that there is not."""
    if len(known) <= _MAX_LISTED:
        return ", ".join(map(repr, known)) or "none"
    near = sorted(known, key=lambda other: -SequenceMatcher(None, name, other).ratio())[:_MAX_NEAR]
    return f"{', '.join(map(repr, near))} and {len(known) - len(near)} more"
