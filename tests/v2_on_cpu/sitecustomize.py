"""Model Runner V2 on a machine without a GPU, for tests: Triton's interpreter, and a back end that says it is there.

Python imports this at start-up wherever this folder is on PYTHONPATH, so the engine's processes get it too; it does
nothing unless WHIPSTAFF_TEST_TRITON_CPU is set. vLLM takes Triton for usable when a back end's driver is active.
"""

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any


def _plant_backend(backends: Any) -> None:
    driver = type("InterpreterDriver", (), {"is_active": staticmethod(lambda: True)})
    backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def _truncate_in_torch(sampler: Any) -> None:
    """The interpreter cannot run vLLM's Triton kernel of top-k and top-p (its loop counts in Python's integers)."""
    sampler.HAS_TRITON = False


class _After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module as usual, then changes it."""

    def __init__(self, name: str, change: Callable[[Any], None]) -> None:
        self._name, self._change = name, change

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self._name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        self._change(module)


if os.environ.get("WHIPSTAFF_TEST_TRITON_CPU"):
    os.environ["TRITON_INTERPRET"] = "1"
    sys.meta_path[:0] = [
        _After("triton.backends", _plant_backend),
        _After("vllm.v1.sample.ops.topk_topp_sampler", _truncate_in_torch),
    ]
if os.environ.get("WHIPSTAFF_TEST_MUTANT"):  # Python imports one sitecustomize only, and tests/mutation has another
    from mutants import plant

    plant(os.environ["WHIPSTAFF_TEST_MUTANT"])
