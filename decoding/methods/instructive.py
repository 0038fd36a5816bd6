"""Instructive decoding: away from what a noisy instruction would make the model say.

    s = logits - epsilon * noisy        raw logits

Kim et al. 2023, arXiv:2311.00233; epsilon = 0.3, and the noisy instruction that worked best is one of the opposite.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import Companion, Content, Source, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term


class InstructiveParams(CoupledParams):
    """How far, and away from which instruction."""

    method: Literal["instructive"] = "instructive"
    noisy_prompt: Content = Field(description="this prompt with a noisy instruction")
    epsilon: float = Field(0.3, ge=0, lt=1, allow_inf_nan=False, description="0 changes nothing")


class Instructive(StreamMixer[InstructiveParams]):
    name, paper = "instructive", "Kim et al. 2023, arXiv:2311.00233"
    params = InstructiveParams
    example: ClassVar[Mapping[str, Any]] = {"noisy_prompt": "Tell me a sad story."}

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> InstructiveParams:
        return InstructiveParams(noisy_prompt="any", epsilon=0.0)

    def is_off(self, params: InstructiveParams) -> bool:
        return params.epsilon == 0

    def mix(self, params: InstructiveParams) -> Mix:
        if params.epsilon == 0:
            return Mix((Term(MAIN, 1.0),))
        return Mix((Term(MAIN, 1.0), Term(Stream(companion=1), -params.epsilon)), window=params.window)

    def companions(self, params: InstructiveParams, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        if params.epsilon == 0:
            return ()
        return (Companion(source.encode(params.noisy_prompt, "noisy_prompt"), "noisy_prompt"),)
