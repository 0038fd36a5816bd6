"""Shared settings of the tests, and how `pytest -n 2` shares them out between processes."""

import os

import hypothesis
import pytest
import torch

torch.set_num_threads(1)  # references are tiny, and the engine beside them wants the other core
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may look for a model hub
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
# what a property costs says how busy the machine is, and nothing of the property
hypothesis.settings.register_profile("shared-machine", deadline=None)
hypothesis.settings.load_profile("shared-machine")

if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # vLLM would choose the same core for the engines of all
    cores = sorted(os.sched_getaffinity(0))
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", str(cores[int(worker.removeprefix("gw")) % len(cores)]))

# fixtures of engines; a session's serve several modules
SHARED = ("server", "demo_server", "shared", "recorded", "ahead")
LONGEST = (  # groups, the longest first: with an engine, and without
    *("server", "demo_server", "test_registry_http", "test_companions_http", "test_isolation", "test_many"),
    *("test_prometheus", "shared-v2-eager-async", "shared-v1-eager-async", "shared-v1-compiled-sync"),
    *("ahead-v1-compiled-async", "ahead-v2-eager-async", "test_main"),
    *("test_wheel", "test_install", "test_importers", "test_methods", "test_demo", "test_groups"),
    *("test_run_edits-cuda_on_cpu", "test_mix_logits-cuda_on_cpu", "test_run_edits-cpu"),
)


def pytest_configure(config: pytest.Config) -> None:
    """xdist would begin with the groups that have the most tests, and end with one of few that takes minutes."""
    config.option.loadscopereorder = False


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups there, too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one engine come one after another, in one process; what takes longest begins first, and what needs no
    engine fills the gaps at the end.

    An engine's processes are forks that inherit the filters: there a warning of torch's would end the engine.
    """
    groups = [_group(item) for item in items]
    first = {name: index for index, name in reversed(list(enumerate(groups)))}
    engines = {name for name, item in zip(groups, items, strict=True) if item.get_closest_marker("engine")}
    for name, item in zip(groups, items, strict=True):
        if name.split("-")[0] in SHARED and name not in engines:
            raise pytest.UsageError(f"{item.nodeid} starts an engine: mark it so")
        item.add_marker(pytest.mark.xdist_group(name))
        if name in engines:
            item.add_marker(pytest.mark.filterwarnings("default"))
    place = {name: index for index, name in enumerate(LONGEST)}
    rank = {name: (name not in engines, place.get(name, len(LONGEST)), first[name]) for name in first}
    order = sorted(range(len(items)), key=lambda index: rank[groups[index]])
    items[:] = [items[index] for index in order]


def _group(item: pytest.Item) -> str:
    """The engine that a test shares with others: of several modules, or its module's in one of its modes. A module
    without an engine is a group."""
    assert isinstance(item, pytest.Function)
    fixtures = {name: found[-1].scope for name, found in item._fixtureinfo.name2fixturedefs.items()}
    params = item.callspec.params if hasattr(item, "callspec") else {}
    name = next((name for name in SHARED if fixtures.get(name) == "session"), item.path.stem)
    modes = [str(value) for name, value in params.items() if fixtures.get(name, "function") != "function"]
    return "-".join([name, *modes])
