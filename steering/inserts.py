"""Where learned rows are inserted into a prompt, and what that does to positions.

A soft prompt's rows stand in for the embeddings of placeholder tokens. Requests count in the prompt that they sent, its
real tokens; the engine sees the expanded prompt, and windows of where clauses count in that.
"""

from collections.abc import Callable, Collection, Sequence
from itertools import chain, count
from typing import Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.method import EditParams
from whipstaff.steering.plan import Insert
from whipstaff.steering.where import Index, Messages

Span = tuple[int, int]  # [start, end) in a prompt
Bounds = Callable[[Messages], Sequence[Span]]


class MessageEdge(BaseModel):
    """Where the content of one message of a chat begins or ends. `role` and `index` choose as in where clauses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class Chosen(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)

        role: str | None = Field(None, min_length=1, max_length=64)
        index: Index | None = None

    message: Chosen
    at: Literal["start", "end"] = "start"


class InsertParams(EditParams):
    insert: Index | MessageEdge = Field(
        0,
        description="the rows come before this token of the prompt as sent; negative counts from its end, and its "
        "length puts them last; or an edge of a message's content",
    )
    tokens: int | None = Field(
        None, strict=True, ge=1, lt=1 << 31, description="only the first so many rows; none: all of them"
    )


class Inserted(NamedTuple):
    """The placeholders that an entry asks for, and where."""

    params: InsertParams
    num: int


def num_rows(params: InsertParams, have: int) -> int:
    """How many of `have` rows a request uses. Raises: SteeringError naming the field."""
    if params.tokens is not None and params.tokens > have:
        raise SteeringError(f"the file has {have} rows", "tokens")
    return params.tokens or have


def index_of(params: InsertParams, prompt_len: int, bounds: Bounds) -> int:
    """The index of the real token that the rows come before. Raises: SteeringError naming the field.

    Args:
        bounds: where the contents of the messages that match stand.
    """
    wanted = params.insert
    if isinstance(wanted, MessageEdge):
        found = bounds(Messages(role=wanted.message.role, index=wanted.message.index))
        if len(found) != 1:
            raise SteeringError(f"{len(found) or 'no'} messages match, wanted one", "insert.message")
        ((start, end),) = found
        return start if wanted.at == "start" else end
    index = wanted + prompt_len if wanted < 0 else wanted
    if not 0 <= index <= prompt_len:
        raise SteeringError(f"the prompt has {prompt_len} tokens", "insert")
    return index


class Wanted(NamedTuple):
    """The rows of one soft prompt."""

    digest: str
    num: int
    before: int  # index of the real token that they come before; the prompt's length: after the last


def place_inserts(
    prompt_ids: Sequence[int], wanted: Sequence[Wanted], avoid: Collection[int] = ()
) -> tuple[list[int], tuple[Insert, ...]]:
    """The expanded prompt and where in it the rows stand. Inserts at one index keep the order given.

    The placeholder is a token of the prompt, so that penalties on a prompt's tokens fall on no other than without the
    rows, and none of `avoid`, the tokens that where clauses treat apart.
    """
    placeholder = next(token for token in chain(prompt_ids, count()) if token not in avoid)
    expanded: list[int] = []
    inserts: list[Insert] = []
    taken = 0  # real tokens so far
    for digest, num, before in sorted(wanted, key=lambda one: one.before):
        expanded += prompt_ids[taken:before]
        taken = before
        inserts.append(Insert(digest, len(expanded), num))
        expanded += [placeholder] * num
    return [*expanded, *prompt_ids[taken:]], tuple(inserts)


def shift(span: Span, inserts: Sequence[Insert]) -> Span:
    """Where a span of real tokens stands in the expanded prompt. Rows between its tokens are part of it, rows at its
    edges are not."""
    start, end = span
    return _shift(start, inserts), _shift(end - 1, inserts) + 1


def _shift(position: int, inserts: Sequence[Insert]) -> int:
    for insert in inserts:
        if insert.start <= position:
            position += insert.num
    return position
