"""SH2, self-highlighted hesitation: tokens that the model found hard are shown to it again.

    keys = the key_num percent of the context's tokens with the lowest log-probabilities, in their order
    s = h + alpha * (h - o)        log-probabilities with the keys in the prompt (h) and without (o)

The official code draws the keys from half as many more at random; `thinning` does so with a seed. Kai et al. 2024,
arXiv:2401.05930; key_num and alpha are 8 and 0.1 for FACTOR, 4 and 1.6 for HaluEval, 10 and 6 for TruthfulQA.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.method import Companion, DecodingError, Source, StreamMixer
from whipstaff.decoding.mix import MAIN, Mix, Stream, Term

Text = Annotated[str, Field(max_length=1 << 16)]


class Thinning(BaseModel):
    """A random choice among the hardest tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    seed: int = Field(ge=0, lt=1 << 32, description="of NumPy's legacy generator, as the official code's would be")


class Sh2Params(CoupledParams):
    """Which tokens are shown again, where, and how much that counts."""

    method: Literal["sh2"] = "sh2"
    alpha: float = Field(0.1, ge=0, le=100, allow_inf_nan=False, description="0: the prompt with the keys alone")
    key_num: float = Field(8, gt=0, le=100, allow_inf_nan=False, description="percent of the context's tokens")
    thinning: Thinning | None = Field(None, description="draw the keys at random from half as many more")
    context: Text | None = Field(None, description="what is scored, a text of the prompt; none: all of it")
    placement: Literal["prepend", "append", "after_document"] = Field(
        "prepend", description="FACTOR's, TruthfulQA's and HaluEval's ways to show the keys"
    )
    before: Text | None = Field(None, description="what the keys are put before, where the placement is not prepend")
    template: Text | None = Field(None, description="instead of a placement: a text with {keys} and {prompt}")
    relative_top: float = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="mask by h; for scoring")


class Sh2(StreamMixer[Sh2Params]):
    name, paper = "sh2", "Kai et al. 2024, arXiv:2401.05930"
    params = Sh2Params

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> None:
        return None  # the keys are in the prompt, whatever alpha is

    def mix(self, params: Sh2Params) -> Mix:
        if params.template is not None and "{keys}" not in params.template:
            raise DecodingError("a template says where the {keys} stand", "template")
        hesitant = Term(Stream(companion=1), 1 + params.alpha, True, alpha=params.relative_top)
        return Mix((Term(MAIN, -params.alpha, True), hesitant), window=params.window)

    def scored(self, params: Sh2Params, source: Source) -> Sequence[int]:
        if params.context is not None and params.context not in source.text:
            raise DecodingError("this text does not stand in the prompt", "context")
        ids = source.alone(source.text if params.context is None else params.context)
        if len(ids) < 2:
            raise DecodingError("the context has no token that follows another", "context")
        return ids

    def companions(self, params: Sh2Params, source: Source, scores: Sequence[float]) -> Sequence[Companion]:
        ids = self.scored(params, source)
        positions = keys(scores, params.key_num, params.thinning.seed if params.thinning else None)
        text = source.decode([ids[position] for position in positions])
        prompt = placed(params, source.text, text)
        told = {"keys": text, "key_positions": positions, "prompt": prompt}
        return (Companion(source.changed(prompt), "context", told=told),)


def keys(scores: Sequence[float], key_num: float, seed: int | None = None) -> list[int]:
    """The positions, in order, of the tokens to show again; scores[i] is of the token at i + 1."""
    num = len(scores)
    wanted, num_pooled = (max(int(share * key_num * num), 1) for share in (0.01, 0.015))
    if seed is None:
        chosen = sorted(range(num), key=lambda index: (scores[index], index))[:wanted]
    else:  # from the hardest in whatever order torch finds them, as in the official code
        pool = torch.tensor(scores).topk(min(num_pooled, num), largest=False, sorted=False).indices
        chosen = np.random.RandomState(seed).choice(pool.numpy(), wanted, replace=False).tolist()
    return sorted(index + 1 for index in chosen)


def placed(params: Sh2Params, prompt: str, keys: str) -> str:
    """The prompt with the keys in it."""
    if params.template is not None:
        return params.template.replace("{keys}", keys).replace("{prompt}", prompt)
    if params.placement == "prepend":
        return f"Pondering: {keys}\n\nContext:{prompt}"
    line, usual = ("\nPondering: ", "\nA:") if params.placement == "append" else ("\n#Pondering#: ", "\n#Summary#:")
    before = usual if params.before is None else params.before
    head, found, tail = prompt.rpartition(before) if before else (prompt, "", "")
    return f"{head}{line}{keys}{found}{tail}" if found else f"{prompt}{line}{keys}"
