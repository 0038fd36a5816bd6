"""Context-aware decoding: what a context adds to a prompt counts for more.

    s = (1 + alpha) * with_context - alpha * without        raw logits, of the tokens in the nuclei of both

The context is a text that stands in the prompt, or the prompt without it is given. Shi et al. 2023, arXiv:2305.14739;
alpha = 0.5 for summaries, 1 where the context contradicts what the model knows. The authors' nuclei are whole in their
data. A token outside of one counts -1000 there or 1000 less; here it is banned. It is the same as long as the nuclei
share a token; where they do not, the likeliest one with the context is left, which their scores put first, too.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import Companion, Content, DecodingError, Source, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term


class CadParams(CoupledParams):
    """How much more, and what is context."""

    method: Literal["cad"] = "cad"
    alpha: float = Field(0.5, ge=-1, le=100, allow_inf_nan=False, description="0 changes nothing")
    context: str | None = Field(None, min_length=1, description="a text that stands in the prompt")
    prompt_without: Content | None = Field(None, description="instead: the prompt without the context")
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False, description="nucleus with the context; 1 is off")
    top_p_without: float = Field(1.0, gt=0, le=1, allow_inf_nan=False, description="nucleus without; 1 is off")


class Cad(StreamMixer[CadParams]):
    name, paper = "cad", "Shi et al. 2023, arXiv:2305.14739"
    params = CadParams
    example: ClassVar[Mapping[str, Any]] = {"prompt_without": "Answer:", "alpha": 1.0}

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> CadParams:
        return CadParams(alpha=0.0, context="any")

    def is_off(self, params: CadParams) -> bool:
        return params.alpha == 0 and params.top_p == 1

    def mix(self, params: CadParams) -> Mix:
        if (params.context is None) == (params.prompt_without is None):
            raise DecodingError("say which text of the prompt is context, or the prompt without it", "context")
        aware = Term(MAIN, 1 + params.alpha, top_p=params.top_p)
        prior = Term(Stream(companion=1), -params.alpha, top_p=params.top_p_without)
        return Mix((aware, prior) if params.alpha else (aware,), window=params.window)

    def companions(self, params: CadParams, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        if params.alpha == 0:
            return ()
        if params.context is not None:
            return (Companion(source.without(params.context, "context"), "context"),)
        assert params.prompt_without is not None
        return (Companion(source.encode(params.prompt_without, "prompt_without"), "prompt_without"),)
