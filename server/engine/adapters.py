"""LoRA adapters beside requests without one: two things that vLLM 0.32 leaves undone.

Until the first step, which token uses which adapter is uninitialised memory, and whoever embeds a token reads it. And
on a CPU, in a step where some tokens use an adapter, those that use none (index -1) get the one in the last slot.
"""

from typing import Any

from torch import Tensor, nn
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU


def settle_adapters(runner: Any, model: nn.Module) -> None:
    """Let no token use an adapter that its request does not name."""
    runner._set_active_loras((0,), (0,), set())
    for wrapper in {module.punica_wrapper for module in model.modules() if hasattr(module, "punica_wrapper")}:
        if type(wrapper) is PunicaWrapperCPU:
            wrapper.__class__ = _SparingWrapper


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
