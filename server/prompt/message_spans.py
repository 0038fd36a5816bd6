"""Where the messages of a chat stand in the prompt that a template made of them, in tokens.

No template says where it puts what, so it is asked: rendered again with a marker for one message's content, it shows
what stands before and after that content; rendered with the first messages only, where they end. Characters become
tokens by the tokenizer's own offsets, and only where tokenising the rendered text again gives the prompt's very tokens.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from typing import Any

from whipstaff.decoding.method import DecodingError
from whipstaff.server.prompt.prompt_source import PromptSource
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.where import Messages

Span = tuple[int, int]  # [start, end)
Adapter = tuple[str, int, str]  # a LoRA adapter's name, number and path
Message = Mapping[str, Any]
Render = Callable[[Sequence[Message], bool], str]


class Chat:
    """A rendered chat, to be asked for the places of its messages.

    Args:
        tokenizer: a fast Hugging Face tokenizer.
        messages: as the template gets them; a content is a text or a list of parts.
        token_ids: the prompt.
        render: applies the request's own template to messages; the flag says whether as for the prompt, or without an
            invitation to go on. It may raise whatever the template does.
    """

    def __init__(self, tokenizer: Any, messages: Sequence[Message], token_ids: Sequence[int], render: Render) -> None:
        self._tokenizer, self._messages, self._token_ids, self._render = tokenizer, messages, token_ids, render
        self._contents: dict[int, Span | None] = {}
        self._ends: dict[int, int | None] = {0: 0}

    def spans(self, chosen: Messages) -> list[Span]:
        """The tokens of the messages that match, leaving out those without content. Raises: SteeringError.

        `role` chooses first; `index` counts the messages with that role, or all where no role is named. A token that
        straddles an edge is part of the span. `whole` is from the end of the message before, or the prompt's start, to
        this one's own end; where a template folds a message into the next one, it is the part that they share.
        """
        found = [i for i in self._chosen(chosen) if chosen.whole or self._messages[i].get("content")]
        spans = [self._in_tokens(self._whole(i) if chosen.whole else self._content(i)) for i in found]
        return [(start, end) for start, end in spans if start < end]

    def bounds(self, chosen: Messages) -> list[Span]:
        """The content of every message that matches: where it would stand, if it has none. Raises: SteeringError."""
        return [self._in_tokens(self._content(i)) for i in self._chosen(chosen)]

    def text_at(self, text: str) -> Span | None:
        """The tokens in which a text first stands; None where it does not. Raises: SteeringError."""
        start = self._text.find(text)
        return None if start < 0 else self._in_tokens((start, start + len(text)))

    def _chosen(self, chosen: Messages) -> list[int]:
        found = [i for i, message in enumerate(self._messages) if chosen.role in (None, message["role"])]
        if chosen.index is None:
            return found
        return [found[chosen.index]] if -len(found) <= chosen.index < len(found) else []

    @cached_property
    def _text(self) -> str:
        return self._render(self._messages, True)

    @cached_property
    def _marker(self) -> str:
        """Letters that stand nowhere in the prompt."""
        return next(mark for number in count() if (mark := f"whipstaffmark{number}x") not in self._text)

    def _content(self, index: int) -> Span:
        """The characters of a message's content."""
        span = self._shown(index)
        if span is None:
            raise SteeringError(
                f"the chat template does not show where it puts the content of message {index}, which has the role "
                f"{self._messages[index]['role']!r}"
            )
        return span

    def _shown(self, index: int) -> Span | None:
        """The characters of a message's content, as far as a marker in its place shows them."""
        if index not in self._contents:
            before, found, after = self._rendered(self._marked(index), True).partition(self._marker)
            span = len(before), len(self._text) - len(after)
            is_same = self._text.startswith(before) and self._text.endswith(after) and span[0] <= span[1]
            self._contents[index] = span if found and is_same else None
        return self._contents[index]

    def _marked(self, index: int) -> list[Message]:
        """The messages, the content of one replaced by the marker in the form that it had."""
        message = self._messages[index]
        parts = [{"type": "text", "text": self._marker}]
        content = parts if isinstance(message.get("content"), list) else self._marker
        return [*self._messages[:index], {**message, "content": content}, *self._messages[index + 1 :]]

    def _whole(self, index: int) -> Span:
        starts = (end for num in range(index, -1, -1) if (end := self._end(num)) is not None)
        ends = (end for num in range(index + 1, len(self._messages) + 1) if (end := self._end(num)) is not None)
        return next(starts), next(ends, len(self._text))

    def _end(self, num: int) -> int | None:
        """How many characters the first `num` messages take; None if the template does not keep them apart."""
        if num not in self._ends:
            self._ends[num] = self._found_end(num)
        return self._ends[num]

    def _found_end(self, num: int) -> int | None:
        content = self._shown(num - 1)
        if content is None:
            text = self._rendered(self._messages[:num], False)
            return len(text) if text and self._text.startswith(text) else None
        _, found, tail = self._rendered(self._marked(num - 1)[:num], False).partition(self._marker)
        return content[1] + len(tail) if found and self._text.startswith(tail, content[1]) else None

    def _rendered(self, messages: Sequence[Message], is_prompt: bool) -> str:
        """What the template makes of messages that nobody sent; nothing if it refuses them."""
        try:
            return self._render(messages, is_prompt)
        except Exception:  # a template may raise anything
            return ""

    @cached_property
    def _tokens(self) -> tuple[list[int], list[int]]:
        """Where the characters of each token start and end, in order."""
        for with_special_tokens in (False, True):
            encoding = self._tokenizer(self._text, add_special_tokens=with_special_tokens, return_offsets_mapping=True)
            if encoding["input_ids"] == list(self._token_ids):
                return _edges(encoding["offset_mapping"])
        raise SteeringError(
            f"the prompt's {len(self._token_ids)} tokens are not those of the rendered template, which has "
            f"{len(encoding['input_ids'])}: it was truncated, or holds more than text; name positions instead"
        )

    def _in_tokens(self, span: Span) -> Span:
        return _tokens_at(span, *self._tokens)


@dataclass(frozen=True)
class Prompt:
    """One prompt of a request, between tokenising and scheduling."""

    num_tokens: int
    ids: list[int] | None  # None where it is more than text: embeddings, images
    room: int  # the most tokens it may have
    tokenizer: Any
    chat: Chat | None = None  # None where no template made it
    source: PromptSource | None = None  # of other prompts; None where it is more than text
    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # that this server has, by name
    adapter: Adapter | None = None  # the request's own
    index: int = 0  # among the request's prompts
    num: int = 1  # of those
    scores: dict[str, list[float]] = field(default_factory=dict)  # by method, of the text that it wanted scored
    images: Sequence[Sequence[Span]] = ()  # of each, the tokens that stand for it

    def spans(self, chosen: Messages) -> list[Span]:
        """As `Chat.spans`."""
        return self._asked().spans(chosen)

    def bounds(self, chosen: Messages) -> list[Span]:
        """As `Chat.bounds`."""
        return self._asked().bounds(chosen)

    def id_of(self, text: str) -> int:
        """As `id_of`."""
        return id_of(self.tokenizer, text)

    def last_user(self) -> int:
        """Where the content of the last user message begins; 0 where there is none."""
        contents = self.chat.bounds(Messages(role="user", index=-1)) if self.chat else []
        return contents[0][0] if contents else 0

    def text_at(self, text: str, param: str) -> Span:
        """The tokens in which a text first stands. Raises: DecodingError naming `param`."""
        try:
            found = self.chat.text_at(text) if self.chat else self._text_at(text)
        except SteeringError as error:
            raise DecodingError(str(error), param) from None
        if found is None:
            raise DecodingError("this text does not stand in the prompt", param)
        return found

    def _text_at(self, text: str) -> Span | None:
        """The same in a prompt that no template made. Raises: DecodingError, SteeringError."""
        if self.source is None or not self.tokenizer.is_fast:
            raise SteeringError(
                "texts are found in prompts of text, with a fast Hugging Face tokenizer; name windows instead"
            )
        whole, adds_special_tokens = self.source.plain
        start = whole.find(text)
        if start < 0:
            return None
        encoding = self.tokenizer(whole, add_special_tokens=adds_special_tokens, return_offsets_mapping=True)
        return _tokens_at((start, start + len(text)), *_edges(encoding["offset_mapping"]))

    def messages_at(self, role: str | None, index: int | None, param: str) -> list[Span]:
        """The contents of the messages that match, at least one. Raises: DecodingError naming `param`."""
        try:
            found = self.spans(Messages(role=role, index=index))
        except SteeringError as error:
            raise DecodingError(str(error), param) from None
        if not found:
            raise DecodingError("no message matches", param)
        return found

    def images_at(self, index: int | None, param: str) -> list[Span]:
        """The tokens of an image, or of all. Raises: DecodingError naming `param`."""
        num = len(self.images)
        if not -num <= (index or 0) < num:
            said = f"{num} image{'s' if num > 1 else ''}" if num else "no image"
            raise DecodingError(f"the prompt has {said}", param)
        chosen = self.images if index is None else [self.images[index]]
        return [span for image in chosen for span in image]

    def _asked(self) -> Chat:
        if self.chat is None:
            raise SteeringError(
                "messages can only be told apart in chat requests of text, and with a fast Hugging Face tokenizer; "
                "name positions instead"
            )
        return self.chat


@dataclass(frozen=True)
class ExpandedPrompt:
    """A prompt with rows that were put into it, as decoding methods are told of it."""

    prompt: Prompt
    num_tokens: int
    shift: Callable[[Span], Span]  # a span of the prompt's own tokens -> where they stand now

    def last_user(self) -> int:
        """As `Prompt.last_user`."""
        start = self.prompt.last_user()
        return self.shift((start, start + 1))[0]

    def text_at(self, text: str, param: str) -> Span:
        """As `Prompt.text_at`."""
        return self.shift(self.prompt.text_at(text, param))

    def messages_at(self, role: str | None, index: int | None, param: str) -> list[Span]:
        """As `Prompt.messages_at`."""
        return list(map(self.shift, self.prompt.messages_at(role, index, param)))

    def images_at(self, index: int | None, param: str) -> list[Span]:
        """As `Prompt.images_at`."""
        return list(map(self.shift, self.prompt.images_at(index, param)))


def id_of(tokenizer: Any, text: str) -> int:
    """The id of the one token whose text that is; its name in the vocabulary will do too. Raises: SteeringError."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
        return ids[0]
    named: int | None = tokenizer.get_vocab().get(text)
    if named is None:
        raise SteeringError(f"{text!r} is not one token but {len(ids)}: {tokenizer.convert_ids_to_tokens(ids)}")
    return named


def _tokens_at(span: Span, starts: Sequence[int], ends: Sequence[int]) -> Span:
    """The tokens of a span of characters, given where the characters of each token start and end."""
    first = bisect_right(ends, span[0])
    num = bisect_left(starts, span[1], first) - first if span[0] < span[1] else 0
    return first, first + num


def _edges(offsets: Sequence[Span]) -> tuple[list[int], list[int]]:
    """A tokenizer's offsets as starts and ends that never fall. What they leave out, such as blanks before a word, is
    of the token that follows."""
    starts: list[int] = []
    ends: list[int] = []
    reached = 0
    for start, end in offsets:
        starts.append(reached if end <= start else min(start, reached))
        reached = max(reached, end)
        ends.append(reached)
    return starts, ends
