"""Ensembles of LoRA adapters: several experts on one base model say the next token together.

    s = base_weight * base + (1 - base_weight) * sum of w_c z_c        raw logits; w divided by its sum
    w = softmax((cos - mean(cos)) / std(cos)),  cos_c = cosine of the query's feature and the centre of expert c

Li et al. 2025 (ELREA), arXiv:2502.00089: the experts count for more the nearer their training data is to the query. The
client says the weights, or the query's feature, such as its projected gradient, beside a file of centres. That the base
model enters with half of the weight could not be confirmed; no argmax depends on it.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import Companion, DecodingError, HeadFile, Source, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term

Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
_ALIKE = 1e-7  # cosines of float32 centres that differ less than this do not differ


class AdapterEnsembleParams(CoupledParams):
    """Which adapters, and what each counts for."""

    method: Literal["adapter_ensemble"] = "adapter_ensemble"
    weights: dict[str, Weight] | None = Field(
        None, min_length=1, max_length=16, description="adapter of this server -> its weight"
    )
    centres: str | None = Field(None, description="instead: file of kind adapter_centres, which gives the weights")
    feature: list[Annotated[float, Field(allow_inf_nan=False)]] | None = Field(
        None, min_length=1, max_length=1 << 16, description="where the query lies among the centres"
    )
    top_m: int | None = Field(None, ge=1, le=16, description="only the so many nearest; none: all")
    base_weight: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="1 changes nothing")


class AdapterEnsemble(StreamMixer[AdapterEnsembleParams]):
    name, paper = "adapter_ensemble", "Li et al. 2025, arXiv:2502.00089"
    params, needs_adapters = AdapterEnsembleParams, True
    head_fields: ClassVar[Mapping[str, str]] = {"centres": "adapter_centres"}

    def shown(self, streams: Sequence[str], heads: Mapping[str, str]) -> None:
        return None  # adapters have names of their own

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> AdapterEnsembleParams:
        return AdapterEnsembleParams(weights={"any": 1.0}, base_weight=1.0)

    def is_off(self, params: AdapterEnsembleParams) -> bool:
        return params.base_weight == 1

    def with_heads(self, params: AdapterEnsembleParams, heads: Mapping[str, HeadFile]) -> AdapterEnsembleParams:
        if "centres" not in heads:
            for param in ("feature", "top_m"):
                if getattr(params, param) is not None:
                    raise DecodingError("it says how near `centres` are; name a file of them", param)
            return params
        if params.weights is not None:
            raise DecodingError("weights are given, too; leave one of them out", "centres")
        centres, names = heads["centres"].parts["centres"], heads["centres"].stated["adapters"]
        if params.feature is None:
            raise DecodingError("say where the query lies among the centres", "feature")
        if len(params.feature) != centres.shape[1]:
            raise DecodingError(f"it has {len(params.feature)} numbers, and a centre {centres.shape[1]}", "feature")
        if not any(params.feature):
            raise DecodingError("it is all 0, which is near to nothing", "feature")
        if params.top_m is not None and params.top_m > len(names):
            raise DecodingError(f"there are {len(names)} centres", "top_m")
        feature = torch.tensor(params.feature, dtype=torch.float64)
        shares = nearness(feature, centres.double(), params.top_m).tolist()
        weights = {name: share for name, share in zip(names, shares, strict=True) if share}
        return params.model_copy(update={"weights": weights, "feature": None})

    def mix(self, params: AdapterEnsembleParams) -> Mix:
        if params.weights is None:
            raise DecodingError("say what each adapter counts for, or `centres` and the query's `feature`", "weights")
        total = sum(params.weights.values())
        if not total:
            raise DecodingError("they are all 0", "weights")
        if params.base_weight == 1:
            return Mix((Term(MAIN, 1.0),))
        shares = [(1 - params.base_weight) * weight / total for weight in params.weights.values()]
        experts = (Term(Stream(companion=companion), share) for companion, share in enumerate(shares, 1))
        return Mix((Term(MAIN, params.base_weight), *experts), window=params.window)

    def companions(self, params: AdapterEnsembleParams, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        names = params.weights if params.weights and params.base_weight < 1 else ()
        if params.centres is not None:
            return [Companion(source.ids, "centres", adapter=(name, "centres"), told={"name": name}) for name in names]
        return [Companion(source.ids, f"weights.{name}", adapter=(name, f"weights.{name}")) for name in names]


def nearness(feature: Tensor, centres: Tensor, top_m: int | None = None) -> Tensor:
    """(C,) shares of centres (C, F) by how near they are to feature (F,); they add up to 1, and all but the `top_m`
    nearest are 0. Equally near ones share alike, and come in their own order."""
    cos = _unit(centres) @ _unit(feature)
    std = cos.std(correction=0)
    shares = ((cos - cos.mean()) / std if std > _ALIKE else 0 * cos).softmax(0)
    if top_m is not None:
        shares[cos.argsort(descending=True, stable=True)[top_m:]] = 0
    return shares / shares.sum()


def _unit(rows: Tensor) -> Tensor:
    """Of length 1, however long they are."""
    rows = rows / rows.abs().amax(-1, keepdim=True)
    found: Tensor = rows / rows.norm(dim=-1, keepdim=True)
    return found
