"""Shared settings of the tests."""

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An engine's processes are forks that inherit the filters: there a warning of torch's would end the engine."""
    for item in items:
        if item.get_closest_marker("engine"):
            item.add_marker(pytest.mark.filterwarnings("default"))
