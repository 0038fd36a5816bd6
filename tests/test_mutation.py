"""The mutation check itself: every mutant finds what it switches off, in whatever process imports it."""

import os
import subprocess
import sys
from pathlib import Path

MUTATION = Path(__file__).parent / "mutation"
PLANT_EVERY = """
import importlib, sys
sys.path.insert(0, sys.argv[1])
import runpy
every = runpy.run_path(sys.argv[1] + "/__main__.py", run_name="mutation")["mutants"]()
from mutants import patches
for mutant, tests in every.items():
    assert any(tests.values()), f"no test concerns {mutant}"
    for module, patch in patches(mutant).items():
        patch(importlib.import_module(module))
print(len(every))
"""
LOOK = """
from whipstaff.decoding.methods import METHODS
print(METHODS["xtc"].rewrite(type("Rows", (), {"logits": "as they were"}), []))
"""


def run(code: str, *args: str, **environment: str) -> str:
    found = subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert not found.returncode, found.stderr
    return found.stdout.strip()


def test_every_mutant_finds_what_it_switches_off() -> None:
    assert int(run(PLANT_EVERY, str(MUTATION))) > 80


def test_a_mutant_reaches_processes_by_their_environment() -> None:
    """Also where another sitecustomize comes first, as in the tests of Model Runner V2."""
    both = os.pathsep.join([str(MUTATION.parent / "v2_on_cpu"), str(MUTATION)])
    for path in (str(MUTATION), both):
        assert run(LOOK, PYTHONPATH=path, WHIPSTAFF_TEST_MUTANT="decoding:xtc") == "as they were"


def test_every_mutant_is_held_against_tests_that_are_there() -> None:
    """pytest ends with an error where a file is missing, which would pass for a test that noticed."""
    words = [sys.executable, str(MUTATION), "--list"]
    run = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True, cwd=MUTATION.parents[1])
    named = {word.partition("::")[0] for word in run.stdout.split() if word.startswith("tests/")}
    assert len(named) > 20 and [name for name in sorted(named) if not (MUTATION.parents[1] / name).exists()] == []
