"""LoRA adapters beside requests without one: two things that vLLM 0.32 leaves undone.

Until the first step, which token uses which adapter is uninitialised memory, and whoever embeds a token reads it. And
on a CPU, in a step where some tokens use an adapter, those that use none (index -1) get the one in the last slot.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from whipstaff.server.engine.patch import swap


def settle_adapters(runner: Any, model: nn.Module) -> None:
    """Let no token use an adapter that its request does not name."""
    runner._set_active_loras((0,), (0,), set())
    for wrapper in {module.punica_wrapper for module in model.modules() if hasattr(module, "punica_wrapper")}:
        if type(wrapper) is PunicaWrapperCPU:
            swap(wrapper, _SparingWrapper)


class _SparingWrapper(PunicaWrapperCPU):
    """Multiplies adapters with nothing for the tokens that use none."""

    def add_lora_linear(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        super().add_lora_linear(y, _spared(x, self.token_lora_indices), *args, **kwargs)

    def add_lora_embedding(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        super().add_lora_embedding(y, _spared(x, self.token_lora_indices), *args, **kwargs)

    def add_lora_logits(self, y: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> None:
        super().add_lora_logits(y, _spared(x, self.sampler_indices), *args, **kwargs)


def _spared(x: Tensor, adapters: Tensor) -> Tensor:
    """(T, n) with the rows of tokens that use no adapter at 0."""
    rows = x.view(-1, x.shape[-1])
    return rows.masked_fill((adapters < 0)[:, None], 0)


class StepAdapters:
    """Which adapter each token of a step uses, for what is computed of some of them once more."""

    def __init__(self, runner: Any) -> None:
        self._set: Any = None
        self._step: tuple[Any, ...] = ((), (), set())  # adapters' numbers by row, by token, and the adapters
        if runner.lora_config is not None:
            self._set, runner._set_active_loras = runner._set_active_loras, self._note

    def _note(self, *step: Any) -> None:
        self._step = step
        self._set(*step)

    @contextmanager
    def of(self, tokens: Sequence[int]) -> Iterator[None]:
        """Rows by the adapters that these tokens of the step use: a pass over one token each, or the head."""
        if self._set is None:
            yield
            return
        _, numbers, adapters, *more = self._step
        mine = tuple(numbers[token] for token in tokens)
        self._set(mine, mine, adapters, *more)
        try:
            yield
        finally:
            self._set(*self._step)
