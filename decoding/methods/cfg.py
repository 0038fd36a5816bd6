"""Classifier-free guidance: away from what another prompt would say.

    s = lp_u + guidance_scale * (lp_c - lp_u)        log-probabilities with this prompt (c) and with the other (u)

Without a negative prompt the other one is this prompt's last token alone. Sanchez et al. 2023, arXiv:2306.17806, as in
transformers' `guidance_scale`; below 1 it moves towards the negative prompt.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import Companion, Contents, Source, StreamMixer, content_of
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term


class CfgParams(CoupledParams):
    """How far, and away from what."""

    method: Literal["cfg"] = "cfg"
    guidance_scale: float = Field(1.5, ge=-100, le=100, allow_inf_nan=False, description="1 changes nothing")
    negative_prompt: Contents | None = Field(
        None, description="text, token ids or messages; a list has one for each prompt; none: the last token"
    )


class Cfg(StreamMixer[CfgParams]):
    name, paper = "cfg", "Sanchez et al. 2023, arXiv:2306.17806"
    params = CfgParams
    example: ClassVar[Mapping[str, Any]] = {"guidance_scale": 3.0, "negative_prompt": "Tell me a story."}
    shorthands: ClassVar[Mapping[str, str]] = {
        "guidance_scale": "guidance_scale",
        "cfg_scale": "guidance_scale",
        "negative_prompt": "negative_prompt",
    }
    switches = (frozenset({"guidance_scale"}),)
    texts = ("negative_prompt",)

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> CfgParams:
        return CfgParams(guidance_scale=1.0)

    def is_off(self, params: CfgParams) -> bool:
        return params.guidance_scale == 1

    def mix(self, params: CfgParams) -> Mix:
        gamma = params.guidance_scale
        if gamma == 1:
            return Mix((Term(MAIN, 1.0),))
        return Mix((Term(MAIN, gamma, True), Term(Stream(companion=1), 1 - gamma, True)), window=params.window)

    def companions(self, params: CfgParams, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        if params.guidance_scale == 1:
            return ()
        if params.negative_prompt is None:
            return (Companion(source.ids[-1:], "guidance_scale"),)
        one = content_of(params.negative_prompt, 0, 1, "negative_prompt")
        return (Companion(source.encode(one, "negative_prompt"), "negative_prompt"),)

    def of_prompt(self, params: CfgParams, index: int, num: int) -> CfgParams:
        if params.negative_prompt is None:
            return params
        one = content_of(params.negative_prompt, index, num, "negative_prompt")
        return params.model_copy(update={"negative_prompt": one})
