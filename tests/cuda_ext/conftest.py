from collections.abc import Iterator

import cuda_on_cpu
import pytest
import torch


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
