"""Which code runs behind the operators is decided once, aloud."""

import os
import subprocess
import sys

import pytest
import torch
import warm

from whipstaff import cuda_ext
from whipstaff.cuda_ext import libraries


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    done = warm.run([sys.executable, "-c", program], env=os.environ | environment, cwd="/")
    return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_the_compiled_libraries_run_by_default() -> None:
    built_for = "cpu" if torch.version.cuda is None else "cpu+cuda"
    assert built_for == cuda_ext.IMPLEMENTATION


def test_the_reference_runs_when_named() -> None:
    done = run_python(
        "import torch; from whipstaff import cuda_ext; x = torch.ones(1, 4);"
        "cuda_ext.put_rows_(x, 2 * x, torch.tensor([0]).int()); print(cuda_ext.IMPLEMENTATION, x.tolist())",
        WHIPSTAFF_CUDA_EXT="reference",
    )
    assert done.stdout.split(maxsplit=1) == ["reference", "[[2.0, 2.0, 2.0, 2.0]]\n"], done.stderr


def test_an_unknown_implementation_is_refused() -> None:
    done = run_python("import whipstaff.cuda_ext", WHIPSTAFF_CUDA_EXT="fast")
    assert "'fast'; it must be 'compiled' (the default) or 'reference'" in done.stderr


def test_a_missing_library_says_how_to_build_it() -> None:
    with pytest.raises(libraries.LibraryMissing, match=r"_absent is not built in .*: run `pip install"):
        libraries._load_library("_absent")
