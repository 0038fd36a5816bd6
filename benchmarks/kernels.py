"""Times the kernels against the plain-torch reference and against a copy of the same bytes; prints JSON lines.

python benchmarks/kernels.py                  what this machine has: CPU on one thread, and CUDA where there is one
python benchmarks/kernels.py --build --check  builds the libraries and runs the kernel tests first
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
NOBODY, ALL_ONE, ALL_DIFFERENT = "nobody", "all_one", "all_different"


@dataclass(frozen=True)
class Case:
    """One timed call, the reference that does the same, and the bytes that must move for it."""

    name: str
    setup: dict[str, object]
    run: Callable[..., object]  # without arguments
    reference: Callable[..., object]
    bytes_moved: int  # read and written, caches aside


def slots(popularity: str, num_tokens: int, device: str) -> Tensor:
    if popularity == ALL_DIFFERENT:
        return torch.arange(num_tokens, device=device)
    return torch.full((num_tokens,), -1 if popularity == NOBODY else 0, device=device)


def put_cases(device: str) -> Iterator[Case]:
    from whipstaff import cuda_ext
    from whipstaff.cuda_ext import reference

    hidden = 4096
    for dtype in (torch.float32, torch.bfloat16):
        for num_tokens in (1, 64, 256):
            for popularity in (NOBODY, ALL_ONE, ALL_DIFFERENT):
                x = torch.randn(num_tokens, hidden, device=device).to(dtype)
                rows, index = x.clone(), slots(popularity, num_tokens, device).int()
                moved = {NOBODY: 0, ALL_ONE: x.nbytes + x[0].nbytes, ALL_DIFFERENT: 2 * x.nbytes}[popularity]
                arguments = x, rows, index
                yield Case(
                    "put_rows_",
                    {"tokens": num_tokens, "hidden": hidden, "dtype": str(dtype), "slots": popularity},
                    lambda arguments=arguments: cuda_ext.put_rows_(*arguments),
                    lambda arguments=arguments: reference.put_rows_(*arguments),
                    moved + index.nbytes,
                )


def program_cases(device: str) -> Iterator[Case]:
    from whipstaff import cuda_ext
    from whipstaff.cuda_ext import Opcode, Phi, interpreter

    hidden = 4096
    lines = torch.randn(10, hidden, device=device) / hidden
    diag = [[Opcode.DIAG, 0, 1, 0, 0, 0]]
    rank_4 = [[Opcode.DIR, 2 + r, 6 + r, Phi.SET, 0, 0] for r in range(4)]
    for program, form in ((diag, "diagonal"), (rank_4, "rank 4")):
        code = torch.tensor([*program, [Opcode.END, 0, 0, 0, 0, 0]], dtype=torch.int32, device=device)
        args = torch.zeros(code.shape, device=device)
        for num_tokens in (1, 64, 256):
            for popularity in (NOBODY, ALL_ONE):
                x = torch.randn(num_tokens, hidden, device=device).bfloat16()
                tokens = slots(popularity, num_tokens, device)[:, None].repeat(1, 2).int()
                arguments = x, lines, code, args, tokens, torch.ones(num_tokens, 0, device=device), lines.new_ones(0, 0)
                moved = 0 if popularity == NOBODY else 2 * x.nbytes + 2 * len(program) * hidden * 4
                yield Case(
                    "run_edits_",
                    {
                        "tokens": num_tokens,
                        "hidden": hidden,
                        "dtype": str(x.dtype),
                        "program": form,
                        "slots": popularity,
                    },
                    lambda arguments=arguments: cuda_ext.run_edits_(*arguments),
                    lambda arguments=arguments: interpreter.run_edits_(*arguments),
                    moved + tokens.nbytes,
                )


def mix_cases(device: str) -> Iterator[Case]:
    from whipstaff import cuda_ext
    from whipstaff.cuda_ext import reference

    vocab, num_streams = 128 * 1024, 3
    for dtype in (torch.float32, torch.bfloat16):
        for num_rows in (32, 64):
            streams = [torch.randn(num_rows, vocab, device=device).to(dtype) for _ in range(num_streams)]
            out = torch.empty_like(streams[0])
            own = torch.arange(num_rows, device=device)[:, None].repeat(1, num_streams)
            shape, first = own.shape, torch.arange(num_streams, device=device) == 0
            weights = torch.tensor([1.0, 1.0, -1.0], device=device).repeat(num_rows, 1)
            tables: dict[str, dict[str, Tensor]] = {
                "raw": {},
                "log_softmax": {"log_softmax": torch.ones(shape, dtype=torch.bool, device=device)},
                "alpha": {"alphas": torch.where(first, 0.1, 0.0).repeat(num_rows, 1)},
                "top_p": {"top_ps": torch.where(first, 0.9, 1.0).repeat(num_rows, 1)},
            }
            for form, rows in (*((form, own) for form in tables), (NOBODY, torch.full_like(own, -1))):
                arguments, table = (out, streams, rows, weights), tables.get(form, {})
                moved = 0 if form == NOBODY else out.nbytes + sum(stream.nbytes for stream in streams)
                yield Case(
                    "mix_logits_",
                    {"rows": num_rows, "vocab": vocab, "streams": num_streams, "dtype": str(dtype), "form": form},
                    lambda arguments=arguments, table=table: cuda_ext.mix_logits_(*arguments, **table),
                    lambda arguments=arguments, table=table: reference.mix_logits_(*arguments, **table),
                    moved + rows.nbytes,
                )


def row_cases(device: str) -> Iterator[Case]:
    from whipstaff import cuda_ext
    from whipstaff.cuda_ext import reference

    for dtype in (torch.float32, torch.bfloat16):
        for num_rows, vocab in ((32, 16 * 1024), (32, 128 * 1024)):
            fresh = torch.randn(num_rows, vocab, device=device).to(dtype)
            logits, low = fresh.clone(), torch.zeros(num_rows, device=device)
            mass, setup = low + 0.95, {"rows": num_rows, "vocab": vocab, "dtype": str(dtype)}
            yield Case(
                "cut_rows_",
                setup,
                lambda logits=logits, low=low: cuda_ext.cut_rows_(logits, low, None),
                lambda logits=logits, low=low: reference.cut_rows_(logits, low, None),
                2 * logits.nbytes,
            )
            yield Case(
                "typical_rows_",
                setup | {"form": "after a copy of the rows"},
                lambda logits=logits, fresh=fresh, mass=mass: cuda_ext.typical_rows_(logits.copy_(fresh), mass),
                lambda logits=logits, fresh=fresh, mass=mass: reference.typical_rows_(logits.copy_(fresh), mass),
                4 * logits.nbytes,
            )


def copy_of(num_bytes: int, device: str) -> Callable[[], object]:
    """A plain copy that moves as many bytes: half of them read, half written."""
    source = torch.zeros(max(num_bytes // 2, 1), dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def seconds(
    call: Callable[[], object], budget: float, time_once: Callable[[Callable[[], object], int], float]
) -> tuple[float, float]:
    """Median and standard deviation of one call, after a warm-up, from as many repeats as the budget allows."""
    time_once(call, 2)
    number = max(1, min(200, int(2e-3 / max(time_once(call, 1), 1e-7))))
    times: list[float] = []
    end = time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < end and len(times) < 50):
        times.append(time_once(call, number))
    return statistics.median(times), statistics.stdev(times)


def host_seconds(call: Callable[[], object], number: int) -> float:
    begin = time.perf_counter()
    for _ in range(number):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - begin) / number


def graph_seconds(call: Callable[[], object], number: int) -> float:
    """Time on the device of one call inside a replayed graph, so that the host does not count."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(number):
            call()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / number


def measure(case: Case, device: str, budget: float) -> dict[str, object]:
    timer = graph_seconds if device == "cuda" else host_seconds
    time_of, deviation = seconds(case.run, budget, timer)
    copy, _ = seconds(copy_of(case.bytes_moved, device), budget, timer)
    # The reference asks the host how many tokens are edited: it cannot be captured, so it is timed from the host.
    reference, _ = seconds(case.reference, budget, host_seconds)
    return {
        "kernel": case.name,
        "device": device,
        **case.setup,
        "us": round(time_of * 1e6, 2),
        "us_stdev": round(deviation * 1e6, 2),
        "gb_per_s": round(case.bytes_moved / time_of / 1e9, 1),
        "times_copy": round(time_of / copy, 2),
        "reference_over_kernel": round(reference / time_of, 1),
    }


def machine(device: str) -> dict[str, object]:
    if device == "cuda":
        return {"machine": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"machine": names[0] if names else platform.machine(), "cores": len(names), "torch": torch.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", action="store_true", help="build and install the libraries first")
    parser.add_argument("--check", action="store_true", help="run the kernel tests first")
    parser.add_argument("--device", choices=["cpu", "cuda"], action="append", help="default: all that are there")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--kernel", action="append", help="only these operators")
    parser.add_argument("--budget", type=float, default=0.2, help="seconds per measurement")
    chosen = parser.parse_args()
    if chosen.build:
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps", "-e", str(ROOT)]
        subprocess.run(install, check=True)
    if chosen.check:
        subprocess.run([sys.executable, "-m", "pytest", "-q", "tests/cuda_ext"], check=True, cwd=ROOT)
    torch.set_num_threads(chosen.threads)
    for device in chosen.device or (["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]):
        print(json.dumps(machine(device) | {"threads": chosen.threads, "python": platform.python_version()}))
        for cases in (put_cases, program_cases, mix_cases, row_cases):
            for case in cases(device):
                if not chosen.kernel or case.name in chosen.kernel:
                    print(json.dumps(measure(case, device, chosen.budget)), flush=True)


if __name__ == "__main__":
    main()
