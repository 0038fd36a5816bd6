"""The wheel: it is what its name says, and who installs it needs no compiler, also not to serve."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path
from typing import Any

import pytest
from serving import serving_demo

from whipstaff.server import __version__

ROOT = Path(__file__).parents[1]


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


@pytest.mark.engine
def test_one_wheel_for_every_python(wheel: Path) -> None:
    assert wheel.name == f"whipstaff-{__version__}-cp311-abi3-manylinux_2_28_x86_64.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"whipstaff"}
    assert {"whipstaff/server/demo/mix.yaml", "whipstaff/server/demo/models/demo/config.json"} <= {*names}


@pytest.mark.engine
def test_its_libraries_are_its_own(bare: Path) -> None:
    where = "import whipstaff.cuda_ext.libraries as it; print(it.__file__)"
    found = subprocess.check_output([bare, "-c", where], text=True, cwd=bare.parent)
    assert found.startswith(str(bare.parents[1]))  # and not the checkout's


@pytest.mark.engine
def test_it_serves_where_there_is_no_compiler(bare: Path, tmp_path: Path) -> None:
    only = tmp_path / "bin"
    only.mkdir()
    (only / "lscpu").symlink_to(str(shutil.which("lscpu")))  # vLLM's CPU engine asks it
    with serving_demo(tmp_path, python=bare, PATH=str(only)) as server, server.client() as http:
        for more in ({"temperature": 0.8, "top_k": 5, "top_p": 0.9}, {"steering": {"vector": "cheerful", "scale": 2}}):
            body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "logprobs": 2, "seed": 1, **more}
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200 and answer.json()["choices"][0]["text"], answer.text
        first, *_, last = (line for line in server.said().splitlines() if "no C++ compiler 'g++'" in line)
        assert "torch.compile is off" in first and last.endswith("nothing is compiled, and tokens take longer")
