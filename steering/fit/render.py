"""From texts to tokens, and which of them are read: what a chat template adds is part of what a model was asked."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.data import BadData, Item, Prompt
from whipstaff.steering.fit.source import Asked

_ALNUM = re.compile(r"[^\W_]")


@dataclass(frozen=True)
class Rendered:
    """Tokens of one text, and where the response begins among them."""

    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]  # each token's characters in `text`
    text: str
    num_prompt: int  # tokens before the response
    is_torn: bool  # a token holds the end of the prompt and the start of the response

    @property
    def response(self) -> tuple[int, ...]:
        return self.ids[self.num_prompt :]

    @property
    def prompt_end(self) -> int:
        """Tokens of the prompt; of a whole text, to which nobody responds, all of them."""
        return self.num_prompt or len(self.ids)

    def asked(self, read: str) -> Asked:
        """Where to read. Raises: SteeringError when the text has no such token."""
        num = len(self.ids)
        if read == "last":
            return Asked(self.ids, (num - 1,))
        if read == "last-prompt":
            return Asked(self.ids, (self.prompt_end - 1,))
        if read == "answer":
            return Asked(self.ids, (self._answer(),))
        if read == "response-mean":
            if self.num_prompt == num:
                raise SteeringError(f"there is no response to read in {self.text[-60:]!r}", "read")
            return Asked(self.ids, tuple(range(self.num_prompt, num)), is_mean=True)
        if read == "prompt-mean":
            return Asked(self.ids, tuple(range(self.prompt_end)), is_mean=True)
        if -int(read) > num:
            raise SteeringError(f"token {read} of a text that has {num}: {self.text[-60:]!r}", "read")
        return Asked(self.ids, (num + int(read),))

    def _answer(self) -> int:
        """The token with the response's first letter or digit, as the A of "(A)"."""
        start = self.spans[self.num_prompt][0] if self.num_prompt < len(self.ids) else len(self.text)
        found = _ALNUM.search(self.text, start)
        if found is None:
            raise SteeringError(f"there is no answer to read in {self.text[-60:]!r}", "read")
        return next(index for index, (_, end) in enumerate(self.spans) if end > found.start())


def read_at(rendered: Rendered, read: str, item: Item) -> Asked:
    """Where to read a text of a row. Raises: BadData, naming the row."""
    try:
        return rendered.asked(read)
    except SteeringError as error:
        raise BadData(str(error), item.place, param=error.param) from error


class Template:
    """How prompts and responses become tokens.

    Args:
        tokenizer: of transformers, a fast one (characters of tokens are asked for).
        form: "chat": the tokenizer's chat template; "none": as they are, after each other; or a text with {prompt} and
            {response}, such as "Q: {prompt} A: {response}".
        system: a system message, for "chat".
        most: tokens of a text; None: nobody says.
    """

    def __init__(self, tokenizer: Any, form: str = "chat", system: str | None = None, most: int | None = None) -> None:
        if not tokenizer.is_fast:
            raise SteeringError("the model has no fast tokenizer (tokenizer.json), which tells where tokens stand")
        if form == "chat" and not tokenizer.chat_template:
            raise SteeringError("the model has no chat template: --template none, or a form", "template")
        if form not in ("chat", "none") and ("{prompt}" not in form or not form.endswith("{response}")):
            raise SteeringError("say chat, none, or a form with {prompt} that ends in {response}", "template")
        if system is not None and form != "chat":
            raise SteeringError("a system message takes the chat template", "system")
        self.tokenizer, self.form, self.system, self.most = tokenizer, form, system, most

    def render(self, prompt: Prompt | None, response: str | None = None) -> Rendered:
        """Tokens of a prompt, and of a response to it where there is one. Without a prompt, `response` is a whole text
        that stands as it is. Raises: SteeringError."""
        if prompt is None:
            assert response is not None
            return self._tokens("", response, adds_special=True)
        if self.form == "chat":
            before, after = self._chat(prompt, response)
            return self._tokens(before, after, adds_special=False)  # the template's text has its BOS
        if not isinstance(prompt, str):
            raise SteeringError("a prompt of messages takes --template chat", "template")
        form = "{prompt}{response}" if self.form == "none" else self.form
        before = form.removesuffix("{response}").replace("{prompt}", prompt)
        if response is None:
            before = before.rstrip(" ")  # a space belongs to the answer's first token
        return self._tokens(before, response or "", adds_special=True)

    def _chat(self, prompt: Prompt, response: str | None) -> tuple[str, str]:
        """The text up to the response, and the response."""
        messages: list[dict[str, str]] = [] if self.system is None else [{"role": "system", "content": self.system}]
        if isinstance(prompt, str):
            messages.append({"role": "user", "content": prompt})
        else:
            messages += [message.model_dump() for message in prompt]
        if response is None:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)), ""
        messages.append({"role": "assistant", "content": response})
        whole = str(self.tokenizer.apply_chat_template(messages, tokenize=False, continue_final_message=True))
        said = response.strip()
        if not whole.rstrip().endswith(said):
            raise SteeringError(f"the chat template changes the response {response[:60]!r}", "template")
        end = len(whole.rstrip())
        return whole[: end - len(said)], said

    def _tokens(self, before: str, after: str, adds_special: bool) -> Rendered:
        text = before + after
        found = self.tokenizer(text, add_special_tokens=adds_special, return_offsets_mapping=True)
        ids, spans = found["input_ids"], found["offset_mapping"]
        if not ids:
            raise SteeringError("a text without tokens")
        if self.most is not None and len(ids) > self.most:
            raise SteeringError(f"a text of {len(ids)} tokens, and the model takes {self.most}")
        cut = len(before)
        first = next((index for index, (_, end) in enumerate(spans) if end > cut), len(ids))
        torn = first < len(ids) and spans[first][0] < cut and before[spans[first][0] : cut].strip() != ""
        return Rendered(tuple(ids), tuple(map(tuple, spans)), text, first if after else len(ids), bool(torn))

    def warnings(self, rendered: Rendered) -> list[str]:
        """What is often wrong with a text that was made by hand."""
        found = []
        bos = self.tokenizer.bos_token_id
        if bos is not None and rendered.ids[:2] == (bos, bos):
            found.append("the text begins with BOS twice")
        if rendered.is_torn:
            found.append("a token holds the end of the prompt and the start of the answer: put a space between them")
        return found


def shown(rendered: Rendered, read: Sequence[int]) -> list[str]:
    """One line per token, with a mark at those that are read."""
    marked, pieces = set(read), []
    for index, (start, end) in enumerate(rendered.spans):
        mark = "->" if index in marked else "  "
        part = "prompt" if index < rendered.num_prompt else "answer"
        pieces.append(f"{mark} {index:>4}  {rendered.ids[index]:>7}  {part}  {rendered.text[start:end]!r}")
    return pieces
