"""Spans of a prompt: what a method's parameter says of them, and the positions that it means.

A text that stands in the prompt, messages of a chat, images, or half-open windows that count from the prompt's start,
or from its end when negative. What is not there is refused: a method that trusts a part of the prompt would else trust
another.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from whipstaff.decoding.method import DecodingError, PromptFacts

Position = Annotated[int, Field(strict=True, ge=-(1 << 31), lt=1 << 31)]
Window = tuple[Position, Position | None]


class SpanMessages(BaseModel):
    """The contents of messages of a chat: each named field narrows the choice."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    role: str | None = Field(None, min_length=1, max_length=64)
    index: Position | None = None  # among those with that role; negative: from the last one


class SpanImages(BaseModel):
    """The tokens that stand for images."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Position | Literal["all"]  # the number of one, in the order of the prompt; negative: from the last one


Span = (
    Annotated[str, Field(min_length=1, max_length=1 << 20)]
    | SpanImages
    | SpanMessages
    | Annotated[list[Window], Field(min_length=1, max_length=64)]
)


def span_at(span: Span, prompt: PromptFacts, param: str = "span") -> tuple[tuple[int, int], ...]:
    """[start, end) of each stretch of positions that it means, in order, none touching the next. Raises: DecodingError.

    Args:
        param: where below the entry it stands.
    """
    if isinstance(span, str):
        found = [prompt.text_at(span, param)]
    elif isinstance(span, SpanMessages):
        found = list(prompt.messages_at(span.role, span.index, param))
    elif isinstance(span, SpanImages):
        found = list(prompt.images_at(None if span.image == "all" else span.image, param))
    else:
        found = [_resolved(*window, prompt.num_tokens, f"{param}[{index}]") for index, window in enumerate(span)]
    return _merged(found)


def _resolved(start: int, end: int | None, num_tokens: int, param: str) -> tuple[int, int]:
    first = start + num_tokens if start < 0 else start
    last = num_tokens if end is None else end + num_tokens if end < 0 else end
    if not 0 <= first < last <= num_tokens:
        raise DecodingError(f"[{start}, {'null' if end is None else end}] is no part of {num_tokens} tokens", param)
    return first, last


def _merged(spans: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((start, end))
    return tuple(found)
