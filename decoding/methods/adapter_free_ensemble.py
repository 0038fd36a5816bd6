"""Ensemble of expert models at decoding time, the experts being auxiliary models instead of adapters.

    s = base_weight * base + (1 - base_weight) * sum over c of w_c / (sum of w) * expert_c        raw logits

Li et al. 2025 (ELREA), arXiv:2502.00089, who take w from the prompt's gradient; here the request gives it.
Whether the base enters as a half or beside the experts is not said: the sum is this at half the temperature.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from whipstaff.decoding.method import DecodingError, Params, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term

Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class AdapterFreeEnsembleParams(Params):
    """Which experts, and how much of each."""

    method: Literal["adapter_free_ensemble"] = "adapter_free_ensemble"
    weights: dict[str, Weight] = Field(min_length=1, description="auxiliary model -> weight; divided by their sum")
    base_weight: float = Field(0.5, ge=0, le=1, allow_inf_nan=False, description="share of the base; 1 is off")


class AdapterFreeEnsemble(StreamMixer[AdapterFreeEnsembleParams]):
    name, paper = "adapter_free_ensemble", "Li et al. 2025, arXiv:2502.00089"
    params = AdapterFreeEnsembleParams
    num_streams = 1

    def streams(self, params: AdapterFreeEnsembleParams) -> Mapping[str, str]:
        return {f"weights.{model}": model for model in params.weights}

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> AdapterFreeEnsembleParams:
        return AdapterFreeEnsembleParams(weights=dict.fromkeys(streams, 1.0), base_weight=1.0)

    def shown(self, streams: Sequence[str], heads: Mapping[str, str]) -> Mapping[str, Any]:
        return {"weights": {streams[0]: 1.0}, "base_weight": 0.2}

    def is_off(self, params: AdapterFreeEnsembleParams) -> bool:
        return params.base_weight == 1

    def mix(self, params: AdapterFreeEnsembleParams) -> Mix:
        total = sum(params.weights.values())
        if total == 0:
            raise DecodingError("all weights are 0; give at least one expert some", "weights")
        share = 1 - params.base_weight
        experts = (Term(Stream(model), share * weight / total) for model, weight in params.weights.items())
        return Mix((Term(MAIN, params.base_weight), *experts))
