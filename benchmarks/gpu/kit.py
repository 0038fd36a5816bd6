"""Everything that wants a GPU, in one command: build, check and time the kernels, then serve, check and time that.

    python benchmarks/gpu/kit.py [--site FOLDER] [--stages build,check,...] [--device cpu] [--out FOLDER]

Stages run one after the other, each in a process of its own with a time limit of its own, all of them within eight
minutes on a machine with one GPU:

    build       the libraries, for this GPU's architecture alone
    check       the kernels against the CPU's, also inside captured graphs
    kernels     their times against a copy of the same bytes
    doctor      `whipstaff doctor` on the demo model, in whole captured graphs and, with auxiliary models, in pieces
    exact       a mixed batch, greedy and float32, against plain transformers, in both
    throughput  stock vLLM, idle, steered, guided and proxy-tuned, in turns

FOLDER/results.json has what was found so far after every line that a stage says, FOLDER/STAGE.log all that it said. A
stage that fails or takes too long does not stop the next one; a second run with --stages goes on where one broke.
`--site` names what pack.py packed, unpacked. `--device cpu` rehearses on a machine without a GPU what can be.
"""

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
DEMO = ROOT / "server" / "demo"


@dataclass
class Stage:
    """A command, how long it may take, and what its environment has besides."""

    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


def stages(device: str, out: Path) -> dict[str, Stage]:
    python, cores = sys.executable, str(os.cpu_count())
    exact = {"TRITON_F32_DEFAULT": "ieee"}  # Triton multiplies float32 as TF32 unless told otherwise
    engine = [] if device == "cpu" else ["--attention-backend", "TRITON_ATTN"]
    doctor = [python, str(HERE / "doctors.py"), *engine]
    build = {"MAX_JOBS": cores} | ({} if device == "cpu" else {"TORCH_CUDA_ARCH_LIST": architecture()})
    install = [python, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
    tests = ["tests/cuda_ext/test_cuda.py"] if device == "cuda" else ["tests/cuda_ext/test_put_rows.py"]
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "default", *tests]
    quick = [] if device == "cuda" else ["--kernel", "put_rows_"]
    return {
        "build": Stage(install, 150, build),
        "check": Stage(pytest, 60),
        "kernels": Stage([python, "benchmarks/kernels.py", "--device", device, "--budget", "0.03", *quick], 60),
        "doctor": Stage(doctor, 170 if device == "cuda" else 600, exact),
        "exact": Stage(
            [python, str(HERE / "exact.py"), "--device", device],
            170 if device == "cuda" else 600,
            exact | {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"},  # its second engine starts after CUDA did
        ),
        "throughput": Stage(
            [python, str(HERE / "throughput.py"), "--device", device, "--logs", str(out)],
            220 if device == "cuda" else 1500,
        ),
    }


def architecture() -> str:
    """Of the first GPU, as TORCH_CUDA_ARCH_LIST wants it."""
    import torch

    return "{}.{}".format(*torch.cuda.get_device_capability())


def machine(device: str) -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "transformers": metadata.version("transformers"),
        "cores": len(os.sched_getaffinity(0)),
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"gpu": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1)}
        found |= {"cuda": torch.version.cuda}
    return found


class Results:
    """One JSON file, written anew whenever something was found."""

    def __init__(self, path: Path, device: str) -> None:
        self._path, self._begin = path, time.monotonic()
        self.found: dict[str, Any] = {"machine": machine(device), "stages": {}}

    def write(self) -> None:
        self.found["seconds"] = round(time.monotonic() - self._begin, 1)
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.found, indent=1))
        part.replace(self._path)


def run(name: str, stage: Stage, environment: dict[str, str], out: Path, results: Results) -> bool:
    """Run a stage; every line of its standard output that is JSON is kept. Whether it ended well, and in time."""
    entry: dict[str, Any] = {"status": "running", "found": []}
    results.found["stages"][name] = entry
    results.write()
    begin = time.monotonic()
    with (out / f"{name}.log").open("w") as log:
        process = subprocess.Popen(
            stage.command,
            cwd=ROOT,
            env=environment | stage.environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        watch = threading.Timer(stage.seconds, _end, (process, entry))
        watch.start()
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            log.flush()
            if line.startswith('{"'):
                entry["found"].append(json.loads(line))
                results.write()
        process.wait()
        watch.cancel()
        _end(process, {})  # of its own session: only what it started
    if entry["status"] == "running":
        entry["status"] = "passed" if process.returncode == 0 else f"failed with {process.returncode}"
    entry["seconds"] = round(time.monotonic() - begin, 1)
    if entry["status"] != "passed":
        entry["said"] = (out / f"{name}.log").read_text()[-3000:]
    results.write()
    return bool(entry["status"] == "passed")


def _end(process: "subprocess.Popen[str]", entry: dict[str, Any]) -> None:
    entry["status"] = "out of time"
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--site", type=Path, help="a folder of packages to put first on the path")
    parser.add_argument("--stages", help="comma-separated; default: all")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    options = parser.parse_args()
    planned = stages(options.device, options.out.resolve())
    names = options.stages.split(",") if options.stages else list(planned)
    if unknown := [name for name in names if name not in planned]:
        parser.error(f"there is no stage {unknown[0]!r}; there are {', '.join(planned)}")
    options.out.mkdir(parents=True, exist_ok=True)
    paths = [*([str(options.site.resolve())] if options.site else []), str(ROOT / "tests")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    results = Results(options.out / "results.json", options.device)
    print(json.dumps(results.found["machine"]), flush=True)
    good = True
    for name in names:
        passed = run(name, planned[name], environment, options.out, results)
        good &= passed
        entry = results.found["stages"][name]
        print(f"{name}: {entry['status']} after {entry['seconds']} s", flush=True)
        if not passed:
            print(entry["said"][-1500:], flush=True)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
