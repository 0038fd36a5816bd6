"""Lay out the newest supported vLLM for a CPU: its Python files over the compiled library of the CPU build in the lock.

    .venv/bin/python requirements/next_vllm.py FOLDER [VERSION]

With FOLDER first on PYTHONPATH and VLLM_TARGET_DEVICE=cpu, an interpreter of that environment runs it. Kernels that the
newer version has and the older library lacks are missing, so this shows our side of the seam, not vLLM's.
"""

import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

NEWEST = "0.33.0"


def lay_out(folder: Path, version: str) -> None:
    """Fill `folder` with vLLM `version`, told to be a CPU build."""
    with tempfile.TemporaryDirectory() as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "-d", temporary, f"vllm=={version}"]
        subprocess.run(pip, check=True)
        with zipfile.ZipFile(next(Path(temporary).glob("vllm-*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if not name.endswith(".so")])
    for library in _installed().rglob("*.so"):
        shutil.copy(library, folder / "vllm" / library.relative_to(_installed()))
    for file in (folder / "vllm" / "_version.py", folder / f"vllm-{version}.dist-info" / "METADATA"):
        file.write_text(file.read_text().replace(version, f"{version}+cpu", 1 if file.name == "METADATA" else -1))


def _installed() -> Path:
    spec = find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


if __name__ == "__main__":
    lay_out(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else NEWEST)
