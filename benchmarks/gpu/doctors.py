"""`whipstaff doctor` on the demo model in the two ways in which CUDA graphs are captured, at once; flags are passed on.

Prints one JSON line for each: the way, how many findings there were and how many were good, and its last words.
"""

import json
import subprocess
import sys
import time

from whipstaff.server import demo

FLAGS = (
    *("--dtype", "float32", "--max-model-len", "1024", "--kv-cache-memory-bytes", "256M", "--max-num-seqs", "64"),
    *("--gpu-memory-utilization", "0.3", "--vectors", str(demo.VECTORS)),
)
AUXILIARY = [word for name in ("tuned", "untuned") for word in ("--aux", f"{name}={demo.MODELS / name}")]
WAYS = {
    "whole graphs": [],
    "graphs in pieces, with auxiliary models": AUXILIARY,
    "eager, looking ahead": ["--enforce-eager", "--lookahead"],
}
DOCTOR = [sys.executable, "-c", "from whipstaff.server.commands.main import main; main()", "doctor"]


def main() -> None:
    begin = time.monotonic()
    running = {
        way: subprocess.Popen(
            [*DOCTOR, str(demo.MODELS / "demo"), *FLAGS, *flags, *sys.argv[1:]], stdout=subprocess.PIPE, text=True
        )
        for way, flags in WAYS.items()
    }
    good = True
    for way, process in running.items():
        said, _ = process.communicate()
        lines = [line for line in said.splitlines() if line.startswith(("ok ", "FAIL", "vLLM "))]
        findings = [line for line in lines if not line.startswith("vLLM ")]
        bad = [line for line in findings if line.startswith("FAIL")]
        good &= process.returncode == 0
        print(
            json.dumps(
                {
                    "way": way,
                    "engine": lines[:1],
                    "findings": len(findings),
                    "bad": bad,
                    "exit": process.returncode,
                    "seconds": round(time.monotonic() - begin, 1),
                }
            ),
            flush=True,
        )
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
