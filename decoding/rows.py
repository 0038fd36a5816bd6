"""Rows: logits of the requests that use one method, side by side, and what else of them a method may read."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Rows:
    """R rows of one step, each about to become one token; all name the same streams and heads. What a method does not
    declare in its `needs` is None."""

    logits: Tensor  # (R, V) float32
    num_prompt: Sequence[int]  # (R,) tokens in the prompt
    num_generated: Sequence[int]  # (R,) tokens generated before this one
    tokens: Tensor | None = None  # (R, W) int64 prompt and generation so far; -1 from each row's own end on
    hidden: Tensor | None = None  # (R, H) the last hidden state, after the final norm
    random: Tensor | None = None  # (R,) float32 in [0, 1), the same for the same seed and position
    temperature: Tensor | None = None  # (R,) float32 what the requests say; 0 is greedy
    state: Tensor | None = None  # (R, num_state) float32, NaN at first; what is written here comes back next time
    streams: Mapping[str, Tensor] = field(default_factory=dict)  # stream field -> (R, V') that model's raw logits
    heads: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)  # head field -> part -> float32 tensor
    early_exit: Tensor | None = None  # (P, V) logits of the early layers that each row reads, row after row
    early_layers: Sequence[Sequence[int]] = ()  # (R,) which layers those are
    lookahead: Callable[[Tensor], Tensor] | None = None  # (R,) tokens to try -> (R, H) hidden states they lead to
    attention: Tensor | None = None
    """(R, C) float32: how much the token before the one to be drawn looked at every position up to its own, in the
    model's last layer: the largest probability among the heads, so that a row need not sum to 1. 0 beyond."""
    history: Sequence[Tensor] | None = None  # (R,) of (positions so far, H) last hidden states, each of length 1
    is_prompt: bool = False  # whether the rows are a prompt's, to be scored and not drawn from
    facts: dict[str, Tensor] = field(default_factory=dict)  # what a method wants explained: name -> (R,) or (R, n)
    judged: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """The same of the token that will be drawn: name -> (R, n) ids, (R, n) what each is found worth, a probability."""

    def column(self, values: Iterable[float]) -> Tensor:
        """(R, 1) float32 beside the logits: one number per row, sent without waiting for the device."""
        return torch.tensor(list(values), dtype=torch.float32).to(self.logits.device, non_blocking=True)[:, None]

    def best(self) -> tuple[Tensor, Tensor]:
        """(R,) the best token's logit, and (R,) its log-probability."""
        return self.logits.amax(1), self.logits.log_softmax(1).amax(1)
