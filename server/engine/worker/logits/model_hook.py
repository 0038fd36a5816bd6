"""The served model learns to run auxiliary models beside itself and to let the pipeline have its logits.

A forward pass that runs auxiliary models returns the base's hidden states with theirs beside them. Where rows of
prompts will be scored, two last columns name the token of the step that each row belongs to: whatever rows vLLM then
asks logits for carry what decoding needs. The logits asked for first after a forward pass are those to draw from, one
row for each of the batch's; they need no names.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.patch import swap
from whipstaff.server.engine.worker.auxiliary import Auxiliary
from whipstaff.server.engine.worker.logits.metadata import sent
from whipstaff.server.engine.worker.logits.pipeline import LogitsPipeline
from whipstaff.server.engine.worker.step import WorkerStep

_TAG_BASE = 256  # token = 256 * high + low: both columns are exact even in bfloat16 (256 is its last exact step)
_NUM_TAGS = 2


def compose(base: nn.Module, auxiliaries: Sequence[Auxiliary], step: WorkerStep, hidden_size: int) -> None:
    """Let the base model decode. `hidden_size` is its own."""
    swap(
        base,
        composite(type(base)),
        whipstaff_step=step,
        whipstaff_auxiliaries={auxiliary.name: auxiliary for auxiliary in auxiliaries},
        whipstaff_hidden_size=hidden_size,
        whipstaff_beside=NOTHING_BESIDE,
    )


class Beside(NamedTuple):
    """What stands beside a pass's hidden states: those of auxiliary models, then the tokens' names."""

    models: list[str]
    is_tagged: bool


NOTHING_BESIDE = Beside([], False)


def composite(cls: Any) -> type:
    """The class that is laid over the base model's, `cls`. It derives from it: many models have protocols among their
    bases, and beside those a further base would change the layout of instances, which must stay."""

    class Composite(cls):
        """Laid over the base model's class."""

        whipstaff_step: WorkerStep
        whipstaff_auxiliaries: dict[str, Auxiliary]
        whipstaff_hidden_size: int
        whipstaff_beside: Beside  # of the last pass

        def forward(
            self,
            input_ids: Tensor | None,
            positions: Tensor,
            intermediate_tensors: Any = None,
            inputs_embeds: Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            hidden = super().forward(input_ids, positions, intermediate_tensors, inputs_embeds, **kwargs)
            step, auxiliaries = self.whipstaff_step, self.whipstaff_auxiliaries
            if step.is_in_forward and step.is_plain:
                return hidden
            histories = step.pipeline.histories
            if histories is not None and (histories.num_held or not step.is_in_forward):  # captured graphs always do
                histories.keep(hidden)
            names = step.pipeline.needed_auxiliaries() if step.is_in_forward else list(auxiliaries)
            is_tagged = step.is_in_forward and step.pipeline.scores_prompts
            if not names and not is_tagged:
                return hidden
            # Models' captured graphs share memory: what one returned is overwritten as the next one runs.
            beside = [hidden.clone()]
            for name in names:
                beside.append(auxiliaries[name].forward(_ids(input_ids), positions).clone())
            if not step.is_in_forward:  # profiling or capture: they ran, nobody mixes
                return beside[0]
            self.whipstaff_beside = Beside(names, is_tagged)
            return torch.cat([*beside, *([_tags(hidden)] if is_tagged else [])], dim=-1)

        def compute_logits(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
            step = self.whipstaff_step
            if step.is_plain:
                plain: Tensor | None = super().compute_logits(hidden, *args, **kwargs)
                return plain
            own, others, tags = self._whipstaff_parts(hidden)
            logits: Tensor | None = super().compute_logits(own, *args, **kwargs)
            streams = {name: self.whipstaff_auxiliaries[name].compute_logits(part) for name, part in others.items()}
            if logits is None:  # tensor parallel: another rank samples
                return None
            drawn = step.drawn_logits
            rows = None if drawn is None else sent(drawn, logits.device)
            if step.pipeline.awaits_logits:
                logits = _decoded(step.pipeline, logits, streams, own, rows)
            elif tags is not None:
                logits = step.pipeline.decode_prompt(logits, streams, own, _tokens(tags))
            if step.edits.histories.awaited is not None:
                step.edits.histories.note_logits(logits if rows is None else logits[rows])
            return logits

        def _whipstaff_parts(self, hidden: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
            """The model's own hidden states, those of auxiliary models by name, and the columns that name tokens."""
            size = self.whipstaff_hidden_size
            names, is_tagged = self.whipstaff_beside if hidden.shape[-1] != size else NOTHING_BESIDE
            if not names and not is_tagged:
                return hidden.contiguous(), {}, None
            widths = [size, *(self.whipstaff_auxiliaries[name].hidden_size for name in names)]
            own, *others = torch.split(hidden, [*widths, *([_NUM_TAGS] if is_tagged else [])], dim=-1)
            tags = others.pop() if is_tagged else None
            parts = {name: part.contiguous() for name, part in zip(names, others, strict=True)}
            return own.contiguous(), parts, tags

    return Composite


def _decoded(
    pipeline: LogitsPipeline, logits: Tensor, streams: Mapping[str, Tensor], own: Tensor, rows: Tensor | None
) -> Tensor:
    """The logits, with `rows` as the pipeline makes them: (B,) one for each of the batch's; None: there are no others.
    Those verify drafts of requests that ask for no decoding."""
    if rows is None:
        return pipeline.decode(logits, streams, own)
    drawn = logits[rows]
    decoded = pipeline.decode(drawn, {name: part[rows] for name, part in streams.items()}, own[rows])
    return logits if decoded is drawn else logits.to(decoded.dtype).index_copy_(0, rows, decoded)


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
