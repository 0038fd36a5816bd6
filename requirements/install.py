"""Make the environment: say what the machine lacks, then install the locks and this checkout.

    python3 requirements/install.py            # .venv, ready for .venv/bin/whipstaff serve
    python3 requirements/install.py --dev      # what the tests need, too

Any Python from 3.6 starts this file; it needs nothing but the standard library. Every file that is installed is
checked against the locks' hashes. torch's CPU wheel is not on PyPI: pip's own settings are asked first and then
TORCH_INDEX, which is asked for nothing but torch.
"""

import argparse
import ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13")  # whose wheels the locks hold
TORCH_INDEX = os.environ.get("WHIPSTAFF_TORCH_INDEX") or "https://download.pytorch.org/whl/cpu"
GLIBC = (2, 28)  # of the manylinux tag of vLLM's and torch's wheels
HERE = ".".join(platform.python_version_tuple()[:2])
# What compiles this compiles the kernels (GCC 10 takes -std=c++20 and stays short of it) and what torch.compile writes.
PROBE = """
#include <bit>
#include <omp.h>
static_assert(__cplusplus >= 202002L);
unsigned bits(float x) { return std::bit_cast<unsigned>(x) + omp_get_max_threads(); }
"""


class Lacking(Exception):
    """Something that has to be there first; the message names it and says how to get it."""


def version(python: str) -> str:
    """The version ("3.11") of the interpreter that this command starts, "" where it does not start."""
    program = "import platform; print('.'.join(platform.python_version_tuple()[:2]))"
    try:
        return subprocess.check_output([python, "-c", program], stderr=subprocess.DEVNULL).decode().strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def call(command: "list[str]", failure: str, **variables: str) -> None:
    """Runs a command that speaks for itself; its failure is Lacking with that message."""
    if subprocess.call(command, env=dict(os.environ, **variables)):
        raise Lacking(failure)


def go_on_with_a_supported_python() -> None:
    """Replaces this process by the same command under one of PYTHONS, unless it is that already."""
    if HERE in PYTHONS:
        return
    for name in ("python" + each for each in PYTHONS):
        if version(name) in PYTHONS:
            print(f"this is Python {HERE}; going on with {name}", flush=True)
            os.execvp(name, [name, *sys.argv])
    raise Lacking(
        f"Python {' or '.join(PYTHONS)} is needed and this is {HERE}: install python3.11 and python3.11-venv (Debian, "
        "Ubuntu), python3.12 (Fedora, RHEL) or `conda create -n whipstaff python=3.11`; where it is not on PATH, "
        "run this file with it, or `make PYTHON=/path/to/python3.11`"
    )


def machine() -> "str | None":
    """What the locked wheels want of the machine."""
    name, release = platform.libc_ver()
    here = f"{platform.system()} {platform.machine()} {name} {release}"
    glibc = name == "glibc" and tuple(map(int, release.split(".")[:2])) >= GLIBC
    if platform.system() != "Linux" or platform.machine() != "x86_64" or not glibc:
        return f"the CPU wheels of vLLM run on Linux x86_64 with glibc 2.28 or newer, and this is {here.strip()}"
    if "avx2" not in Path("/proc/cpuinfo").read_text().split():
        return "the CPU wheels of vLLM need a processor with AVX2, and /proc/cpuinfo names none"
    return None


def virtual_environments() -> "str | None":
    if importlib.util.find_spec("ensurepip") and importlib.util.find_spec("venv"):
        return None
    return f"Python's module venv is missing: install python{HERE}-venv (Debian, Ubuntu)"


def numa() -> "str | None":
    """vLLM's CPU library is linked against it and does not bring it."""
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        return "libnuma.so.1 is missing: install libnuma1 (Debian, Ubuntu) or numactl-libs (Fedora, RHEL)"
    return None


def python_headers() -> "str | None":
    """The kernels do without them; what torch.compile writes when the server starts does not."""
    header = Path(sysconfig.get_path("include"), "Python.h")
    if header.exists():
        return None
    return f"{header} is missing: install python{HERE}-dev (Debian, Ubuntu) or python{HERE}-devel (Fedora, RHEL)"


def compiler() -> "str | None":
    """It is needed twice: for the kernels, and by torch.compile when the server starts. Both take CXX, or else g++."""
    name = os.environ.get("CXX", "g++")
    get = "install g++ (Debian, Ubuntu), gcc-c++ (Fedora, RHEL) or gxx (conda), or name another compiler in CXX"
    if not shutil.which(name):
        return f"there is no C++ compiler {name!r}: {get}"
    command = [name, "-std=c++20", "-fopenmp", "-fsyntax-only", "-x", "c++", "-"]
    done = subprocess.run(command, input=PROBE.encode(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if not done.returncode:
        return None
    return f"{name} does not compile C++20 with OpenMP, as GCC does from 11 on: {get}. It said:\n{done.stdout.decode()}"


def check(compiles: bool = True) -> None:
    """Raises Lacking with a line for everything that is missing; who `compiles` nothing needs no compiler."""
    looks = (machine, virtual_environments, *((compiler, python_headers) if compiles else ()), numa)
    missing = [look() for look in looks]
    if any(missing):
        raise Lacking("\n".join(line for line in missing if line))


def environment(folder: Path) -> str:
    """The interpreter of the virtual environment in that folder, which is made where there is none."""
    python = str(folder / "bin" / "python")
    if not os.path.lexists(python):
        call([sys.executable, "-m", "venv", str(folder)], f"Python {HERE} could not make {folder}")
    if version(python) not in PYTHONS:
        raise Lacking(f"{python} is Python {version(python) or 'no more'}: remove {folder} and try again")
    return python


def pip(python: str) -> "list[str]":
    """Without the question for a newer pip, which would go to torch's index too."""
    return [python, "-m", "pip", "--disable-pip-version-check"]


def elsewhere(mirror: str) -> str:
    """What a person can do where a download fails."""
    return (
        "behind a proxy set HTTPS_PROXY (and PIP_CERT where it has a certificate of its own), where a mirror is to be "
        f"asked set {mirror} to its address, and without a network set PIP_FIND_LINKS to a folder of wheels"
    )


def with_torch(python: str, *command: str) -> None:
    """A pip command that wants torch's CPU wheel: with pip's own settings and, where those have none, with TORCH_INDEX.

    A wheel with another hash ends the search: whoever serves it should be looked at, not passed over.
    """
    answers = []
    for place, options in (("pip's own settings", ()), (TORCH_INDEX, ("--index-url", TORCH_INDEX))):
        done = subprocess.run(
            [*pip(python), *command, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if not done.returncode:
            return
        answers.append(f"{place}:\n{done.stdout}")
        if "DO NOT MATCH THE HASHES" in done.stdout:
            raise Lacking(
                f"the torch wheel is not the one that the lock pins, and was not installed. With {answers[-1]}"
            )
    raise Lacking(
        "\n".join(answers)
        + f"torch's CPU wheel was found neither with pip's own settings nor on {TORCH_INDEX}: "
        + elsewhere("WHIPSTAFF_TORCH_INDEX")
    )


def install_torch(python: str) -> None:
    """The line of torch in cpu.lock, alone: no other package may come from its index."""
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines(True)
    with tempfile.NamedTemporaryFile("w", suffix=".lock") as alone:
        alone.writelines(line for line in lines if line.startswith("torch=="))
        alone.flush()
        with_torch(python, "install", "--quiet", "--no-deps", "--require-hashes", "-r", alone.name)


def install_lock(python: str, name: str) -> None:
    """The lock is complete, hence --no-deps. torch is there already, and pip leaves it alone."""
    lock = str(ROOT / "requirements" / name)
    command = [*pip(python), "install", "--quiet", "--no-deps", "--require-hashes", "-r", lock]
    call(command, f"pip could not install {lock} (its words stand above): " + elsewhere("PIP_INDEX_URL"))


def install_whipstaff(python: str, *what: str) -> None:
    """No CUDA library: a CPU environment loads none. torch would build with c++; this builds with what was checked."""
    command = [*pip(python), "install", "--quiet", "--no-deps", *what]
    variables = {"WHIPSTAFF_BUILD_CUDA": "0", "CXX": os.environ.get("CXX", "g++")}
    call(command, f"pip could not install {what[-1]} (its words stand above)", **variables)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--venv", type=Path, default=ROOT / ".venv", help="the virtual environment (default: .venv here)"
    )
    parser.add_argument("--dev", action="store_true", help="install what the tests need, too")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--wheel", help="install this wheel of Whipstaff instead of the checkout")
    what.add_argument("--packages-only", action="store_true", help="leave Whipstaff itself out")
    run(parser.parse_args())


def run(arguments: argparse.Namespace) -> None:
    go_on_with_a_supported_python()
    check(compiles=not arguments.wheel)  # a model can be served without torch.compile: --enforce-eager
    python = environment(arguments.venv)
    print(f"installing about 500 MB into {arguments.venv}; what is there already is kept", flush=True)
    install_torch(python)
    install_lock(python, "cpu.lock")
    if arguments.dev:
        install_lock(python, "dev.lock")
    if arguments.wheel:
        install_whipstaff(python, arguments.wheel)
    elif not arguments.packages_only:
        install_whipstaff(python, "--no-build-isolation", "-e", str(ROOT))


if __name__ == "__main__":
    try:
        main()
    except Lacking as lacking:
        sys.exit(f"{Path(__file__).name}: {lacking}")
