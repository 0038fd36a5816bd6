"""An object of vLLM's that learned something is still what it was, to who asks."""

import ast
from types import SimpleNamespace
from typing import Any, Protocol

from house.seam import ENGINE
from torch import nn

from whipstaff.server.engine.patch import Swapped, swap
from whipstaff.server.engine.worker.logits.model_hook import composite


class Sampler:
    """As vLLM has it."""

    def sample(self, logits: int) -> int:
        return logits


class Doubling(Swapped):
    factor: int

    def sample(self, logits: int) -> int:
        found: int = super().sample(self.factor * logits)
        return found


def test_only_the_one_instance_learns() -> None:
    one, other = Sampler(), Sampler()
    swap(one, Doubling, factor=2)
    assert (one.sample(3), other.sample(3)) == (6, 3)


def test_it_keeps_its_name_and_its_class() -> None:
    made: Any = Sampler()
    swap(made, Doubling, factor=2)
    cls = type(made)
    assert isinstance(made, Sampler) and cls is not Sampler
    assert (cls.__name__, cls.__qualname__, cls.__module__, cls.__doc__) == (
        Sampler.__name__,
        Sampler.__qualname__,
        Sampler.__module__,
        Sampler.__doc__,
    )


def test_it_may_learn_more_than_once_and_from_what_derives_from_it() -> None:
    class Adding(Sampler):
        def sample(self, logits: int) -> int:
            return super().sample(logits) + 1

    made = Sampler()
    swap(made, Doubling, factor=2)
    swap(made, Adding)
    assert made.sample(3) == 7


def test_over_a_model_of_protocols() -> None:
    """As vLLM's TransformersForCausalLM is one: a further base would not fit beside them."""

    class Draws(Protocol):
        def sample(self, logits: int) -> int: ...

    class Model(Draws, nn.Module):
        def sample(self, logits: int) -> int:
            return logits

        def forward(self, *args: Any) -> str:
            return "hidden"

    made = Model()
    step = SimpleNamespace(is_in_forward=False, pipeline=SimpleNamespace(histories=None))
    swap(made, composite(Model), whipstaff_step=step, whipstaff_auxiliaries={})
    assert made(None, None) == "hidden" and type(made) is not Model


def test_no_class_is_swapped_by_hand() -> None:
    """So that the seam's list finds every class that is laid over vLLM's."""
    by_hand = [
        path.name
        for path in ENGINE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store)
    ]
    assert by_hand == ["patch.py"]
