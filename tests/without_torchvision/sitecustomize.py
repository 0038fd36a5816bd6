"""vLLM's module of LLaVA on a machine without torchvision, for tests: it imports the images of another model, Pixtral,
which do import torchvision. LLaVA itself has CLIP's, and those transformers also makes without.

Python imports this at start-up wherever this folder is on PYTHONPATH, so the engine's processes get it too. Nobody else
finds a torchvision.
"""

import importlib.abc
import importlib.util
import sys
from types import ModuleType
from typing import Any

_ASKING = "transformers.models.pixtral.image_processing_pixtral"
_ASKED = ("torchvision", "torchvision.transforms", "torchvision.transforms.v2", "torchvision.transforms.v2.functional")


class _Naming(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads one module as usual, to which modules are there that have nothing but their names."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != _ASKING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        self._loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        made = {name: ModuleType(name) for name in _ASKED}
        for name in _ASKED[1:]:
            owner, _, own = name.rpartition(".")
            setattr(made[owner], own, made[name])
        sys.modules.update(made)
        try:
            self._loader.exec_module(module)
        finally:
            for name in made:
                del sys.modules[name]


sys.meta_path.insert(0, _Naming())
