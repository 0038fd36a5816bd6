"""Soft prompts: learned rows take the place of placeholder tokens' embeddings.

The module that embeds tokens learns to override its output by two persistent buffers, which a step fills where it has
placeholders. That is after the all-reduce of a vocabulary shared out over ranks and before models such as Gemma scale
what the embedding gives.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from whipstaff.cuda_ext import put_rows_
from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.worker.batch import BatchView, TokenSpan
from whipstaff.steering.kinds.rows import ROWS_PART
from whipstaff.steering.vector_file import Vector

NOTHING = -1


class NoSoftRows:
    """Where learned rows cannot take the place of tokens."""

    is_on = False

    def begin_step(self, view: BatchView) -> None:
        """Nobody asks for any."""


class SoftRows:
    """`rows` (max_tokens, H) in the model's type and `index` (max_tokens,) int32 are on the model's device; their
    addresses never change, so captured graphs read them. Token t of a step gets row index[t], if that is not NOTHING.
    """

    is_on = True

    def __init__(
        self,
        max_tokens: int,
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        vector_of: Callable[[str], Vector],
    ) -> None:
        self.rows = torch.zeros(max_tokens, hidden_size, dtype=dtype, device=device)
        self.index = torch.full((max_tokens,), NOTHING, dtype=torch.int32, device=device)
        self._own = torch.arange(max_tokens, dtype=torch.int32, device=device)
        self._vector_of = vector_of
        self._dirty = 0  # how many leading entries of `index` may differ from NOTHING

    def begin_step(self, view: BatchView) -> None:
        """Put the learned rows of this step's placeholders where its tokens stand."""
        if self._dirty:
            self.index[: self._dirty] = NOTHING
            self._dirty = 0
        for tokens, rows in self._learned(view):
            own = slice(tokens.first, tokens.last)
            self.rows[own].copy_(rows, non_blocking=True)
            self.index[own] = self._own[own]
            self._dirty = tokens.last

    def _learned(self, view: BatchView) -> Iterator[tuple[TokenSpan, Tensor]]:
        """The step's placeholders and the rows (n, H) that they get, on the host, in order of their tokens."""
        for row, placed in view.planned():
            for digest, start, num in placed.inserts:
                learned = self._vector_of(digest).shared_parts.get(
                    ROWS_PART
                )  # None: keys and values are learned instead
                tokens = view.tokens_at(row, start, start + num)
                if tokens is not None and learned is not None:
                    skipped = tokens.position - start
                    yield tokens, learned[skipped : skipped + tokens.last - tokens.first]


def install_soft_rows(
    model: nn.Module, config: Any, max_tokens: int, device: torch.device, vector_of: Callable[[str], Vector]
) -> SoftRows | NoSoftRows:
    """Let the module that embeds the model's tokens override its output, where that can be.

    Args:
        config: of vLLM's model. Where prompts may hold embeddings or images, tokens are embedded outside of the step.
        vector_of: finds a loaded vector by digest.
    """
    hidden_size = int(config.get_hidden_size())
    module = input_embedding(model, device, hidden_size)
    if module is None or config.is_multimodal_model or config.enable_prompt_embeds:
        return NoSoftRows()
    soft = SoftRows(max_tokens, hidden_size, config.dtype, device, vector_of)
    cls: Any = type(module)

    class Overridden(cls):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            embeddings: Tensor = cls.forward(self, *args, **kwargs)
            per_token = embeddings.view(-1, embeddings.shape[-1])
            put_rows_(per_token, self.whipstaff_soft_rows, self.whipstaff_soft_index)
            return embeddings

    module.register_buffer("whipstaff_soft_rows", soft.rows, persistent=False)
    module.register_buffer("whipstaff_soft_index", soft.index, persistent=False)
    swap(module, Overridden)
    return soft


def input_embedding(model: nn.Module, device: torch.device, hidden_size: int) -> nn.Module | None:
    """The module that turns token ids into the model's hidden states: the one that runs when the model embeds a token.

    An embedding that vLLM has wrapped for LoRA counts as its wrapper: learned rows are final.
    """
    seen: list[nn.Module] = []

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.shape == (1, hidden_size):
            seen.append(module)

    candidates = [module for module in model.modules() if _embeds(module)]
    hooks = [module.register_forward_hook(note) for module in candidates]
    try:
        model.embed_input_ids(torch.zeros(1, dtype=torch.long, device=device))  # type: ignore[operator]
    finally:
        for hook in hooks:
            hook.remove()
    return seen[-1] if seen and _is_whole(seen[-1]) else None  # wrappers run last


def _embeds(module: nn.Module) -> bool:
    bare = getattr(module, "base_layer", module)
    return isinstance(bare, VocabParallelEmbedding | nn.Embedding) and not isinstance(bare, ParallelLMHead)


def _is_whole(module: nn.Module) -> bool:
    """Whether every rank gets all of its output."""
    bare = getattr(module, "base_layer", module)
    return bool(getattr(bare, "reduce_results", True))
