"""The CUDA operators, built by g++ for CPU tensors (cuda_ext/csrc/cuda_on_cpu.h), in place of the CPU operators."""

import fcntl
import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from whipstaff import cuda_ext
from whipstaff.cuda_ext.libraries import OPERATORS

ROOT = Path(__file__).parents[2]
CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)


def built() -> Path:
    """The library of these sources, compiled where there is none yet: by one process, while others wait."""
    script = ROOT / "cuda_ext" / "compile.sh"
    sources = [script, *sorted(script.parent.glob("csrc/*"))]
    digest = hashlib.sha256(torch.__version__.encode() + b"".join(path.read_bytes() for path in sources)).hexdigest()
    folder = ROOT / "build" / "cuda_on_cpu"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{digest[:16]}.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            command = ["sh", str(script), "cuda_on_cpu", f"{library}.part", "-O2"]
            subprocess.run(command, env=os.environ | {"PYTHON": sys.executable}, check=True)
            os.rename(f"{library}.part", library)
    return library


@cache
def load() -> None:
    """What this registers for CUDA devices is not what a GPU's own library did: one process has one of the two."""
    if torch.version.cuda is not None:
        pytest.skip("has a CUDA library of its own")
    chosen = os.environ.get("WHIPSTAFF_CUDA_ON_CPU")  # such as a build with sanitizers
    torch.ops.load_library(chosen or built())  # type: ignore[no-untyped-call]


@contextmanager
def instead() -> Iterator[None]:
    """As long as this lasts, the functions of cuda_ext call what is registered for CUDA, with the tensors they get."""
    load()
    with pytest.MonkeyPatch.context() as patch:
        for operator in OPERATORS:
            name = operator.name.removeprefix("whipstaff::")
            run: Callable[..., object] = getattr(torch.ops.whipstaff, name).default.redispatch
            patch.setattr(cuda_ext, f"_{name}", partial(run, CUDA))
        yield
