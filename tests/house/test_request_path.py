"""A newcomer who follows a request must not open more files than this."""

import json
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest


class Most(NamedTuple):
    """Files of ours, in all processes."""

    there: (
        int  # from the route to the last kernel that the request is the first to call, which the house's bar is about
    )
    there_and_back: int


# The bar that the house set itself is about the way there: 12 for a plain request, 20 for a steered one. It is not met.
# What a plain request enters beyond it is the callback that hands its route the body. Of a steered one's, half are
# admission (what it names, checks and becomes), half are the step; only who wakes the scheduler passes `patch`.
MOST = {
    "plain": Most(13, 15),
    "steered": Most(46, 49),
    "proxy-tuned": Most(44, 47),
    "cfg": Most(48, 50),
}


@pytest.mark.engine
def test_a_requests_path_stays_short() -> None:
    words = [sys.executable, "-m", "house.request_path", "--json"]
    run = subprocess.run(words, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600, check=True)
    found: dict[str, tuple[list[str], list[str]]] = json.loads(run.stdout.splitlines()[-1])
    assert found.keys() == MOST.keys()
    nums = {name: Most(len(there), len(there) + len(back)) for name, (there, back) in found.items()}
    longer = {
        name: found[name]
        for name, num in nums.items()
        if num.there > MOST[name].there or num.there_and_back > MOST[name].there_and_back
    }
    assert longer == {}
