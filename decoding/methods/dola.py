"""DoLa: what the last layer knows beyond an early one.

    s = log-softmax(last) - log-softmax(early)    on tokens at least `relative_top` times as likely as the best

Of the candidates, each row takes the early layer that differs most from its last one (see `decoding.layers`). Early
rows are the model's head on the residual stream, without the final norm unless asked for. The authors average the
choice over a batch; here every row has its own. Their runs come with a repetition penalty of 1.2, which is vLLM's
`repetition_penalty`. Chuang et al. 2024, arXiv:2309.03883.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from whipstaff.cuda_ext import divergences
from whipstaff.decoding.layers import choose, contrast, scored
from whipstaff.decoding.method import DecodingError, Depth, LogitsRewriter, Params
from whipstaff.decoding.rows import Rows

Layer = Annotated[int, Field(strict=True, ge=0, lt=1 << 16)]


class DolaParams(Params):
    """Which layers to choose from."""

    method: Literal["dola"] = "dola"
    layers: Literal["low", "high"] | Annotated[list[Layer], Field(min_length=1, max_length=64)] = Field(
        "low", description="candidates: 0 is the embeddings, l the output of the l-th block; or half of the model"
    )
    relative_top: float = Field(
        0.1, ge=0, le=1, allow_inf_nan=False, description="0 keeps every token, 1 the best only"
    )
    final_norm_on_candidates: bool = Field(False, description="whether early layers pass the model's final norm")
    post_softmax: bool | None = Field(
        None,
        description="how prompts are scored: true normalises over all tokens, false leaves the differences of "
        "log-probabilities; null normalises over plausible tokens, as draws do",
    )
    relative_top_value: float = Field(
        -1000.0, ge=-1e6, le=0, allow_inf_nan=False, description="the score of implausible tokens, unless that is null"
    )

    @field_validator("layers", mode="before")
    @classmethod
    def _names_some(cls, layers: Any) -> Any:
        if layers not in ("low", "high") and not (isinstance(layers, list) and layers):
            raise ValueError('"low", "high" or a list of layers')
        return layers


class Dola(LogitsRewriter[DolaParams]):
    name, paper = "dola", "Chuang et al. 2024, arXiv:2309.03883"
    stage, params = "mix", DolaParams
    needs = frozenset({"early_exit"})
    shorthands: ClassVar[Mapping[str, str]] = {"dola_layers": "layers"}
    switches = (frozenset({"layers"}),)

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        """No layer to contrast with is no DoLa; relative_top 1 is greedy."""

    def early_layers(self, params: DolaParams, depth: Depth) -> Sequence[int]:
        layers = candidates(params.layers, depth) if isinstance(params.layers, str) else sorted(set(params.layers))
        if params.final_norm_on_candidates and not depth.has_norm:
            raise DecodingError("this model's structure does not show its final norm", "final_norm_on_candidates")
        if (last := layers[-1]) >= depth.num_layers:
            raise DecodingError(
                f"layer {last} is no early one; the model has {depth.num_layers} blocks, its early layers are 0 to "
                f"{depth.num_layers - 1}",
                "layers",
            )
        return layers

    def takes_norm(self, params: DolaParams) -> bool:
        return params.final_norm_on_candidates

    def tells_scores(self, params: DolaParams) -> bool:
        return params.post_softmax is not None

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        assert rows.early_exit is not None
        counts = [len(layers) for layers in rows.early_layers]
        pairs = [(row, layer) for row, layers in enumerate(rows.early_layers) for layer in layers]
        table = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).T.contiguous()
        owners, layers = table.to(rows.logits.device, non_blocking=True)
        chosen = choose(divergences(rows.logits, rows.early_exit, owners), counts)
        rows.facts["layer"] = layers[chosen]
        streams = rows.logits, rows.early_exit, chosen, rows.column(one.relative_top for one in settings)[:, 0]
        drawn = contrast(*streams)
        if not rows.is_prompt or not any(map(self.tells_scores, settings)):
            return drawn
        post_softmax = rows.column(bool(one.post_softmax) for one in settings)[:, 0] > 0
        scores = scored(*streams, post_softmax, rows.column(one.relative_top_value for one in settings)[:, 0])
        return torch.where(rows.column(map(self.tells_scores, settings)) > 0, scores, drawn)


def candidates(half: Literal["low", "high"], depth: Depth) -> list[int]:
    """Every other layer of the lower or the upper half, of 20 in models of more than 40; as in Hugging Face's port,
    without the embeddings where the head is the embedding's own, which would only see the token again."""
    num = depth.num_layers
    if half == "high":
        return list(range(num // 2 if num <= 40 else num - 20, num, 2))
    first = min(2, num - 1) if depth.is_tied else 0
    return list(range(first, num // 2 if num <= 40 else 20, 2)) or [first]
