"""How an object of vLLM's learns what we do: its class becomes a subclass of itself, or another subclass of vLLM's."""

from collections.abc import Callable
from types import new_class
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput, ModelRunnerOutput

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


def carry(output: Any, name: str, make: Callable[[], Any]) -> Any:
    """Let a step's output carry something to the scheduler, as its attribute `name`. What `make` gives may wait for the
    device: where the output is still on its way from there, it is called when that has come."""
    if isinstance(output, AsyncModelRunnerOutput):
        swap(output, _carrying(type(output), name, make))
    else:
        setattr(output, name, make())
    return output


def _carrying(cls: Any, name: str, make: Callable[[], Any]) -> type:
    """The class that is laid over that of an output which is still on its way. It derives from it: an abstract base is
    among its bases, beside which another one would change the layout of instances."""

    class Carrying(cls):
        def get_output(self) -> ModelRunnerOutput:
            ready: ModelRunnerOutput = cls.get_output(self)
            setattr(ready, name, make())
            return ready

    return Carrying
