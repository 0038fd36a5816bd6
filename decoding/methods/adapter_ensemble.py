"""Ensembles of LoRA adapters: several experts on one base model say the next token together.

    s = base_weight * base + (1 - base_weight) * sum of w_c z_c        raw logits; w divided by its sum

Li et al. 2025 (ELREA), arXiv:2502.00089, weighs the experts by how their training data resembles the query; here the
client does. That the base model enters with half of the weight could not be confirmed; no argmax depends on it.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from whipstaff.decoding.coupled import CoupledParams
from whipstaff.decoding.method import Companion, DecodingError, Mixing, Source
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term

Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class AdapterEnsembleParams(CoupledParams):
    """Which adapters, and what each counts for."""

    method: Literal["adapter_ensemble"] = "adapter_ensemble"
    weights: dict[str, Weight] = Field(min_length=1, max_length=16, description="adapter of this server -> its weight")
    base_weight: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="1 changes nothing")


class AdapterEnsemble(Mixing[AdapterEnsembleParams]):
    name, paper = "adapter_ensemble", "Li et al. 2025, arXiv:2502.00089"
    params, needs_adapters = AdapterEnsembleParams, True

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> AdapterEnsembleParams:
        return AdapterEnsembleParams(weights={"any": 1.0}, base_weight=1.0)

    def mix(self, params: AdapterEnsembleParams) -> Mix:
        total = sum(params.weights.values())
        if not total:
            raise DecodingError("they are all 0", "weights")
        if params.base_weight == 1:
            return Mix((Term(MAIN, 1.0),))
        shares = [(1 - params.base_weight) * weight / total for weight in params.weights.values()]
        experts = (Term(Stream(member=member), share) for member, share in enumerate(shares, 1))
        return Mix((Term(MAIN, params.base_weight), *experts), window=params.window)

    def companions(self, params: AdapterEnsembleParams, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        named = {f"weights.{name}": name for name in params.weights if params.base_weight < 1}
        return [Companion(source.ids, param, adapter=(name, param)) for param, name in named.items()]
