"""Ways to run the engine, also those that vLLM does not offer on a CPU by itself."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from vllm.platforms.cpu import CpuPlatform

MODES: dict[str, dict[str, Any]] = {
    "v1-eager-async": {"enforce_eager": True, "async_scheduling": True},
    "v1-compiled-sync": {"async_scheduling": False},
    "v2-eager-async": {"enforce_eager": True, "async_scheduling": True},
    "v2-eager-sync": {"enforce_eager": True, "async_scheduling": False},
    "v1-eager-two-ranks": {"enforce_eager": True, "async_scheduling": False, "tensor_parallel_size": 2},
    "v1-eager-drafts": {
        "enforce_eager": True,
        "async_scheduling": False,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 4,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
    },
    "v1-compiled-async": {"async_scheduling": True},
    "v1-traced-sync": {"async_scheduling": False},
    "v1-traced-async": {"async_scheduling": True},
}
"""A compiled mode is what is served: Inductor makes kernels of Dynamo's graphs, which takes a minute for each engine. A
traced mode runs the graphs as they are."""
THREE = ("v1-eager-async", "v1-compiled-sync", "v2-eager-async")
"""Both runners, eager and compiled, synchronous and asynchronous: what is shown in these is shown in all."""
ON_V1 = THREE[:2]
"""For what the runners share, where Triton's interpreter would take minutes."""
COMPILED_WITH_RANKS = ("v1-eager-two-ranks", "v1-compiled-async", "v2-eager-async")
"""As THREE, with two ranks among them."""
TRACED = ("v1-eager-async", "v1-traced-sync", "v2-eager-async")
"""As THREE, for engines whose graphs contain nothing that the engines of those modules do not compile."""
WITH_RANKS = ("v1-eager-two-ranks", "v1-traced-async", "v2-eager-async")
"""The same, with two ranks among them."""


@contextmanager
def run_as(mode: str) -> Iterator[None]:
    """While an engine starts: what its mode needs beside its flags."""
    with ExitStack() as stack:
        if mode.startswith("v2"):
            stack.enter_context(v2_on_cpu())
        if "traced" in mode:
            stack.enter_context(without_inductor())
        if MODES[mode]["async_scheduling"]:
            stack.enter_context(async_on_cpu())
        if "tensor_parallel_size" in MODES[mode]:
            stack.enter_context(a_core_for_each_rank())
        yield


@contextmanager
def v2_on_cpu() -> Iterator[None]:
    """Run Model Runner V2 here: Triton's interpreter stands in for a GPU (tests/v2_on_cpu/sitecustomize.py)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1] / "v2_on_cpu"), prepend=os.pathsep)
        patch.setenv("WHIPSTAFF_TEST_TRITON_CPU", "1")
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        patch.setattr("vllm.config.vllm.HAS_TRITON", True)  # in the engine's own processes it really is there
        yield


@contextmanager
def without_inductor() -> Iterator[None]:
    """As vLLM tests its own CPU backend; graphs are traced in the first step, since nothing warms them up. That must
    have more than one token: a graph that is traced over one writes beyond its memory in any longer step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_CI_ENV", "1")
        yield


@contextmanager
def a_core_for_each_rank() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
        yield


@contextmanager
def async_on_cpu() -> Iterator[None]:
    """vLLM's CPU platform switches asynchronous scheduling off; the engine itself can do it here too."""
    settle = CpuPlatform.check_and_update_config.__func__

    def keep(cls: Any, config: Any) -> None:
        settle(cls, config)
        config.scheduler_config.async_scheduling = True

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(keep))
        yield
