"""A program, `python -I unpickle.py FILE`: opens one pickle with little trust and writes its arrays as safetensors.

A bare pickle, a .npy file of objects, or a torch file, of the zip format or before it. It knows numpy's arrays, torch's
tensors and plain containers, may use little memory and time, and writes no file.
"""

import collections
import io
import json
import pickle
import resource
import sys
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

MAX_BYTES = 1 << 28
SECONDS = 60
SEPARATOR = "\x1f"  # between the keys of a path
_BEFORE_ZIP = 0x1950A86A20F9469CFC6C  # how torch files began before 1.6
_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def main(path: str) -> None:
    """The process: limits first, then the file. What came of it goes to stdout."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        sys.exit(f"the pickle has more than {MAX_BYTES} bytes")
    try:
        content = _opened(data)
    except Exception as error:
        sys.exit(" ".join(f"{type(error).__name__}: {error}".split())[:2000])
    if isinstance(content, np.ndarray) and content.dtype == object and content.size == 1:
        content = content.item()
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    _flatten(content, "", tensors, said)
    sys.stdout.buffer.write(save(tensors, metadata={"said": json.dumps(said)}))


def _opened(data: bytes) -> Any:
    """What the file's bytes hold."""
    file = io.BytesIO(data)
    if data[:4] == b"PK\3\4":
        return _of_zip(file)
    if data[:6] == b"\x93NUMPY":  # the header, then the pickle
        form: Any = np.lib.format
        getattr(form, f"read_array_header_{form.read_magic(file)[0]}_0")(file)
    content = _Restricted(file).load()
    if isinstance(content, int) and content == _BEFORE_ZIP:  # several pickles, and the numbers behind them
        return torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    return content


def _of_zip(file: io.BytesIO) -> Any:
    """A torch file: data.pkl, and the numbers that it names in files of their own."""
    with zipfile.ZipFile(file) as archive:
        if sum(info.file_size for info in archive.infolist()) > 2 * MAX_BYTES:
            raise ValueError(f"the archive unpacks to more than {2 * MAX_BYTES} bytes")
        (name,) = [name for name in archive.namelist() if name.endswith("data.pkl")]
        folder = name.removesuffix("data.pkl")
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in archive.namelist() else b""
        if order.strip() not in (b"", sys.byteorder.encode()):
            raise ValueError(f"the torch file's numbers are {order.decode()}-endian")
        kept: dict[str, Any] = {}

        def numbers(pid: Any) -> Any:
            kind, dtype, key, _, size = pid
            if kind != "storage" or not isinstance(dtype, _Dtype):
                raise pickle.UnpicklingError("the pickle asks for something outside it that is no torch storage")
            if key not in kept:
                kept[key] = _storage_of(archive.read(f"{folder}data/{key}"), dtype.dtype, size)
            return kept[key]

        return _Restricted(io.BytesIO(archive.read(name)), numbers).load()


class _Dtype:
    """Where a pickle names a class of storages: what their numbers are."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


class _Restricted(pickle.Unpickler):
    """Names that make arrays, tensors and dicts; every other is refused, whatever it is."""

    def __init__(self, file: io.BytesIO, numbers: Callable[[Any], Any] | None = None) -> None:
        super().__init__(file)
        self._numbers = numbers

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
        if module in ("numpy.core.numeric", "numpy._core.numeric") and name == "_frombuffer":
            return getattr(np._core.numeric, name)  # type: ignore[attr-defined]
        if module == "torch" and name in _STORAGES:
            return _Dtype(_STORAGES[name])
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("_codecs", "encode"): _encoded,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch", "Size"): torch.Size,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch.storage", "_load_from_bytes"): _storage,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is refused")
        return known[module, name]

    def persistent_load(self, pid: Any) -> Any:
        if self._numbers is None:
            raise pickle.UnpicklingError("the pickle asks for something outside it, and there is nothing beside it")
        return self._numbers(pid)


def _encoded(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 write bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"bytes written as {encoding[:40]!r}")
    return text.encode("latin1")


def _parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _storage_of(data: bytes, dtype: torch.dtype, size: int) -> Any:
    """A typed storage of these bytes."""
    if len(data) != size * dtype.itemsize:
        raise ValueError(f"a storage of {size} {dtype} has {len(data)} bytes")
    untyped = torch.frombuffer(bytearray(data), dtype=torch.uint8).untyped_storage() if data else None
    return torch.TypedStorage(wrap_storage=untyped or torch.UntypedStorage(0), dtype=dtype, _internal=True)  # type: ignore[no-untyped-call]


def _flatten(value: Any, name: str, tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    """Arrays by their path of keys; strings and numbers apart."""
    if isinstance(value, Mapping):
        if SEPARATOR in "".join(map(str, value)) or len(set(map(str, value))) < len(value):
            sys.exit(f"two entries of {name or 'the pickle'} have one name, or one that no file should have")
        for key, inner in value.items():
            path = f"{name}{SEPARATOR}{key}" if name else str(key)
            _flatten(inner, path, tensors, said)
    elif isinstance(value, Tensor):
        tensors[name] = value.detach().clone().contiguous()
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.itemsize <= 8:
        native = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
        tensors[name] = torch.from_numpy(native)
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _flatten(inner, f"{name}{SEPARATOR}{index}" if name else str(index), tensors, said)
    elif isinstance(value, np.generic):
        _flatten(value.item(), name, tensors, said)
    elif value is None or isinstance(value, str | bool | int | float):
        said[name] = value
    elif value is not None:
        said[name] = f"a {type(value).__name__}"


if __name__ == "__main__":
    main(sys.argv[1])
