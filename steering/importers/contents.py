"""What a single file holds, whichever of the usual containers it is: entries by name, or one tensor alone."""

import zipfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.source import (
    Source,
    as_tensor,
    is_object_array,
    names_of_npz,
    names_of_safetensors,
    read_npy,
    read_npz,
    read_safetensors,
)

ALONE = ""  # the name of what a file holds without a name
_TORCH = (".pt", ".pth", ".bin")


def names(source: Source) -> list[str]:
    """The names of a file's entries; none of folders and of files of other kinds. Reads no tensor."""
    if source.is_folder:
        return []
    if source.held is not None or source.name.endswith(_TORCH):
        return list(_named(source.torch(source.name)))
    if source.name.endswith(".safetensors"):
        return names_of_safetensors(source.file(source.name))
    if source.name.endswith(".npz") and zipfile.is_zipfile(source.path):
        return names_of_npz(source.file(source.name))
    return [ALONE] if source.name.endswith(".npy") and not is_object_array(source.path) else []


def entry(source: Source, name: str) -> Any:
    """One of `names`, as it is, or as a tensor."""
    if source.held is not None or source.name.endswith(_TORCH):
        return _named(source.torch(source.name))[name]
    if source.name.endswith(".safetensors"):
        return next(read_safetensors(source.file(source.name), name))[1]
    if source.name.endswith(".npz"):
        return next(read_npz(source.file(source.name), name))[1]
    return as_tensor(read_npy(source.file(source.name)))


def shape(source: Source, name: str) -> tuple[int, ...] | None:
    """Of one of `names`, None where it is no array of numbers."""
    if name == ALONE and source.held is None and source.name.endswith(".npy"):
        return tuple(read_npy(source.file(source.name)).shape)  # not copied: features may be large
    found = entry(source, name)
    return tuple(found.shape) if isinstance(found, Tensor) else None


def lone(source: Source) -> str | None:
    """The name of the file's only entry, if that is a tensor."""
    found = names(source)
    return found[0] if len(found) == 1 and shape(source, found[0]) is not None else None


def flat(name: str, tensor: object) -> Tensor:
    """[hidden], also where it is stored as [1, hidden], [1, 1, hidden] or [hidden, 1]."""
    if not isinstance(tensor, Tensor):
        raise SteeringError(f"{name or 'the file'} holds no bare tensor but a {type(tensor).__name__}")
    return tensor.flatten() if is_vector(tuple(tensor.shape)) else tensor


def is_vector(sizes: tuple[int, ...] | None) -> bool:
    """Whether all sizes but one are 1."""
    return bool(sizes) and sum(size != 1 for size in sizes or ()) <= 1


def described(source: Source) -> str:
    """What a file or folder holds, in a few words."""
    if source.is_folder:
        return f"a folder with {_listed(source.names)}" if source.names else "a folder without files"
    try:
        found = names(source)
        if found == [ALONE]:
            sizes = shape(source, ALONE)
            return f"one tensor {list(sizes)}" if sizes is not None else "no tensor"
        return f"entries {_listed(found)}" if found else "no tensors"
    except SteeringError as error:
        return str(error)


def _listed(names: list[str], most: int = 5) -> str:
    said = ", ".join(name[:64] for name in names[:most])
    return f"{said} and {len(names) - most} more" if len(names) > most else said


def _named(found: Any) -> Mapping[str, Any]:
    """By name; lists by place."""
    if isinstance(found, Mapping):
        by_name = {str(key): value for key, value in found.items()}
        if len(by_name) < len(found):
            raise SteeringError("two entries of the file have one name")
        return by_name
    if isinstance(found, list | tuple):
        return {str(index): value for index, value in enumerate(found)}
    return {ALONE: found}
