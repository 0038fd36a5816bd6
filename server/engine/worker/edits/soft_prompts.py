"""Soft prompts: learned rows take the place of placeholder tokens' embeddings.

The module that embeds tokens learns to override its output by two persistent buffers, which a step fills where it has
placeholders. That is after the all-reduce of a vocabulary shared out over ranks and before models such as Gemma scale
what the embedding gives.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from whipstaff.cuda_ext import put_rows_
from whipstaff.server.engine.worker.batch import BatchView
from whipstaff.steering.kinds.rows import ROWS_PART
from whipstaff.steering.vector_file import Vector

NOTHING = -1


class Piece(NamedTuple):
    """A stretch of the step's tokens and the learned rows that they get."""

    first: int
    last: int  # exclusive
    rows: Tensor  # (last - first, H) on the host


class SoftRows:
    """`rows` (max_tokens, H) in the model's type and `index` (max_tokens,) int32 are on the model's device; their
    addresses never change, so captured graphs read them. Token t of a step gets row index[t], if that is not NOTHING.
    """

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
        for first, last, rows in self._pieces(view):
            self.rows[first:last].copy_(rows, non_blocking=True)
            self.index[first:last] = self._own[first:last]
            self._dirty = last

    def _pieces(self, view: BatchView) -> Iterator[Piece]:
        """In order of their tokens."""
        for row, placed in view.planned():
            token, position = int(view.starts[row]), int(view.positions[row])
            end = position + int(view.starts[row + 1]) - token
            for digest, start, num in placed.inserts:
                first, last = max(start, position), min(start + num, end)
                learned = self._vector_of(digest).shared_parts.get(ROWS_PART)  # None: keys and values are learned
                if first < last and learned is not None:
                    rows = learned[first - start : last - start]
                    yield Piece(token + first - position, token + last - position, rows)


def install_soft_rows(
    model: nn.Module, config: Any, max_tokens: int, device: torch.device, vector_of: Callable[[str], Vector]
) -> SoftRows | None:
    """Let the module that embeds the model's tokens override its output; None where that cannot be.

    Args:
        config: of vLLM's model. Where prompts may hold embeddings or images, tokens are embedded outside of the step.
        vector_of: finds a loaded vector by digest.
    """
    hidden_size = int(config.get_hidden_size())
    module = input_embedding(model, device, hidden_size)
    if module is None or config.is_multimodal_model or config.enable_prompt_embeds:
        return None
    soft = SoftRows(max_tokens, hidden_size, config.dtype, device, vector_of)
    cls: Any = type(module)

    class Overridden(cls):
        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            embeddings: Tensor = cls.forward(self, *args, **kwargs)
            per_token = embeddings.view(-1, embeddings.shape[-1])
            put_rows_(per_token, self.whipstaff_soft_rows, self.whipstaff_soft_index)
            return embeddings

    Overridden.__name__, Overridden.__qualname__, Overridden.__module__ = (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    module.register_buffer("whipstaff_soft_rows", soft.rows, persistent=False)
    module.register_buffer("whipstaff_soft_index", soft.index, persistent=False)
    module.__class__ = Overridden
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
