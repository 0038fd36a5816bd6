"""A newcomer who follows a request must not open more files than this."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MOST = {"plain": 17, "steered": 42, "proxy-tuned": 38, "cfg": 41}  # files of ours, in all processes, to the kernels


@pytest.mark.engine
def test_a_requests_path_stays_short() -> None:
    words = [sys.executable, "-m", "house.request_path", "--json"]
    run = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600, check=True)
    found: dict[str, tuple[list[str], list[str]]] = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == MOST.keys()
    assert {name: there for name, (there, _) in found.items() if len(there) > MOST[name]} == {}
