from collections.abc import Iterator
from typing import Any

import cuda_on_cpu
import pytest
import soak
import torch

MANY = 40_000  # elements of a batch, beyond which cuda_on_cpu takes seconds and shows nothing more


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What cuda_on_cpu would be slow at is tried at night."""
    late = [] if soak.SOAK else [item for item in items if _is_slow(getattr(item, "callspec", None))]
    config.hook.pytest_deselected(items=late)
    left = set(late)
    items[:] = [item for item in items if item not in left]


def _is_slow(case: Any) -> bool:
    """Whether parameters make a large batch for cuda_on_cpu."""
    given = case.params if case else {}
    num = given.get("num_tokens", given.get("num_rows", 1))
    return given.get("library") == "cuda_on_cpu" and num * given.get("hidden", given.get("vocab", 1)) > MANY


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """Inputs are random but fixed: near a mask's edge rounding decides, and no test should depend on luck."""
    torch.manual_seed(0)


@pytest.fixture(scope="module", params=["cpu", "cuda_on_cpu"])
def library(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whose operators the functions of cuda_ext run: the CPU's, and the CUDA kernels under g++."""
    if request.param == "cpu":
        yield
        return
    with cuda_on_cpu.instead():
        yield
