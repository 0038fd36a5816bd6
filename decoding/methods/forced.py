"""Forced decoding: the tokens of a given answer, one after the other, so that their log-probabilities can be asked for.

Scores answers under methods that the tokens of a prompt cannot be scored under, such as those of several prompts.
Generation ends where the answer does, if `max_tokens` is its length.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from whipstaff.decoding.method import DecodingError, LogitsRewriter, Params, Vocabulary
from whipstaff.decoding.rows import Rows


class ForcedParams(Params):
    """What must be said."""

    method: Literal["forced"] = "forced"
    text: str | None = Field(None, max_length=1 << 20, description="the answer")
    ids: list[int] | None = Field(None, max_length=1 << 20, description="instead: its tokens")


class ForcedSetting(BaseModel):
    """The answer's tokens."""

    model_config = ConfigDict(frozen=True)

    ids: tuple[int, ...]


class Forced(LogitsRewriter[ForcedParams]):
    name, paper = "forced", "teacher forcing"
    stage, params, setting, revives = "truncation", ForcedParams, ForcedSetting, True
    example: ClassVar[Mapping[str, Any]] = {"text": " In a house by the sea,"}

    def off(self, streams: Sequence[str], heads: Sequence[str]) -> ForcedParams:
        return ForcedParams(ids=[])

    def is_off(self, params: ForcedParams) -> bool:
        return not (params.ids or params.text)

    def resolve(self, params: ForcedParams, words: Vocabulary) -> ForcedSetting:
        if (params.text is None) == (params.ids is None):
            raise DecodingError("give the answer's text, or its ids", "text")
        ids = tuple(words.encode(params.text or "") if params.ids is None else params.ids)
        if bad := [token for token in ids if not 0 <= token < words.num_tokens]:
            named = "text" if params.ids is None else "ids"
            raise DecodingError(f"{bad[0]} is no token of this model, which has {words.num_tokens}", named)
        return ForcedSetting(ids=ids)

    def rewrite(self, rows: Rows, settings: Sequence[Any]) -> Tensor:
        """A token that is banned is said all the same: its log-probability tells."""
        wanted = [
            (row, setting.ids[done])
            for row, (setting, done) in enumerate(zip(settings, rows.num_generated, strict=True))
            if done < len(setting.ids)
        ]
        if wanted:
            index, tokens = torch.tensor(wanted).T.to(rows.logits.device, non_blocking=True)
            rows.logits[index] = -torch.inf
            rows.logits[index, tokens] = 0.0
        return rows.logits
