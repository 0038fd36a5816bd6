"""Where heads look. These methods have parameters and no file; the engine serves them, there is nothing to edit.

attention_override  at the last prompt token, a head's probabilities become the given weights on the given keys
pasta               prompt keys outside the highlighted spans get log(alpha) on a head's scores, for every query
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.attention import AttentionEdit, AttentionMethod, RowOverride, ScoreBias
from whipstaff.steering.method import EditParams, HookPoint, Tensors, Trial
from whipstaff.steering.served import AttentionAbilities, ModuleAbilities
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.where import Interval, resolve_window

_Index = Annotated[int, Field(strict=True, ge=0, lt=1 << 31)]
_Layer = Annotated[int, Field(ge=0, lt=1 << 31)]  # a JSON key, so a string too
_Position = Annotated[int, Field(strict=True, ge=-(1 << 31), lt=1 << 31)]
_Weight = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Pattern(BaseModel):
    """One head's attention at the edited tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: _Index
    head: _Index = Field(description="query head")
    keys: list[_Position] = Field(min_length=1, max_length=256, description="prompt positions; negative from its end")
    weights: list[_Weight] | None = Field(None, description="one per key, summing to 1; none: equal weights")

    @model_validator(mode="after")
    def _is_a_distribution(self) -> "Pattern":
        if len(set(self.keys)) != len(self.keys):
            raise ValueError("a key is named twice")
        if self.weights is not None and len(self.weights) != len(self.keys):
            raise ValueError(f"{len(self.weights)} weights for {len(self.keys)} keys")
        if self.weights is not None and abs(sum(self.weights) - 1) > 1e-3:
            raise ValueError(f"the weights sum to {sum(self.weights):g}, not to 1")
        return self


class OverrideParams(EditParams):
    edits: list[Pattern] = Field(min_length=1, max_length=1024, description="heads and what they attend to")

    @model_validator(mode="after")
    def _heads_differ(self) -> "OverrideParams":
        heads = [(edit.layer, edit.head) for edit in self.edits]
        if len(set(heads)) != len(heads):
            raise ValueError("a head is named twice")
        return self


class AttentionOverride(AttentionMethod[OverrideParams]):
    name, paper = "attention_override", "Merullo et al. 2023, arXiv:2310.08744"
    params, sites, where = OverrideParams, (), "last_prompt"
    needs_file, is_relative, redirects = False, True, True
    off: ClassVar = {}
    example: ClassVar = {"edits": [{"layer": 0, "head": 0, "keys": [0]}]}
    parts: ClassVar = {}

    def check_model(self, params: OverrideParams, model: ModelShape) -> None:
        for index, edit in enumerate(params.edits):
            _check_head(edit.layer, edit.head, model, f"edits.{index}.layer", f"edits.{index}.head")

    def asked_layers(self, params: OverrideParams, tensors: Mapping[HookPoint, Tensors]) -> Mapping[int, str]:
        return {edit.layer: f"edits.{index}.layer" for index, edit in enumerate(params.edits)}

    def check_prompt(
        self, params: OverrideParams, intervals: Sequence[Interval], prompt_len: int, abilities: AttentionAbilities
    ) -> None:
        """The keys that heads are told to look at must be there."""
        first = intervals[0][0] if intervals else prompt_len - 1
        last = prompt_len - 1 if intervals and intervals[-1][1] is not None else None
        for index, edit in enumerate(params.edits):
            window = abilities.windows.get(edit.layer)
            for number, key in enumerate(edit.keys):
                position, path = key + prompt_len if key < 0 else key, f"edits[{index}].keys[{number}]"
                if not 0 <= position <= min(first, prompt_len - 1):
                    raise SteeringError(
                        f"position {key} is not at or before token {first}, the first whose heads are told", path
                    )
                if window is not None and (last is None or last - position >= window):
                    raise SteeringError(f"layer {edit.layer} sees {window} tokens back; position {key} is beyond", path)

    def attention_edits(
        self, params: OverrideParams, tensors: Mapping[HookPoint, Tensors], prompt_len: int
    ) -> Iterator[AttentionEdit]:
        """The heads' new attention, keys as absolute positions."""
        for edit in params.edits:
            keys = tuple(key + prompt_len if key < 0 else key for key in edit.keys)
            yield RowOverride(edit.layer, edit.head, keys, tuple(edit.weights or [1 / len(keys)] * len(keys)))


class PastaParams(EditParams):
    heads: dict[_Layer, Annotated[list[_Index], Field(min_length=1, max_length=1024)]] = Field(
        min_length=1, max_length=1024, description="layer -> query heads"
    )
    spans: list[tuple[_Position, _Position | None]] = Field(
        min_length=1, max_length=64, description="highlighted prompt windows, half-open; negative from the prompt's end"
    )
    alpha: float = Field(0.01, gt=0, le=1e4, allow_inf_nan=False, description="factor on attention; 1 changes nothing")
    scale_position: Literal["exclude", "include"] = Field(
        "exclude", description="which prompt keys the factor is for: those outside all spans, or those inside"
    )

    @model_validator(mode="after")
    def _spans_hold_tokens(self) -> "PastaParams":
        for start, end in self.spans:
            if end is not None and end <= start and (end < 0) == (start < 0):
                raise ValueError(f"span [{start}, {end}] is empty: spans are half-open, end > start")
        return self


class Pasta(AttentionMethod[PastaParams]):
    """As the release does, the factor is applied once per span: of k spans, keys inside one get it k - 1 times."""

    name, paper = "pasta", "Zhang et al. 2023, arXiv:2311.02262"
    params, sites, where = PastaParams, (), "all"
    needs_file, is_relative, redirects, ability = False, True, True, "bias"
    off: ClassVar = {"alpha": 1.0, "heads": {0: [0]}, "spans": [(0, None)]}
    parts: ClassVar = {}

    def is_off(self, params: PastaParams) -> bool:
        return params.alpha == 1

    def check_model(self, params: PastaParams, model: ModelShape) -> None:
        for layer, heads in params.heads.items():
            for index, head in enumerate(heads):
                _check_head(layer, head, model, f"heads.{layer}", f"heads.{layer}.{index}")

    def asked_layers(self, params: PastaParams, tensors: Mapping[HookPoint, Tensors]) -> Mapping[int, str]:
        return {layer: f"heads.{layer}" for layer in params.heads}

    def attention_edits(
        self, params: PastaParams, tensors: Mapping[HookPoint, Tensors], prompt_len: int
    ) -> Iterator[AttentionEdit]:
        """Additions to scores, one per span as in the release; they add up."""
        for start, end in params.spans:
            span = resolve_window(start, end, prompt_len)
            windows = outside(span, prompt_len) if params.scale_position == "exclude" else [span]
            amounts = tuple((first, last, math.log(params.alpha)) for first, last in windows)
            for layer, heads in params.heads.items():
                yield ScoreBias(layer, tuple(heads), amounts)

    def trials(self, abilities: ModuleAbilities) -> Iterator[Trial]:
        """Attention that looks away from most of the prompt, layer by layer."""
        for layer in abilities.attention.bias if abilities.attention else ():
            yield Trial(f"attention of layer {layer}", {"heads": {layer: [0]}, "spans": [[0, 2]]})


def outside(span: tuple[int, int], prompt_len: int) -> list[tuple[int, int]]:
    """The windows of the prompt that a span does not cover."""
    start, end = (min(position, prompt_len) for position in span)
    windows = [(0, start), (max(start, end), prompt_len)]
    return [(first, last) for first, last in windows if first < last]


def _check_head(layer: int, head: int, model: ModelShape, layer_path: str, head_path: str) -> None:
    if layer >= model.num_layers:
        raise SteeringError(f"the model has layers 0 to {model.num_layers - 1}", layer_path)
    if head >= model.num_heads:
        raise SteeringError(f"a layer has heads 0 to {model.num_heads - 1}", head_path)
