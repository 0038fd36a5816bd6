"""The one way in which an object of vLLM's learns what we do: its class becomes a subclass of itself."""

from functools import cache
from types import new_class
from typing import Any

Swapped: Any = object
"""The base of a mixin that is laid over a class of vLLM's: there it stands for what the instance was before."""


def swap(instance: Any, mixin: type, **attributes: Any) -> None:
    """Lay `mixin` over the class of one instance.

    The new class keeps its name, so that vLLM's interface checks, its weight loading, torch.compile and its log see the
    object they expect.

    Args:
        mixin: whose methods come first; `super()` in them is what the instance was before. It may derive from that.
        attributes: set on the instance, for the mixin's methods.
    """
    for name, value in attributes.items():
        setattr(instance, name, value)
    cls: Any = type(instance)
    instance.__class__ = _laid_over(cls, mixin)


@cache
def _laid_over(cls: type, mixin: type) -> type:
    names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return new_class(cls.__name__, (mixin, cls), {}, lambda namespace: namespace.update(names))
