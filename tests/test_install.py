"""The first command on machines that are not this one: with pip's settings emptied, against indexes on loopback."""

import functools
import hashlib
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TORCH = "torch-2.13.0+cpu-py3-none-any.whl"


def write_wheel(folder: Path, name: str, version: str, content: str = "") -> Path:
    """A wheel with one module, in the folder of its project, as a PEP 503 index has it."""
    path = folder / name / f"{name}-{version}-py3-none-any.whl"
    path.parent.mkdir(parents=True, exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}.py", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return path


def line(wheel: Path) -> str:
    """The wheel's line in a lock."""
    name, version = wheel.name.split("-")[:2]
    return f"{name}=={version} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


class Index(NamedTuple):
    url: str
    asked: list[str]  # the paths of all requests


@contextmanager
def serve(folder: Path) -> Iterator[Index]:
    """The folder as an index: the listing of a project's folder is its page."""
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            asked.append(self.path)

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Index(f"http://127.0.0.1:{server.server_port}", asked)
        server.shutdown()
        thread.join()


def emptied(home: Path, **variables: str) -> dict[str, str]:
    """The environment of a machine on which nobody has set anything up for pip, and these variables."""
    kept = {name: os.environ[name] for name in ("PATH", "PYENV_VERSION") if name in os.environ}
    return kept | {"HOME": str(home), "PIP_CONFIG_FILE": "/dev/null", "NO_PROXY": "127.0.0.1"} | variables


class Machine(NamedTuple):
    """A checkout with two packages in its lock, torch and `beside`, and the two indexes of an ordinary machine."""

    checkout: Path
    pypi: Index
    pytorch: Index
    indexes: Path  # the folders `pypi` and `pytorch` that they serve

    def install(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        given = {"PIP_INDEX_URL": self.pypi.url, "WHIPSTAFF_TORCH_INDEX": self.pytorch.url} | variables
        command = [sys.executable, "requirements/install.py", *(arguments or ["--packages-only"])]
        environment = emptied(self.checkout.parent, **given)
        return subprocess.run(command, cwd=self.checkout, env=environment, capture_output=True, text=True)

    def installed(self) -> set[str]:
        """The top-level modules that the environment has, of those that the indexes have."""
        folder = self.checkout / ".venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        return {path.stem for path in folder.glob("*.py")} & {"torch", "beside", "tested", "whipstaff"}


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with nothing in it, to be copied: making one takes seconds."""
    folder = tmp_path_factory.mktemp("bare") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """PyPI has torch, but not the CPU wheel; PyTorch's index has more than torch."""
    indexes, requirements = tmp_path / "indexes", tmp_path / "checkout" / "requirements"
    requirements.mkdir(parents=True)
    shutil.copy(ROOT / "requirements" / "install.py", requirements)
    write_wheel(indexes / "pypi", "torch", "2.13.0")
    torch = write_wheel(indexes / "pytorch", "torch", "2.13.0+cpu")
    beside = write_wheel(indexes / "pypi", "beside", "1.0")
    write_wheel(indexes / "pytorch", "beside", "1.0", "# another build, as PyTorch's index has of numpy\n")
    (requirements / "cpu.lock").write_text(line(beside) + line(torch))
    (requirements / "dev.lock").write_text(line(write_wheel(indexes / "pypi", "tested", "1.0")))
    with serve(indexes / "pypi") as pypi, serve(indexes / "pytorch") as pytorch:
        yield Machine(tmp_path / "checkout", pypi, pytorch, indexes)


@pytest.fixture
def prepared(machine: Machine, bare: Path) -> Machine:
    shutil.copytree(bare, machine.checkout / ".venv", symlinks=True)
    return machine


def test_nothing_has_to_be_set_up(machine: Machine) -> None:
    """torch comes from PyTorch's index, and nothing else does."""
    wheel = write_wheel(machine.checkout, "whipstaff", "0.1")
    done = machine.install("--dev", "--wheel", str(wheel))
    assert not done.returncode, done.stdout + done.stderr
    assert machine.installed() == {"torch", "beside", "tested", "whipstaff"}
    assert machine.pytorch.asked and all(path.startswith("/torch/") for path in machine.pytorch.asked)


def test_pips_own_settings_come_first(prepared: Machine) -> None:
    done = prepared.install(PIP_FIND_LINKS=str(prepared.indexes / "pytorch" / "torch"))
    assert not done.returncode, done.stdout + done.stderr
    assert prepared.installed() == {"torch", "beside"} and prepared.pytorch.asked == []


def test_another_environment_may_be_named(machine: Machine, bare: Path) -> None:
    shutil.copytree(bare, machine.checkout / "other", symlinks=True)
    done = machine.install("--packages-only", "--venv", "other")
    assert not done.returncode, done.stdout + done.stderr
    assert (machine.checkout / "other").exists() and not (machine.checkout / ".venv").exists()


def test_another_torch_is_refused(prepared: Machine) -> None:
    write_wheel(prepared.indexes / "pytorch", "torch", "2.13.0+cpu", "# not what was locked\n")
    done = prepared.install()
    assert done.returncode and "the torch wheel is not the one that the lock pins" in done.stderr
    assert prepared.installed() == set()


def test_another_torch_in_pips_own_settings_is_not_passed_over(prepared: Machine) -> None:
    folder = write_wheel(prepared.indexes / "mirror", "torch", "2.13.0+cpu", "# not what was locked\n").parent
    done = prepared.install(PIP_FIND_LINKS=str(folder))
    assert done.returncode and "the torch wheel is not the one that the lock pins" in done.stderr
    assert prepared.installed() == set() and prepared.pytorch.asked == []


def test_where_no_torch_is_found_the_message_says_what_to_set(prepared: Machine) -> None:
    done = prepared.install(WHIPSTAFF_TORCH_INDEX=prepared.pypi.url)
    last = done.stderr.splitlines()[-1]
    assert done.returncode and f"found neither with pip's own settings nor on {prepared.pypi.url}" in last
    assert all(name in last for name in ("HTTPS_PROXY", "WHIPSTAFF_TORCH_INDEX", "PIP_FIND_LINKS"))
    assert "No matching distribution found for torch==2.13.0+cpu" in done.stderr


def test_where_the_rest_is_not_found_the_message_says_what_to_set(prepared: Machine) -> None:
    shutil.rmtree(prepared.indexes / "pypi" / "beside")
    done = prepared.install()
    last = done.stderr.splitlines()[-1]
    assert done.returncode and "cpu.lock" in last
    assert all(name in last for name in ("HTTPS_PROXY", "PIP_INDEX_URL", "PIP_FIND_LINKS"))


def test_what_is_missing_is_said_before_anything_is_made(machine: Machine) -> None:
    done = machine.install(CXX="no-such-compiler")
    assert done.returncode and "there is no C++ compiler 'no-such-compiler': install g++" in done.stderr
    assert not (machine.checkout / ".venv").exists() and machine.pypi.asked + machine.pytorch.asked == []


def test_a_wheel_is_installed_without_a_compiler(prepared: Machine) -> None:
    wheel = write_wheel(prepared.checkout, "whipstaff", "0.1")
    done = prepared.install("--wheel", str(wheel), CXX="no-such-compiler")
    assert not done.returncode, done.stdout + done.stderr
    assert prepared.installed() == {"torch", "beside", "whipstaff"}


def test_a_broken_environment_is_not_repaired_in_silence(machine: Machine) -> None:
    (machine.checkout / ".venv" / "bin").mkdir(parents=True)
    (machine.checkout / ".venv" / "bin" / "python").symlink_to("/usr/bin/no-such-python")
    done = machine.install()
    assert done.returncode and done.stderr.endswith(f"remove {machine.checkout}/.venv and try again\n")


def test_the_lock_takes_the_real_wheel_from_an_index(tmp_path: Path) -> None:
    """The real line and the wheel that pip finds by its own settings, then by none; nothing is installed."""
    installer = load()
    installer.with_torch(
        sys.executable, "download", "--quiet", "--no-deps", "-d", str(tmp_path / "torch"), "torch==2.13.0+cpu"
    )
    with serve(tmp_path) as index:
        variables = {"WHIPSTAFF_TORCH_INDEX": index.url, "PIP_DRY_RUN": "1", "PIP_IGNORE_INSTALLED": "1"}
        program = "import install, sys; install.install_torch(sys.executable)"
        subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT / "requirements", env=emptied(tmp_path, **variables), check=True
        )
        assert [path.endswith(".whl") for path in index.asked] == [False, True]


def test_the_checkout_is_found_without_import_hooks() -> None:
    """Type checkers and editors follow paths alone. What is imported is the checkout's own file, not the link to it."""
    (package,) = [folder for folder in (Path(entry, "whipstaff") for entry in sys.path) if folder.is_dir()]
    for room in ("server", "steering", "decoding", "cuda_ext"):
        assert (package / room).samefile(ROOT / room)
        assert importlib.import_module(f"whipstaff.{room}").__file__ == str(ROOT / room / "__init__.py")


# What the machine lacks


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("whipstaff_install", ROOT / "requirements" / "install.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def absent(name: str) -> None:
    raise OSError(f"{name}: cannot open shared object file")


@pytest.fixture
def installer() -> ModuleType:
    return load()


def test_the_lock_has_a_torch_for_every_python(installer: ModuleType) -> None:
    lines = (ROOT / "requirements" / "cpu.lock").read_text().splitlines()
    (torch,) = [each for each in lines if each.startswith("torch==")]
    assert len(set(re.findall("--hash=sha256:[0-9a-f]{64}", torch))) == len(installer.PYTHONS)


def test_this_machine_lacks_nothing(installer: ModuleType) -> None:
    installer.check()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("platform.system", lambda: "Darwin", "and this is Darwin x86_64"),
        ("platform.machine", lambda: "aarch64", "and this is Linux aarch64"),
        ("platform.libc_ver", lambda: ("glibc", "2.27"), "glibc 2.28 or newer, and this is Linux x86_64 glibc 2.27"),
        ("platform.libc_ver", lambda: ("", ""), "glibc 2.28 or newer, and this is Linux x86_64"),
        ("Path.read_text", lambda self: "flags : fpu sse4_2 avx", "need a processor with AVX2"),
        ("importlib.util.find_spec", lambda name: None, "-venv (Debian, Ubuntu)"),
        ("sysconfig.get_path", lambda name: "/nowhere", "/nowhere/Python.h is missing: install python"),
        ("ctypes.CDLL", absent, "libnuma.so.1 is missing: install libnuma1"),
        ("shutil.which", lambda name: None, "there is no C++ compiler 'g++': install g++"),
    ],
)
def test_what_is_missing_is_named(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch, name: str, value: object, said: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    *owner, attribute = name.split(".")
    monkeypatch.setattr(functools.reduce(getattr, owner, installer), attribute, value)
    with pytest.raises(installer.Lacking, match=re.escape(said)):
        installer.check()


def test_an_old_compiler_is_named(installer: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    old = tmp_path / "old-g++"
    old.write_text('#!/bin/sh\nexec g++ "$@" -std=c++17\n')
    old.chmod(0o755)
    monkeypatch.setenv("CXX", str(old))
    with pytest.raises(installer.Lacking, match=r"old-g\+\+ does not compile C\+\+20"):
        installer.check()


def test_everything_missing_is_said_at_once(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installer.shutil, "which", lambda name: None)
    monkeypatch.setattr(installer.sysconfig, "get_path", lambda name: "/nowhere")
    with pytest.raises(installer.Lacking, match=r"(?s)no C\+\+ compiler.*\n/nowhere/Python.h is missing"):
        installer.check()


def test_a_supported_python_on_path_takes_over(installer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    went_on: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(installer, "HERE", "3.9")
    monkeypatch.setattr(installer, "version", lambda python: "3.12" if python == "python3.12" else "")
    monkeypatch.setattr(installer.os, "execvp", lambda name, arguments: went_on.append((name, arguments)))
    monkeypatch.setattr(installer.sys, "argv", ["requirements/install.py", "--dev"])
    with pytest.raises(installer.Lacking):  # only since the stand-in of exec comes back
        installer.go_on_with_a_supported_python()
    assert went_on == [("python3.12", ["python3.12", "requirements/install.py", "--dev"])]


def test_without_a_supported_python_the_message_names_them(
    installer: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(installer, "HERE", "3.14")
    monkeypatch.setattr(installer, "version", lambda python: "")
    with pytest.raises(installer.Lacking, match=r"Python 3\.11 or 3\.12 or 3\.13 is needed and this is 3\.14"):
        installer.go_on_with_a_supported_python()
