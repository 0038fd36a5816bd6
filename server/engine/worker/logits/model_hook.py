"""The served model learns to run auxiliary models beside itself and to let the decoder have its logits.

A forward pass that runs auxiliary models returns the base's hidden states with theirs beside them. Where rows of
prompts will be scored, two last columns name the token of the step that each row belongs to: whatever rows vLLM then
asks logits for carry what decoding needs. The logits asked for first after a forward pass are those to draw from, one
row for each of the batch's; they need no names.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.worker.auxiliary import Auxiliary
from whipstaff.server.engine.worker.edits.sites import KINDS
from whipstaff.server.engine.worker.logits.early_exit import EarlyHead
from whipstaff.server.engine.worker.logits.pipeline import LogitsPipeline
from whipstaff.server.engine.worker.lora import StepAdapters
from whipstaff.server.engine.worker.step import WorkerStep
from whipstaff.steering.sites import final_norm

_TAG_BASE = 256  # token = 256 * high + low: both columns are exact even in bfloat16 (256 is its last exact step)
_NUM_TAGS = 2


def compose(
    base: nn.Module, auxiliaries: Sequence[Auxiliary], steerer: WorkerStep, hidden_size: int, adapters: StepAdapters
) -> None:
    """Give the base model's instance a subclass of its class that decodes."""
    cls: Any = type(base)
    by_name = {auxiliary.name: auxiliary for auxiliary in auxiliaries}
    pipeline: LogitsPipeline = steerer.pipeline

    class Composite(cls):
        whipstaff_beside: tuple[list[str], bool] = ([], False)  # what stands beside the hidden states

        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            hidden = cls.forward(self, input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            names = pipeline.needed_auxiliaries() if by_name else []
            beside = [by_name[name].forward(_ids(input_ids), positions) for name in names]
            is_tagged = pipeline.scores_prompts
            if not pipeline.is_in_step or not (names or is_tagged):  # profiling or capture: they ran, nobody mixes
                return hidden
            self.whipstaff_beside = names, is_tagged
            return torch.cat([hidden, *beside, *([_tags(hidden)] if is_tagged else [])], dim=-1)

        def compute_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            names, is_tagged = self.whipstaff_beside if hidden.shape[-1] != hidden_size else ([], False)
            widths = [hidden_size, *(by_name[name].hidden_size for name in names), *([_NUM_TAGS] if is_tagged else [])]
            own, *others = torch.split(hidden, widths, dim=-1) if len(widths) > 1 else [hidden]
            own = own.contiguous()
            logits: Tensor | None = cls.compute_logits(self, own, *args, **kwargs)
            streams = {
                name: by_name[name].compute_logits(part.contiguous()) for name, part in zip(names, others, strict=False)
            }
            if logits is None:  # tensor parallel: another rank samples
                return None
            if pipeline.awaits_logits:
                logits = pipeline.decode(logits, streams, own)
            elif is_tagged:
                logits = pipeline.decode_prompt(logits, streams, own, _tokens(others[-1]))
            steerer.note_logits(logits)
            return logits

    Composite.__name__, Composite.__qualname__ = cls.__name__, cls.__qualname__
    Composite.__module__ = cls.__module__
    base.__class__ = Composite
    assert steerer.tables is not None
    head = partial(cls.compute_logits, base)
    pipeline.early = EarlyHead(head, final_norm(base, KINDS), steerer.tables, adapters)


def _ids(input_ids: Tensor | None) -> Tensor:
    if input_ids is None:
        raise UnsupportedEngine("auxiliary models need token ids, and this step has embeddings only")
    return input_ids


def _tags(like: Tensor) -> Tensor:
    """(T, 2) columns that name each token."""
    tokens = torch.arange(like.shape[0], device=like.device)
    return torch.stack([tokens // _TAG_BASE, tokens % _TAG_BASE], 1).to(like.dtype)


def _tokens(tags: Tensor) -> list[int]:
    """The tokens that rows are named for. Waits for the device, as scoring prompts does anyway."""
    high, low = tags.to(torch.int64).unbind(-1)
    found: list[int] = (high * _TAG_BASE + low).tolist()
    return found
