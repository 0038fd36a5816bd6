"""Which tests notice when a part of Whipstaff is switched off: each method, stage and site in turn.

    .venv/bin/python tests/mutation [--level unit|engine|all] [--only 'decoding:*'] [--tests PATH ...] [--list]

Prints a line for every mutant, the tests that failed with it, and ends with status 1 where one was noticed by none; the
same tests must pass before with nothing switched off. Level `unit` takes minutes, `engine` starts engines and servers
for every mutant and takes hours: it is for the night. Tests run in a forked process, with the mutant planted in it and
(by sitecustomize.py) in all that it starts. What is switched off is said in mutants.py.
"""

import argparse
import fnmatch
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:1] = [str(HERE)]  # this script's folder stays importable for what it starts

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402, F401 - once for all children
from mutants import HOOKS, OWN, STAGES, VARIABLE, plant  # noqa: E402

from whipstaff.decoding.method import StreamMixer  # noqa: E402
from whipstaff.decoding.methods import METHODS as DECODING  # noqa: E402
from whipstaff.steering.kinds.edits import EDITS  # noqa: E402
from whipstaff.steering.methods import METHODS as STEERING  # noqa: E402

NOTHING = "nothing"
ENGINE, HTTP = "tests/server/engine", "tests/server/api"
MANY = [f"{ENGINE}/test_many.py", f"{ENGINE}/test_architectures.py"]
HEADS = {
    "defer_head": [f"{ENGINE}/test_decoding_goldens.py", f"{ENGINE}/test_decoding.py"],
    "temperature_head": [f"{ENGINE}/test_decoding_goldens.py", f"{ENGINE}/test_decoding.py"],
    "token_classifier": [f"{ENGINE}/test_adapters.py"],
    "prefix_classifier": [f"{ENGINE}/test_lookahead.py"],
    "adapter_centres": [f"{ENGINE}/test_adapters.py"],
}
SERVED_BY = {
    "edits": MANY,
    "router": [f"{ENGINE}/test_routing.py"],
    "attention": [f"{ENGINE}/test_attention.py", f"{ENGINE}/test_soft.py"],
    "rows": [f"{ENGINE}/test_soft.py"],
    "probe": [f"{ENGINE}/test_conditions.py"],
    "head": [],
}
DRAWN = [f"{ENGINE}/test_decoding.py", f"{HTTP}/test_decoding_http.py"]
MIXED = [f"{ENGINE}/test_coupled_goldens.py", f"{ENGINE}/test_proxy_tuning.py", f"{HTTP}/test_companions_http.py"]
LAYERED = {
    "dola": [f"{ENGINE}/test_dola.py"],
    "kwd": [f"{ENGINE}/test_lookahead.py", f"{HTTP}/test_lookahead_http.py"],
    "adapter_ensemble": [f"{ENGINE}/test_adapters.py"],
    "opera_lite": [f"{ENGINE}/test_read_states.py"],
    "contrastive_search": [f"{ENGINE}/test_read_states.py"],
    **{name: [f"{HTTP}/test_search_http.py"] for name in ("beam_search", "opera", "kcts")},
}
SHALLOW = ["tests/steering/test_methods.py::test_off_makes_no_edit"]  # asks whether there is an edit, not which
SITES = {"router": [f"{ENGINE}/test_routing.py"], "attention": [f"{ENGINE}/test_attention.py"]}


def mutants() -> dict[str, dict[str, list[str]]]:
    """By name, the tests that concern a mutant at each level."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, method in STEERING.items():
        unit = ["tests/steering/test_methods.py"] if method.kind is EDITS else []
        engine = HEADS.get(name) or SERVED_BY[method.kind.name]
        found[f"steering:{name}"] = {"unit": unit, "engine": engine}
    for name, decoding in DECODING.items():
        folder = "tests/decoding/search" if decoding.stage == "search" else "tests/decoding"
        own = f"{folder}/test_{name}.py"
        unit = [own if (ROOT / own).exists() else "tests/decoding", "tests/server/admission/test_companions.py"]
        engine = LAYERED.get(name) or (MIXED if isinstance(decoding, StreamMixer) else DRAWN)
        found[f"decoding:{name}"] = {"unit": unit, "engine": [*engine, f"{ENGINE}/test_decoding_goldens.py"]}
    found |= {f"stage:{name}": {"unit": [], "engine": DRAWN + MIXED * (name == "mix")} for name in (*STAGES, *OWN)}
    found |= {f"site:{name}": {"unit": [], "engine": SITES.get(name, MANY)} for name in HOOKS}
    return found


def noticed(mutant: str, tests: Iterable[str], timeout: float, most: int) -> tuple[list[str], str]:
    """The tests that fail with a mutant, and what pytest said at the end; what takes too long was noticed, too."""
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        if (child := os.fork()) == 0:
            _run(mutant, tests, log.fileno(), most)
        status = _wait(child, timeout)
        said = Path(log.name).read_text(errors="replace")
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    if status is None:
        return [*failed, f"(longer than {timeout:.0f} s)"], last
    if status not in (0, 1) and not failed:  # 2 and above: collected nothing, or broke before a test
        return [f"(pytest ended with {status})"], last
    return failed, last


def _run(mutant: str, tests: Iterable[str], log: int, most: int) -> None:
    """In the child: pytest, with the mutant planted; never returns."""
    os.setsid()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(ROOT)
    os.environ["VLLM_DISABLE_COMPILE_CACHE"] = "1"  # it knows the product's files, and not what was planted
    if mutant != NOTHING:
        os.environ[VARIABLE] = mutant
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
        plant(mutant)
    quick = [phase for phase in hypothesis.Phase if phase.name in ("explicit", "generate")]
    hypothesis.settings.register_profile("mutation", phases=quick, derandomize=True, database=None)
    hypothesis.settings.load_profile("mutation")
    flags = ["-q", "-rfE", "--tb=no", "--no-header", "-p", "no:cacheprovider", f"--maxfail={most}"]
    shallow = [f"--deselect={test}" for test in SHALLOW]
    status = 3
    try:
        status = int(pytest.main([*flags, *shallow, *tests]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def _wait(child: int, timeout: float) -> int | None:
    """The child's exit status; None where it was ended, with all of its session, for taking too long."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests/mutation", description=__doc__, add_help=True)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--level", choices=("unit", "engine", "all"), default="all")
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="mutants by name, as in shells")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="run these instead of those that concern a mutant")
    parser.add_argument("--timeout", type=float, default=1800, metavar="SECONDS", help="for one mutant's tests")
    parser.add_argument("--most", type=int, default=5, metavar="N", help="stop after so many failures")
    parser.add_argument("--list", action="store_true", help="say what there is, and run nothing")
    args = parser.parse_args()
    chosen: dict[str, list[str]] = {}
    for mutant, by_level in mutants().items():
        levels = ("unit", "engine") if args.level == "all" else (args.level,)
        tests = args.tests or [test for level in levels for test in by_level[level]]
        if tests and any(fnmatch.fnmatch(mutant, pattern) for pattern in args.only):
            chosen[mutant] = tests
    if args.list:
        print("\n".join(f"{mutant:36} {' '.join(tests)}" for mutant, tests in chosen.items()))
        return 0
    torch.set_num_threads(1)
    return check(chosen, args.timeout, args.most)


def check(chosen: dict[str, list[str]], timeout: float, most: int) -> int:
    """Print what notices each; 0 where something does, and nothing fails by itself."""
    every = list(dict.fromkeys(test for tests in chosen.values() for test in tests))
    failed, last = noticed(NOTHING, every, timeout * max(1, len(every)), most)
    print(f"{NOTHING:36} {last}", flush=True)
    if failed:
        print("these fail with nothing switched off:", *failed, sep="\n    ")
        return 2
    unnoticed = []
    for mutant, tests in chosen.items():
        failed, last = noticed(mutant, tests, timeout, most)
        unnoticed += [] if failed else [mutant]
        print(f"{mutant:36} {' '.join(failed) or 'NOBODY NOTICES'}   [{last}]", flush=True)
    print(f"{len(chosen)} mutants, {len(unnoticed)} unnoticed:", *unnoticed)
    return int(bool(unnoticed))


if __name__ == "__main__":
    sys.exit(main())
