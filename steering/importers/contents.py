"""What a single file holds, whichever of the usual containers it is: entries by name, or one tensor alone."""

import zipfile
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.ledger import Ledger
from whipstaff.steering.importers.source import Source, as_tensor, is_object_array, read_npy

ALONE = ""  # the name of what a file holds without a name
_UNNAMED = "arr_0"  # what numpy.savez calls that
TORCH = (".pt", ".pth", ".bin")


def names(source: Source) -> list[str]:
    """The names of a file's entries; none of folders and of files of other kinds."""
    if source.is_folder or not (source.is_held or _has_names(source)):
        return [ALONE] if _is_array(source) else []
    found = _content(source)
    return list(_keys(found)) if isinstance(found, Ledger | list | tuple) else [ALONE]


def entry(source: Source, name: str) -> Any:
    """One of `names`, as it is, or as a tensor; it counts as used."""
    if not (source.is_held or _has_names(source)):
        return as_tensor(read_npy(source.file(source.name)))
    found = _content(source)
    return found[_keys(found)[name]] if isinstance(found, Ledger | list | tuple) else found


def keys_in(source: Source, name: str) -> list[str]:
    """Of one of `names`: its keys, none where it is no dict. It does not count as used."""
    content = _content(source)
    found = content.peek(_keys(content)[name]) if isinstance(content, Ledger) else None
    return [str(key) for key in found] if isinstance(found, Mapping) else []


def shape(source: Source, name: str) -> tuple[int, ...] | None:
    """Of one of `names`, None where it is no array of numbers."""
    if name == ALONE and _is_array(source):
        return tuple(read_npy(source.file(source.name)).shape)  # not copied: features may be large
    found = entry(source, name)
    return tuple(found.shape) if isinstance(found, Tensor) else None


def rest_is_harmless(source: Source, *patterns: str) -> None:
    """Of the file's other entries: they change no number (see `Ledger.harmless`)."""
    if isinstance(found := _content(source), Ledger):
        found.harmless(*patterns)


def lone(source: Source, *beside: str) -> str | None:
    """The name of the file's only entry, but for those called as in `beside`, if that is a tensor."""
    found = [name for name in names(source) if name not in beside]
    return found[0] if len(found) == 1 and shape(source, found[0]) is not None else None


def flat(name: str, tensor: object) -> Tensor:
    """[hidden], also where it is stored as [1, hidden], [1, 1, hidden] or [hidden, 1]."""
    if not isinstance(tensor, Tensor):
        raise SteeringError(f"{name or 'the file'} holds no bare tensor but a {kind_of(tensor)}")
    return tensor.flatten() if is_vector(tuple(tensor.shape)) else tensor


def kind_of(value: object) -> str:
    return "dict" if isinstance(value, Mapping) else type(value).__name__


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


def _has_names(source: Source) -> bool:
    """Whether the file is one of those whose entries have names."""
    is_npz = source.name.endswith(".npz") and zipfile.is_zipfile(source.path)
    return is_npz or source.name.endswith((*TORCH, ".safetensors"))


def _is_array(source: Source) -> bool:
    is_npy = not source.is_folder and source.name.endswith(".npy")
    return is_npy and not source.is_held and not is_object_array(source.path)


def _content(source: Source) -> Any:
    """A ledger, a list, or one object."""
    if not source.is_held and source.name.endswith((".safetensors", ".npz")):
        return source.named(source.name)
    return source.torch(source.name)


def _keys(found: Ledger | list[Any] | tuple[Any, ...]) -> dict[str, Any]:
    """Name -> what stands for it in the file."""
    keys = list(found) if isinstance(found, Ledger) else list(range(len(found)))
    by_name = {str(key): key for key in keys}
    if len(by_name) < len(keys):
        raise SteeringError("two entries of the file have one name")
    return by_name if by_name.keys() != {_UNNAMED} else {ALONE: _UNNAMED}
