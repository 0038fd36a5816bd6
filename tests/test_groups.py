"""Tests that share an engine run in one process, and groups in the order of conftest.py, whatever pytest and
pytest-xdist are installed."""

import subprocess
import sys
from pathlib import Path

MODULES = ("tests/decoding/test_cad.py", "tests/decoding/test_proxy_tuning.py")  # the first has fewer tests


def test_a_group_stays_together_and_in_its_place() -> None:
    words = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "loadgroup", "-v", "-p", "no:cacheprovider", *MODULES]
    run = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=300, check=True)
    ran = [line.split() for line in run.stdout.splitlines() if line.startswith("[gw")]
    for module in MODULES:
        processes = {words[0] for words in ran if module in " ".join(words)}
        assert len(processes) == 1, run.stdout
    counts = [sum(module in " ".join(words) for words in ran) for module in MODULES]
    assert counts[0] < counts[1]
    firsts = [next(words for words in ran if words[0] == process) for process in ("[gw0]", "[gw1]")]
    assert any(MODULES[0] in " ".join(words) for words in firsts)
