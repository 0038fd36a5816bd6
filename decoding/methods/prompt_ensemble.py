"""Prompt ensembles: the same question under several prompts, such as other demonstrations or another order of them.

    s = log(sum of w_k p_k)        over this prompt and the others; space "probability"
    s = sum of w_k log p_k         space "log"

The weights are divided by their sum. Averages of distributions over prompts: Jiang et al. 2020, arXiv:1911.12543.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import Companion, Content, DecodingError, Source, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term

Weight = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class PromptEnsembleParams(CoupledParams):
    """Which prompts, and what each counts for."""

    method: Literal["prompt_ensemble"] = "prompt_ensemble"
    prompts: list[Content] = Field(min_length=1, max_length=32, description="beside the request's own")
    weights: list[Weight] | None = Field(None, description="of the own prompt, then of the others; none: all alike")
    space: Literal["probability", "log"] = Field("probability", description="what is averaged")


class PromptEnsemble(StreamMixer[PromptEnsembleParams]):
    name, paper = "prompt_ensemble", "Jiang et al. 2020, arXiv:1911.12543"
    params = PromptEnsembleParams
    example: ClassVar[Mapping[str, Any]] = {"prompts": ["Tell me where Mara lives."], "weights": [0.2, 0.8]}

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None  # an average of one prompt is no ensemble

    def mix(self, params: PromptEnsembleParams) -> Mix:
        num = 1 + len(params.prompts)
        weights = [1.0] * num if params.weights is None else params.weights
        if len(weights) != num:
            raise DecodingError(f"{len(weights)} weights for {num} prompts, the request's own included", "weights")
        if not sum(weights):
            raise DecodingError("they are all 0", "weights")
        is_log = params.space == "log"
        terms = tuple(
            Term(Stream(companion=companion) if companion else MAIN, weight / sum(weights), is_log)
            for companion, weight in enumerate(weights)
        )
        return Mix(terms, is_probability=not is_log, window=params.window)

    def companions(self, params: PromptEnsembleParams, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        named = {f"prompts[{number}]": prompt for number, prompt in enumerate(params.prompts)}
        return [Companion(source.encode(prompt, param), param) for param, prompt in named.items()]
