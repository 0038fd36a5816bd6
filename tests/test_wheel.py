"""The wheel: it is what its name says, and who installs it needs no compiler, also not to serve."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Server, environment, free_port, stop, wait_until_healthy

from whipstaff.server import __version__

ROOT = Path(__file__).parents[1]
COMPILERS = ("gcc", "g++", "cc", "c++", "clang", "clang++", "nvcc")


@pytest.fixture(scope="module")
def maker() -> Any:
    spec = importlib.util.spec_from_file_location("wheel_maker", ROOT / "requirements" / "wheel.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- what is refused


def write(folder: Path, name: str, **files: bytes) -> Path:
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file, data in files.items():
            archive.writestr(f"whipstaff/cuda_ext/{file}.abi3.so", data)
    return folder / name


@pytest.mark.parametrize(
    ("name", "files", "said"),
    [
        ("whipstaff-0.1-cp311-cp311-linux_x86_64.whl", ("_cpu", "_cuda"), "is not tagged cp311-abi3-manylinux_2_28"),
        ("whipstaff-0.1-cp311-abi3-manylinux_2_28_x86_64.whl", ("_cpu",), "holds whipstaff/cuda_ext/_cpu.abi3.so, not"),
        ("whipstaff-0.1-cp311-abi3-manylinux_2_28_x86_64.whl", (), "holds no library, not"),
    ],
)
def test_a_wheel_that_is_not_what_it_says(
    maker: Any, tmp_path: Path, name: str, files: tuple[str, ...], said: str
) -> None:
    with pytest.raises(maker.Unfit, match=said):
        maker.check(write(tmp_path, name, **dict.fromkeys(files, b"")), with_cuda=True)


@pytest.mark.parametrize(
    ("source", "flags", "said"),
    [
        ("int f() { return 0; }", [], None),
        ("#include <Python.h>\nPyObject *f() { return PyLong_FromLong(1); }", [], "calls Python's PyLong_FromLong"),
        (
            "extern int lzma_version_number(); int f() { return lzma_version_number(); }",
            ["-llzma"],
            "linked against liblz",
        ),
    ],
)
def test_a_library_that_wants_what_nobody_brings(
    maker: Any, tmp_path: Path, source: str, flags: list[str], said: str | None
) -> None:
    (tmp_path / "one.c").write_text(source)
    library = tmp_path / "_cpu.abi3.so"
    if "-llzma" in flags:  # a stand-in of that name
        (tmp_path / "lzma.c").write_text("int lzma_version_number() { return 0; }")
        compile_("lzma.c", tmp_path / "liblzma.so", "-Wl,-soname,liblzma.so.5", folder=tmp_path)
    compile_("one.c", library, f"-L{tmp_path}", *flags, folder=tmp_path)
    if said is None:
        maker.check_library(library)
        return
    with pytest.raises(maker.Unfit, match=said):
        maker.check_library(library)


def compile_(source: str, library: Path, *flags: str, folder: Path) -> None:
    command = ["gcc", "-shared", "-fPIC", f"-I{sysconfig.get_path('include')}", source, "-o", str(library), *flags]
    subprocess.run(command, cwd=folder, check=True)


# ---- the CPU form, whole


@pytest.fixture(scope="module")
def wheel(maker: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of what git knows of this checkout, so that nothing here is built anew beneath the other tests."""
    folder = tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).split("\0"):
        if name and not name.startswith(("tests/", "docs/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    script = folder / "source" / "requirements" / "wheel.py"
    command = [sys.executable, str(script), "--cpu-only", "--out", str(folder / "dist")]
    variables = {"MAX_JOBS": "2", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = (folder / "dist").iterdir()
    assert done.stdout.splitlines()[-1] == str(made)
    return made


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment's interpreter that has the wheel, and what it needs from this one; nothing else of ours."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/*/site-packages")
    paths = [path for path in sys.path if Path(path).name == "site-packages"]
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages / "needed.pth").write_text("\n".join(paths) + "\n")  # whose own .pth files are not read
    return python


def without_compilers(python: Path, folder: Path) -> dict[str, str]:
    """Of a machine where nobody compiles: PATH has what a shell needs, by name."""
    tools = folder / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("sh", "ls", "cat", "uname", "lscpu", "ldconfig", "env", "mkdir", "rm"):
        if (found := shutil.which(name)) and not (tools / name).exists():
            (tools / name).symlink_to(found)
    own = {name: value for name, value in environment().items() if name not in ("CC", "CXX", "CUDA_HOME")}
    return own | {"PATH": f"{python.parent}{os.pathsep}{tools}", "HOME": str(folder), "XDG_CACHE_HOME": str(folder)}


@pytest.fixture(scope="module")
def served(bare: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    variables, port, log = without_compilers(bare, folder), free_port(), folder / "server.log"
    assert [name for name in COMPILERS if shutil.which(name, path=variables["PATH"])] == []
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--kv-cache-memory-bytes", "64M"]
    command = [str(bare.parent / "whipstaff"), *words]
    with log.open("w") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=variables, cwd=folder, start_new_session=True
        )
    try:
        server = Server(f"http://127.0.0.1:{port}", {}, log, process)
        wait_until_healthy(server)
        yield server
    finally:
        stop(process)


@pytest.mark.engine
def test_one_wheel_for_every_python(wheel: Path) -> None:
    assert wheel.name == f"whipstaff-{__version__}-cp311-abi3-manylinux_2_28_x86_64.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"whipstaff"}
    assert {"whipstaff/server/demo/mix.yaml", "whipstaff/server/demo/models/demo/config.json"} <= {*names}


@pytest.mark.engine
def test_it_serves_where_nobody_compiles(served: Server, bare: Path) -> None:
    ask = {"model": "demo", "prompt": "In the morning Mara opened the door, and", "temperature": 0, "max_tokens": 24}
    with httpx.Client(base_url=served.url, timeout=120) as client:
        plain, gloomy, mixed = (
            client.post("/v1/completions", json=ask | more).json()["choices"][0]["text"]
            for more in (
                {},
                {"steering": {"vector": "cheerful", "scale": -8}},
                {"decoding": {"method": "proxy_tuning", "expert": "tuned", "antiexpert": "untuned"}},
            )
        )
    assert len({plain, gloomy, mixed}) == 3
    where = "import whipstaff.cuda_ext.libraries as it; print(it.__file__)"
    found = subprocess.check_output([bare, "-c", where], text=True, cwd=served.log.parent)
    assert found.startswith(str(bare.parents[1]))  # and not the checkout's
