"""A program, `python -I unpickle.py FILE`: opens one pickle with little trust and writes its arrays as safetensors.

It knows numpy's arrays, torch's tensors and plain containers, may use little memory and time, and writes no file.
"""

import collections
import io
import json
import pickle
import resource
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

MAX_BYTES = 1 << 28
SECONDS = 60
SEPARATOR = "\x1f"  # between the keys of a path


def main(path: str) -> None:
    """The process: limits first, then the file. What came of it goes to stdout."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    resource.setrlimit(resource.RLIMIT_DATA, (8 << 30, 8 << 30))
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        sys.exit(f"the pickle has more than {MAX_BYTES} bytes")
    file_ = io.BytesIO(data)
    if data[:6] == b"\x93NUMPY":  # the header, then the pickle
        form: Any = np.lib.format
        getattr(form, f"read_array_header_{form.read_magic(file_)[0]}_0")(file_)
    try:
        content = _Restricted(file_).load()
    except Exception as error:
        sys.exit(f"{type(error).__name__}: {error}"[:500])
    if isinstance(content, np.ndarray) and content.dtype == object and content.size == 1:
        content = content.item()
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    _flatten(content, "", tensors, said)
    sys.stdout.buffer.write(save(tensors, metadata={"said": json.dumps(said)}))


class _Restricted(pickle.Unpickler):
    """Names that make arrays, tensors and dicts; every other is refused, whatever it is."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name in ("_reconstruct", "scalar"):
            return getattr(np._core.multiarray, name)  # type: ignore[attr-defined]
        known = {
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
            ("collections", "OrderedDict"): collections.OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
            ("torch.storage", "_load_from_bytes"): _storage,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is refused")
        return known[module, name]


def _storage(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def _flatten(value: Any, name: str, tensors: dict[str, Tensor], said: dict[str, Any]) -> None:
    """Arrays by their path of keys; strings and numbers apart."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            path = f"{name}{SEPARATOR}{key}" if name else str(key)
            _flatten(inner, path, tensors, said)
    elif isinstance(value, Tensor):
        tensors[name] = value.detach().clone().contiguous()
    elif isinstance(value, np.ndarray) and value.dtype.kind in "fiub" and value.dtype.itemsize <= 8:
        native = np.array(value, dtype=value.dtype.newbyteorder("="), order="C")
        tensors[name] = torch.from_numpy(native)
    elif isinstance(value, str | bool | int | float):
        said[name] = value
    elif value is not None:
        said[name] = f"a {type(value).__name__}"


if __name__ == "__main__":
    main(sys.argv[1])
