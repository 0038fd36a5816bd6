"""Reading foreign files: bounded, and nothing in them is executed.

A `Source` is the file or folder that a user named. Names inside it are matched against its own listing, so that no file
can point elsewhere. Torch files are loaded with weights_only and mapped, safetensors by their library, arrays of numpy
without pickle. Whatever is wrong is a SteeringError. All that is read with names comes as a `Ledger`, so that `settle`
can say what nobody asked for.
"""

import hashlib
import io
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.ledger import Ledger, settle
from whipstaff.steering.importers.sight import check_sight, first_line, refused_pickle
from whipstaff.steering.vector_file import MAX_BYTES

MAX_JSON = 16 << 20  # bytes of any description of a file, which Python takes apart
MAX_FILES = 4096  # of a folder
MAX_TENSORS = 1 << 16  # named in one file
WEIGHTS = ("*.weight", "*.bias", "*.inv_freq", "*.masked_bias")
"""The names of a model's own numbers, beside which some checkpoints keep an edit."""
L = TypeVar("L", bound=Ledger)
_FORMAT: Any = np.lib.format  # not annotated
_BELOW = ("checkpoints/final.safetensors",)  # Llama Scope's
_CHECKPOINTS = (".safetensors", ".bin", ".pt", ".pth")
_LABELS = (
    "format",
    "name",
    "description",
    "author",
    "licen?e",
    "url",
    "tags",
    "created*",
    "date",
    "*version",
    "total_size",
)
"""What a safetensors file's metadata say that is about the file, not about its numbers."""


class Source:
    """A file or a folder. `file` and `names` answer for both: a file is the only name of itself."""

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise SteeringError(f"{path}: no such file or folder")
        if not path.is_dir() and not path.is_file():
            raise SteeringError(f"{path} is neither a file nor a folder")
        if path.is_file():
            check_sight(path)
        self.path = path
        self._contents: dict[str, Any] = {}
        self._held: Any = None
        self._ledgers: list[Ledger] = []
        self._read: set[str] = set()

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_folder(self) -> bool:
        return self.path.is_dir()

    @cached_property
    def names(self) -> list[str]:
        """The names of the folder's files, of those in folders in it only the known ones; or the file's own."""
        if not self.is_folder:
            return [self.name]
        found = sorted(each.name for each in self.path.iterdir() if each.is_file())
        found += [name for name in _BELOW if (self.path / name).is_file()]
        if len(found) > MAX_FILES:
            raise SteeringError(f"{self.name} has {len(found)} files; at most {MAX_FILES} are looked at")
        return found

    def file(self, name: str) -> Path:
        """One of `names`."""
        if name not in self.names:
            raise SteeringError(f"{self.name} has no file {name!r}")
        if name not in self._read and self.is_folder:
            check_sight(self.path / name)
        self._read.add(name)
        return self.path / name if self.is_folder else self.path

    def json(self, name: str) -> Ledger:
        """The fields of a JSON file, read once."""
        if name not in self._contents:
            try:
                found = json.loads(_bytes(self.file(name), MAX_JSON), object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                raise SteeringError(f"{name} is not sound JSON: {error}") from error
            if not isinstance(found, dict):
                raise SteeringError(f"{name} holds no JSON object")
            self._contents[name] = self.account(Ledger(name, found))
        return cast(Ledger, self._contents[name])

    @property
    def is_held(self) -> bool:
        """Whether a process of its own has opened the file."""
        return self._held is not None

    def hold(self, content: Any) -> None:
        """From here on this is what the file holds."""
        self._held = content

    def again(self) -> "Source":
        """The same, of which nothing was used."""
        fresh = Source(self.path)
        if self.is_held:
            fresh._held = self._held
            fresh.file(self.name)
        return fresh

    def torch(self, name: str) -> Any:
        """What a torch file holds, read once; a ledger if it is a dict."""
        if name not in self._contents:
            found = self._held if self.is_held else read_torch(self.file(name))
            self._contents[name] = self.account(Ledger(name, found)) if isinstance(found, Mapping) else found
        return self._contents[name]

    def named(self, name: str) -> Ledger:
        """The tensors of a checkpoint file: safetensors, torch's, or an archive of numpy's."""
        if name.endswith(".safetensors"):
            return self._safetensors(name)
        found = self.arrays(name) if name.endswith(".npz") else self.torch(name)
        if not isinstance(found, Ledger) or not all(isinstance(key, str) for key in found):
            raise SteeringError(f"{name} holds no named tensors")
        return found

    def arrays(self, name: str) -> Ledger:
        """The arrays of an archive of numpy's, whatever it is called."""
        if name not in self._contents:
            self._contents[name] = self.account(Ledger(name, dict(read_npz(self.file(name)))))
        return cast(Ledger, self._contents[name])

    def tensors(self, name: str, form: re.Pattern[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a checkpoint file, one at a time: those with names of that form, which are used by that."""
        found = self.named(name)
        for key in found:
            if (form is None or form.fullmatch(key)) and isinstance(value := found[key], Tensor):
                yield key, value

    def account(self, ledger: L) -> L:
        """Let `settle` ask for it."""
        self._ledgers.append(ledger)
        return ledger

    def settle(self, ignored: str | None = None) -> list[str]:
        """See `ledger.settle`: all that was read has been used, is harmless, or is ignored by a user's own word."""
        return settle(self._ledgers, ignored)

    def _safetensors(self, name: str) -> Ledger:
        if name not in self._contents:
            found = Safetensors(self.file(name))
            self.account(Ledger(f"the metadata of {name}", found.metadata)).harmless(*_LABELS)
            self._contents[name] = self.account(Ledger(name, found))
        return cast(Ledger, self._contents[name])

    def checkpoints(self) -> list[str]:
        """The names of files with weights, safetensors only where there are both."""
        own = [name for name in self.names if name not in _BELOW]
        kinds = [[name for name in own if name.endswith(suffix)] for suffix in _CHECKPOINTS]
        return next((names for names in kinds if names), [])

    @property
    def digest(self) -> str:
        """sha256 of the files that were read; of their names and sizes where they are too large to be vectors."""
        digest = hashlib.sha256()
        for name in sorted(self._read):
            path = self.file(name)
            size = path.stat().st_size
            digest.update(f"{name if self.is_folder else ''}\0{size}\0".encode(errors="surrogateescape"))
            if size <= MAX_BYTES:
                with path.open("rb") as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of two fields of one name nobody says which is meant."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice[:64]!r} is there twice")
    return found


def read_torch(path: Path) -> Any:
    """A torch file with tensors, dicts and lists only; the tensors are the mapped file.

    Mapped, a tensor that claims more than its storage holds is refused instead of grown.
    """
    _check_torch(path)
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    except Exception as error:  # torch's reader fails on bad bytes in any way it likes
        raise SteeringError(refused_pickle(path.name, error)) from error


class Safetensors(Mapping[str, Tensor]):
    """The tensors of a safetensors file, each read when it is asked for, and the metadata. Raises: SteeringError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with _opened(path) as file:
            self.names: dict[str, None] = dict.fromkeys(file.keys())
            self.metadata: dict[str, str] = file.metadata() or {}
        if len(self.names) > MAX_TENSORS:
            raise SteeringError(f"{path.name} names {len(self.names)} tensors")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        with _opened(self.path) as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def __contains__(self, name: object) -> bool:
        return name in self.names


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError) as error:
        if isinstance(error, SteeringError):
            raise
        raise SteeringError(f"{path.name} is not a sound safetensors file: {first_line(error)}") from error


def read_npy(path: Path) -> np.ndarray[Any, Any]:
    """An array of numbers, mapped. Raises: SteeringError, also for arrays of objects, which are pickles."""
    size = path.stat().st_size
    with path.open("rb") as file:
        shape, dtype, fortran = _npy_header(file, path.name)
        offset = file.tell()
    _check_length(path.name, shape, dtype, size - offset)
    if 0 in shape:
        raise SteeringError(f"{path.name} is an empty array")
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def read_npz(path: Path) -> Iterator[tuple[str, Tensor]]:
    """The arrays of an archive, one at a time."""
    for info in _check_zip(path, "npz archive", are_stored=False):
        name = info.filename.removesuffix(".npy")
        try:
            with zipfile.ZipFile(path) as archive, archive.open(info) as member:
                data = member.read(info.file_size + 1)
        except Exception as error:  # zipfile fails on bad bytes in many ways
            raise SteeringError(f"{path.name}: member {name!r} is damaged: {first_line(error)}") from error
        file = io.BytesIO(data)
        shape, dtype, fortran = _npy_header(file, f"{path.name}: {name}")
        _check_length(f"{path.name}: {name}", shape, dtype, len(data) - file.tell())
        array = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
        yield name, as_tensor(array)


def as_tensor(array: np.ndarray[Any, Any]) -> Tensor:
    """A copy in the machine's byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def numbers(name: str, tensor: object, *shape: int | None) -> Tensor:
    """`tensor` as float32 of that shape, None for any size. Raises: SteeringError."""
    if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        raise SteeringError(f"{name} is no plain tensor")
    if not tensor.dtype.is_floating_point:
        raise SteeringError(f"{name} has dtype {tensor.dtype}, wanted a floating-point one")
    if tensor.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, tensor.shape, strict=True)):
        wanted = ", ".join("any" if want is None else str(want) for want in shape)
        raise SteeringError(f"{name} has shape {list(tensor.shape)}, wanted [{wanted}]")
    if tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():  # strides of 0 make little files large
        raise SteeringError(f"{name} has {tensor.numel()} numbers and stores fewer; save it contiguous")
    if tensor.numel() * 4 > MAX_BYTES:
        raise SteeringError(f"{name} has {tensor.numel()} numbers; a vector file has at most {MAX_BYTES} bytes")
    return tensor.detach().to(torch.float32, copy=True, memory_format=torch.contiguous_format)


def is_object_array(path: Path) -> bool:
    """Whether a .npy file is a pickle of Python objects."""
    try:
        with path.open("rb") as file:
            version = _FORMAT.read_magic(file)
            return bool(_header_of(file, version)[2].hasobject)
    except Exception:  # see `_npy_header`
        return False


def _npy_header(file: Any, name: str) -> tuple[tuple[int, ...], np.dtype[Any], bool]:
    try:
        shape, fortran, dtype = _header_of(file, _FORMAT.read_magic(file))
    except Exception as error:  # numpy parses the header as a Python literal
        raise SteeringError(f"{name} is not a sound .npy array: {first_line(error)}") from error
    if dtype.hasobject:
        raise SteeringError(f"{name} is a pickle, which can run code when it is read; convert it offline")
    if dtype.kind not in "fiub" or dtype.itemsize > 8 or dtype.shape:
        raise SteeringError(f"{name} has dtype {dtype}, wanted numbers of at most 64 bits")
    if len(shape) > 8 or any(size < 0 for size in shape):
        raise SteeringError(f"{name} has shape {list(shape)}")
    return shape, dtype, fortran


def _header_of(file: Any, version: tuple[int, int]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format")
    shape, fortran, dtype = getattr(_FORMAT, f"read_array_header_{version[0]}_0")(file)
    return shape, fortran, dtype


def _check_length(name: str, shape: tuple[int, ...], dtype: np.dtype[Any], num_bytes: int) -> None:
    wanted = dtype.itemsize
    for size in shape:
        wanted *= size
    if wanted != num_bytes:
        raise SteeringError(f"{name} says {list(shape)} of {dtype}, {wanted} bytes, and has {num_bytes}")


def _check_torch(path: Path) -> None:
    """A file of torch's zip format, and no other."""
    with path.open("rb") as file:
        start = file.read(2)
    if start[:1] == b"\x80":
        raise SteeringError(
            f"{path.name} is no torch file in the zip format: it is a bare pickle, or torch's format before 1.6; "
            "convert it offline with --unsafe-pickle, or load and save it again with a newer torch"
        )
    _check_zip(path, "torch file in the zip format (it may be cut off, or be something else under that name)")


def _check_zip(path: Path, what: str, are_stored: bool = True) -> list[zipfile.ZipInfo]:
    """The members of an archive that does not blow up."""
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except Exception as error:  # see above
        raise SteeringError(f"{path.name} is no {what}: {first_line(error)}") from error
    if len(members) > MAX_TENSORS:
        raise SteeringError(f"{path.name} has {len(members)} members")
    if are_stored and any(each.compress_type != zipfile.ZIP_STORED for each in members):
        raise SteeringError(f"{path.name} is a compressed archive; torch writes none")
    if are_stored and any(each.filename.endswith(".pkl") and each.file_size > MAX_JSON for each in members):
        raise SteeringError(f"{path.name} describes its tensors in more than {MAX_JSON} bytes")
    if not are_stored and sum(each.file_size for each in members) > MAX_BYTES:
        raise SteeringError(f"{path.name} unpacks to more than {MAX_BYTES} bytes")
    return members


def _bytes(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        raise SteeringError(f"{path.name} has more than {most} bytes")
    return data
