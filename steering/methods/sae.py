"""Features of a sparse autoencoder: set, scaled or added to, with or without all that the autoencoder misses.

    a = act(encoder (norm(x) - [decoder_bias]) + encoder_bias)      x <- x + scale * norm^-1((a' - a) decoder)
    without the error term:                                         x <- x + scale * (decode(a') - x)
    decode(a) = norm^-1(a decoder + decoder_bias)

act is ReLU, JumpReLU (above a threshold per feature) or TopK (the k largest, then ReLU). Only the named features' rows
are read, but for TopK, which needs all readings to know the k largest, and without the error term, where all features
are decoded. Both matrices have a row per feature: SAELens' W_enc is transposed, W_dec is not. `input_scale` is SAELens'
factor of `expected_average_only_in`, `use_error_term` its switch of that name.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from whipstaff.cuda_ext import Phi
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import Directions, EditOp, Replacement, TopK
from whipstaff.steering.shape import ModelShape

MAX_FEATURES = 64  # the directions that read one row together
_NORMS = {"none": "none", "constant_norm_rescale": "constant_norm", "layer_norm": "layer_norm"}
_Feature = Annotated[int, Field(strict=True, ge=0)]
_Value = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class FeatureEdit(BaseModel):
    """What happens to one feature's activation: exactly one of set, scale, add."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature: _Feature
    set: _Value | None = Field(None, description="the activation becomes this")
    scale: _Value | None = Field(None, description="the activation is multiplied by this; 0 ablates the feature")
    add: _Value | None = Field(None, description="this is added to the activation")
    only_if_active: bool = Field(False, description="only where the feature is active")

    @model_validator(mode="after")
    def _is_one_edit(self) -> "FeatureEdit":
        if [self.set, self.scale, self.add].count(None) != 2:
            raise ValueError("name one of set, scale, add")
        return self


class Autoencoder(Scaled):
    """How the file's autoencoder computes; a file states these among its defaults."""

    activation: Literal["relu", "jumprelu", "topk"] = Field("relu", description="what the encoder ends with")
    k: int | None = Field(None, strict=True, ge=1, description="how many features are active at most; topk needs it")
    apply_b_dec_to_input: bool = Field(True, description="whether the decoder's bias is taken off before encoding")
    normalize_activations: Literal["none", "constant_norm_rescale", "layer_norm"] = Field(
        "none", description="what is done to every row before encoding, and undone after decoding"
    )


class SAEParams(Autoencoder):
    features: list[FeatureEdit] = Field(min_length=1, max_length=MAX_FEATURES, description="edits of single features")
    use_error_term: bool = Field(
        True, description="whether what the autoencoder misses of a row is kept; if not, the row is decoded anew"
    )


A = TypeVar("A", bound=Autoencoder)


class Sparse(ScaledMethod[A]):
    """What the methods below share."""

    sites, where = ("resid_pre", "resid_post", "attn_head", "attn_out", "mlp_out"), "all"
    parts: ClassVar = {
        "encoder": ("features", "width"),
        "encoder_bias?": ("features",),
        "decoder": ("features", "width"),
        "decoder_bias?": ("width",),
        "threshold?": ("features",),
        "input_scale?": (),
    }

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if "input_scale" in tensors and not tensors["input_scale"] > 0:
            raise SteeringError(f"input_scale of {point.site} {point.layer} is not positive")
        if "threshold" in tensors and (tensors["threshold"] < 0).any():
            raise SteeringError(f"threshold of {point.site} {point.layer} has negative entries")

    def check_file(self, params: A, defaults: Mapping[str, Any]) -> None:
        """Room for an encoder, and what it reads, is settled when the server starts."""
        said: Any = self.params.model_construct(**defaults)
        for name in ("activation", "apply_b_dec_to_input", "normalize_activations"):
            if "topk" in (params.activation, said.activation) and getattr(params, name) != getattr(said, name):
                raise SteeringError(f"the file says {getattr(said, name)!r}; with topk that cannot be changed", name)

    def encoder_size(self, tensors: Tensors, defaults: Mapping[str, Any]) -> int:
        default = self.params.model_fields["activation"].default
        return len(tensors["encoder"]) if defaults.get("activation", default) == "topk" else 0


class SAE(Sparse[SAEParams]):
    name, params = "sae", SAEParams
    paper = "Templeton et al. 2024; TopK: Gao et al. 2024, arXiv:2406.04093; JumpReLU: arXiv:2407.14435; as in SAELens"
    off: ClassVar = {"scale": 0.0, "features": [{"feature": 0, "scale": 1.0}]}
    example: ClassVar = {"features": [{"feature": 0, "add": 6.0}]}

    def check_params(self, params: SAEParams, tensors: Mapping[HookPoint, Tensors]) -> None:
        _check_autoencoder(params, tensors)
        paths = [f"features.{index}.feature" for index in range(len(params.features))]
        _check_features([edit.feature for edit in params.features], paths, tensors)

    def edits(self, tensors: Tensors, params: SAEParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        make = _edited if params.use_error_term else _decoded
        return (make(tensors, params, params.features, model.width(point.site)),)


class LFParams(Autoencoder):
    activation: Literal["relu", "jumprelu", "topk"] = Field("topk", description="what the encoder ends with")
    features: list[_Feature] = Field(
        min_length=1, max_length=MAX_FEATURES, description="the features that tell consistent from inconsistent answers"
    )
    bias: _Value = Field(1.0, description="put on those of them that are active, times scale")


class LFSteering(Sparse[LFParams]):
    """LF-Steering: a scaled bias on the active ones among the features that paraphrases were found to differ in."""

    name, params, paper = "lf_steering", LFParams, "Yang et al. 2025, arXiv:2501.11036"
    off: ClassVar = {"scale": 0.0, "features": [0], "k": 1}
    example: ClassVar = {"features": [0], "k": 8}

    def check_params(self, params: LFParams, tensors: Mapping[HookPoint, Tensors]) -> None:
        _check_autoencoder(params, tensors)
        paths = [f"features.{index}" for index in range(len(params.features))]
        _check_features(params.features, paths, tensors)

    def edits(self, tensors: Tensors, params: LFParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        edits = [FeatureEdit(feature=feature, add=params.bias, only_if_active=True) for feature in params.features]
        return (_edited(tensors, params, edits, model.width(point.site)),)


def _check_autoencoder(params: Autoencoder, tensors: Mapping[HookPoint, Tensors]) -> None:
    if (params.activation == "topk") != (params.k is not None):
        raise SteeringError("k goes with the activation topk, and topk needs it", "k")
    for point, parts in tensors.items():
        num_features = len(parts["encoder"])
        if params.activation == "jumprelu" and "threshold" not in parts:
            raise SteeringError(f"jumprelu needs a threshold; {point.site} {point.layer} has none", "activation")
        if params.k is not None and params.k > num_features:
            raise SteeringError(f"{params.k} of {num_features} features cannot be active", "k")
        if params.normalize_activations != "none" and "input_scale" in parts:
            raise SteeringError("the file has an input_scale; it goes with none", "normalize_activations")


def _check_features(features: Sequence[int], paths: Sequence[str], tensors: Mapping[HookPoint, Tensors]) -> None:
    for index, (feature, path) in enumerate(zip(features, paths, strict=True)):
        if feature in features[:index]:
            raise SteeringError(f"feature {feature} is named twice", path)
        for point, parts in tensors.items():
            if feature >= len(parts["encoder"]):
                raise SteeringError(f"{point.site} {point.layer} has features 0 to {len(parts['encoder']) - 1}", path)


def _edited(tensors: Tensors, params: Autoencoder, edits: Sequence[FeatureEdit], width: int) -> Directions:
    """What the edits change. All is divided by input_scale f: f z > threshold where z > threshold / f, and so on."""
    factor = _factor(tensors)
    rows = torch.tensor([edit.feature for edit in edits])
    changes = torch.tensor([_branches(edit, factor) for edit in edits])
    return _features(tensors, params, rows, changes * params.scale, width)


def _decoded(tensors: Tensors, params: Autoencoder, edits: Sequence[FeatureEdit], width: int) -> Directions:
    """All features after the edits, decoded in the row's place."""
    factor = _factor(tensors)
    after = torch.tensor([1.0, 0.0, 0.0]).repeat(len(tensors["encoder"]), 1)  # z where active, else 0
    for edit in edits:
        after[edit.feature] += torch.tensor(_branches(edit, factor))
    bias = tensors["decoder_bias"].flatten() / factor if "decoder_bias" in tensors else None
    every = _features(tensors, params, torch.arange(len(after)), after, width)
    return replace(every, replacement=Replacement(params.scale, bias))


def _features(tensors: Tensors, params: Autoencoder, rows: Tensor, branches: Tensor, width: int) -> Directions:
    """Features that write b z + c where they are active, else d; `branches` (rows, 3) has b, c, d of each."""
    factor = _factor(tensors)
    encoder, decoder = tensors["encoder"].view(-1, width), tensors["decoder"].view(-1, width)
    if params.normalize_activations == "layer_norm":
        encoder = _centred(tensors["encoder"])
    bias = _reading_bias(
        tensors["encoder"],
        tensors.get("encoder_bias"),
        tensors.get("decoder_bias") if params.apply_b_dec_to_input else None,
        factor,
    )
    threshold = torch.zeros(len(rows))
    if params.activation == "jumprelu":
        threshold = tensors["threshold"][rows] / factor
    return Directions(
        encoder[rows],
        decoder[rows],
        (Phi.GATED if params.k is None else Phi.TOP_K,) * len(rows),
        torch.cat([threshold[:, None], branches], 1),
        bias[rows],
        _NORMS[params.normalize_activations],
        None if params.k is None else TopK(encoder, bias, params.k),
    )


def _factor(tensors: Tensors) -> float:
    return float(tensors.get("input_scale", 1.0))


def _branches(edit: FeatureEdit, factor: float) -> tuple[float, float, float]:
    """(b, c, d): the change is b z + c where the feature is active, else d."""
    if edit.scale is not None:
        return edit.scale - 1, 0.0, 0.0
    slope, value = (-1.0, edit.set) if edit.set is not None else (0.0, edit.add)
    assert value is not None
    return slope, value / factor, 0.0 if edit.only_if_active else value / factor


@lru_cache(maxsize=8)  # by identity, as below
def _centred(encoder: Tensor) -> Tensor:
    """(features, width) rows that do not read a row's mean: e . (x - mean) = (e - its mean) . x, bit for bit the same
    for one feature as among all, which TopK needs."""
    rows = encoder.flatten(1)
    return rows - rows.mean(1, keepdim=True)


@lru_cache(maxsize=8)  # by identity: requests that use one autoencoder share its bias
def _reading_bias(encoder: Tensor, bias: Tensor | None, decoder_bias: Tensor | None, factor: float) -> Tensor:
    """(features,) encoder @ x + this is the pre-activation over the factor."""
    found = torch.zeros(len(encoder)) if bias is None else bias
    if decoder_bias is not None:
        found = found - encoder.flatten(1) @ decoder_bias.flatten()
    return found / factor
