"""The prompt of a request as a source of others, for methods that read further sequences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from whipstaff.decoding.method import Content, DecodingError, Message

Render = Callable[[Sequence[Mapping[str, Any]]], list[int]]


@dataclass(frozen=True)
class PromptSource:
    """What `decoding.method.Source` asks for, of a text or of a chat."""

    ids: Sequence[int]
    tokenizer: Any
    adds_special_tokens: bool  # to a text
    render: Render | None  # of messages, by the served model's template; None: it has none
    messages: Sequence[Mapping[str, Any]] | None = None  # None: the prompt is no chat

    @property
    def text(self) -> str:
        if self.messages is None:
            return self.decode(self.ids)
        return str(self.messages[self._last_user()]["content"])

    def encode(self, content: Content) -> Sequence[int]:
        if isinstance(content, str):
            return self._texts(content) if self.messages is None else self._chat(self._with_text(content))
        if isinstance(content[0], Message):
            return self._chat([one.model_dump() for one in content if isinstance(one, Message)])
        return [token for token in content if isinstance(token, int)]

    def alone(self, text: str) -> Sequence[int]:
        found: list[int] = self.tokenizer.encode(text)
        return found

    def without(self, span: str) -> Sequence[int]:
        if self.messages is None:
            if span not in self.text:
                raise DecodingError("this text does not stand in the prompt", "context")
            return self._texts(self.text.replace(span, "", 1))
        for index, message in enumerate(self.messages):
            content = message.get("content")
            if isinstance(content, str) and span in content:
                changed = {**message, "content": content.replace(span, "", 1)}
                return self._chat([*self.messages[:index], changed, *self.messages[index + 1 :]])
        raise DecodingError("this text does not stand in any message", "context")

    def as_chat(self) -> Sequence[int]:
        return self.ids if self.messages is not None else self._chat([{"role": "user", "content": self.text}])

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _texts(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer.encode(text, add_special_tokens=self.adds_special_tokens)
        if not found:
            raise DecodingError("nothing is left of the prompt")
        return found

    def _chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        if self.render is None:
            raise DecodingError("this model has no chat template, so messages cannot be a prompt")
        try:
            return self.render(messages)
        except Exception as error:  # a template may raise anything
            raise DecodingError(f"the chat template refuses these messages: {error}") from error

    def _with_text(self, text: str) -> list[Mapping[str, Any]]:
        assert self.messages is not None
        last = self._last_user()
        return [*self.messages[:last], {**self.messages[last], "content": text}, *self.messages[last + 1 :]]

    def _last_user(self) -> int:
        messages = self.messages or ()
        users = [index for index, message in enumerate(messages) if message.get("role") == "user"]
        if not users or not isinstance(messages[users[-1]].get("content"), str):
            raise DecodingError("the chat has no user message of text that another text could take the place of")
        return users[-1]
