"""How an object of vLLM's learns what we do: its class becomes a subclass of itself, or another subclass of vLLM's."""

from types import new_class
from typing import Any

Swapped: Any = object
"""The base of a mixin that is laid over a class of vLLM's: there it stands for what the instance was before."""


def swap(instance: Any, mixin: type, **attributes: Any) -> None:
    """Lay `mixin` over the class of one instance.

    The new class keeps its name, so that vLLM's interface checks, its weight loading, torch.compile and its log see the
    object they expect.

    Args:
        mixin: whose methods come first; `super()` in them is what the instance was before. It may derive from that, and
            must where protocols are among the bases: Python replaces a class only by one of the same layout.
        attributes: set on the instance, for the mixin's methods.
    """
    cls = type(instance)
    names = {"__qualname__": cls.__qualname__, "__module__": cls.__module__, "__doc__": cls.__doc__}
    for name, value in attributes.items():
        setattr(instance, name, value)
    become(instance, new_class(cls.__name__, (mixin, cls), {}, lambda namespace: namespace.update(names)))


def become(instance: Any, cls: type) -> None:
    """Let an instance be of another class, with the same layout and attributes."""
    instance.__class__ = cls
