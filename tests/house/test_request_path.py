"""A newcomer who follows a request must not open more files than this."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MOST = {"plain": 26, "steered": 57, "proxy-tuned": 51, "cfg": 53}  # files of ours, in all processes, there and back


@pytest.mark.engine
def test_a_requests_path_stays_short() -> None:
    words = [sys.executable, "-m", "house.request_path", "--json"]
    run = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600, check=True)
    found: dict[str, tuple[list[str], list[str]]] = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == MOST.keys()
    longer = {name: files for name, (there, back) in found.items() if len(files := [*there, *back]) > MOST[name]}
    assert longer == {}
