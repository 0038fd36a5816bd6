"""The prompt of a request as a source of others, for methods that read further sequences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from whipstaff.decoding.method import Content, DecodingError, Message

Render = Callable[[Sequence[Mapping[str, Any]]], list[int]]
LocateChat = Callable[[Sequence[Mapping[str, Any]], Sequence[int]], Any]  # messages, their prompt -> its `Chat`


@dataclass(frozen=True)
class PromptSource:
    """What `decoding.method.Source` asks for, of a text or of a chat."""

    ids: Sequence[int]
    tokenizer: Any
    adds_special_tokens: bool  # to a text
    render: Render  # of messages, by the served model's template; it may raise whatever the template does
    messages: Sequence[Mapping[str, Any]] | None = None  # None: the prompt is no chat
    written: str | None = None  # the text that the client sent; None: it sent tokens
    locate: LocateChat | None = None  # finds the messages of a chat in a prompt; None where that cannot be done
    _rendered: dict[tuple[int, ...], Sequence[Mapping[str, Any]]] = field(default_factory=dict, compare=False)

    @property
    def text(self) -> str:
        if self.messages is None:
            return self.plain[0]
        return str(self.messages[self._last_user]["content"])

    def encode(self, content: Content, param: str) -> Sequence[int]:
        if content == "":
            return self._beginning(param)
        if isinstance(content, str):
            is_chat = self.messages is not None
            return self.changed(content, param) if is_chat else self._tokens(content, self.adds_special_tokens)
        if isinstance(content[0], Message):
            return self._chat([one.model_dump() for one in content if isinstance(one, Message)], param)
        return [token for token in content if isinstance(token, int)]

    def _beginning(self, param: str) -> Sequence[int]:
        """The token that begins texts, alone."""
        bos: int | None = getattr(self.tokenizer, "bos_token_id", None)
        if bos is None:
            raise DecodingError("an empty text is the token that begins texts, and this model's has none", param)
        return [bos]

    def changed(self, text: str, param: str = "") -> Sequence[int]:
        if self.messages is None:
            return self._tokens(text, self.plain[1])
        return self._with_content(self._last_user, text, param)

    def alone(self, text: str) -> Sequence[int]:
        found: list[int] = self.tokenizer.encode(text)
        return found

    def without(self, span: str, param: str) -> Sequence[int]:
        if self.messages is None:
            if span not in self.text:
                raise DecodingError("this text does not stand in the prompt", param)
            return self.changed(self.text.replace(span, "", 1))
        for index, message in enumerate(self.messages):
            content = message.get("content")
            if isinstance(content, str) and span in content:
                return self._with_content(index, content.replace(span, "", 1), param)
        raise DecodingError("this text does not stand in any message", param)

    def as_chat(self, param: str) -> Sequence[int]:
        return self.ids if self.messages is not None else self._chat([{"role": "user", "content": self.text}], param)

    def chat(self, ids: Sequence[int]) -> Any:
        """The chat that a prompt made here was rendered from, a `message_spans.Chat`; None where it is none."""
        is_own = self.messages is not None and list(ids) == list(self.ids)
        messages = self.messages if is_own else self._rendered.get(tuple(ids))
        return None if messages is None or self.locate is None else self.locate(messages, ids)

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    @cached_property
    def plain(self) -> tuple[str, bool]:
        """The text of a prompt that is no chat, and whether special tokens are added to it."""
        whole = self.tokenizer.decode(self.ids, skip_special_tokens=False)
        ways = [(self.decode(self.ids), True), (whole, False)]
        if self.written is not None:
            ways.insert(0, (self.written, self.adds_special_tokens))
        for text, adds in ways:
            if self.tokenizer.encode(text, add_special_tokens=adds) == list(self.ids):
                return text, adds
        raise DecodingError("the prompt's tokens are not those of its text; send it as a text")

    @cached_property
    def _last_user(self) -> int:
        messages = self.messages or ()
        users = [index for index, message in enumerate(messages) if message.get("role") == "user"]
        if not users or not isinstance(messages[users[-1]].get("content"), str):
            raise DecodingError("the chat has no user message of text that another text could take the place of")
        return users[-1]

    def _tokens(self, text: str, adds_special_tokens: bool) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=adds_special_tokens)
        return found

    def _with_content(self, index: int, content: str, param: str) -> list[int]:
        assert self.messages is not None
        messages = list(self.messages)
        messages[index] = {**messages[index], "content": content}
        return self._chat(messages, param)

    def _chat(self, messages: Sequence[Mapping[str, Any]], param: str) -> list[int]:
        try:
            ids = self.render(messages)
        except Exception as error:  # a template, or the lack of one, may raise anything
            raise DecodingError(f"the chat template does not take these messages: {error}", param) from error
        self._rendered[tuple(ids)] = messages
        return ids
