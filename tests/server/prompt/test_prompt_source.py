"""Prompts made of a request's prompt: texts, token ids, chats."""

from typing import Any

import pytest
from serving import make_tokenizer
from transformers import PreTrainedTokenizerFast

from whipstaff.decoding.method import DecodingError, Message
from whipstaff.server.prompt.prompt_source import PromptSource

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Is it raining?"},
    {"role": "assistant", "content": "No."},
    {"role": "user", "content": "It rains. Is it raining?"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="module")
def with_start(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """One that begins every text with <s>."""
    made = make_tokenizer()
    from tokenizers.processors import TemplateProcessing

    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def source_of(tokenizer: Any, text: str = "", adds: bool = True, **own: Any) -> PromptSource:
    def render(messages: Any) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(list(messages), return_dict=False)
        return found

    ids = tokenizer.encode(text, add_special_tokens=adds)
    return PromptSource(**{"ids": ids, "tokenizer": tokenizer, "adds_special_tokens": adds, "render": render} | own)


def chat_of(tokenizer: Any, messages: Any = CHAT) -> PromptSource:
    return source_of(tokenizer, ids=source_of(tokenizer).render(messages), messages=messages)


def test_other_prompts_are_made_as_this_one_was(with_start: PreTrainedTokenizerFast) -> None:
    hello = with_start.encode("hello", add_special_tokens=False)
    assert source_of(with_start, "a").encode("hello", "x") == [0, *hello]
    assert source_of(with_start, "a", adds=False).encode("hello", "x") == hello
    assert source_of(with_start, "a").encode([5, 6], "x") == [5, 6]
    assert source_of(with_start, "a").alone("hello") == [0, *hello]


def test_messages_go_through_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    wanted = tokenizer.encode("<s>user: hello\nassistant:")
    for source in (source_of(tokenizer, "a"), chat_of(tokenizer)):
        assert source.encode([Message(role="user", content="hello")], "x") == wanted
    assert source_of(tokenizer, "hello").as_chat("x") == wanted
    assert chat_of(tokenizer).as_chat("x") == chat_of(tokenizer).ids


def test_a_text_takes_the_last_user_messages_place_in_a_chat(tokenizer: PreTrainedTokenizerFast) -> None:
    source = chat_of(tokenizer)
    assert source.text == "It rains. Is it raining?"
    wanted = chat_of(tokenizer, [*CHAT[:3], {"role": "user", "content": "other"}]).ids
    assert source.encode("other", "x") == source.changed("other") == wanted


def test_a_span_is_taken_out_once(tokenizer: PreTrainedTokenizerFast) -> None:
    assert source_of(tokenizer, "it is, it is").without("it is", "x") == tokenizer.encode(", it is")
    found = chat_of(tokenizer).without("It rains. ", "x")
    assert found == chat_of(tokenizer, [*CHAT[:3], {"role": "user", "content": "Is it raining?"}]).ids
    for source in (source_of(tokenizer, "it is"), chat_of(tokenizer)):
        with pytest.raises(DecodingError, match="does not stand in") as caught:
            source.without("snow", "context")
        assert caught.value.param == "context"


@pytest.mark.parametrize(
    "text", ["plain", "<s>user: with special tokens\nassistant:", "<s> at the beginning", "é ü 漢"]
)
def test_tokens_have_a_text(with_start: PreTrainedTokenizerFast, text: str) -> None:
    """Whatever began the prompt begins what is made of it, once."""
    for adds in (True, False):
        source = source_of(with_start, text, adds, adds_special_tokens=True)
        assert source.changed(source.text) == source.ids
        assert source.without("e", "x").count(0) == source.ids.count(0) if "e" in text else True


def test_the_text_that_was_sent_is_the_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    assert source_of(tokenizer, "written", written="written").text == "written"


def test_tokens_that_no_text_has_are_refused_where_the_text_is_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    apart = [tokenizer.encode(letter)[0] for letter in "import"]  # the tokenizer has a token for the word
    source = source_of(tokenizer, ids=apart)
    assert source.encode("other", "x") == tokenizer.encode("other")
    with pytest.raises(DecodingError, match="send it as a text"):
        source.without("i", "x")


def test_what_the_template_cannot_take_names_the_field() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(DecodingError, match="chat template") as caught:
        source_of(tokenizer, "a").encode([Message(role="user", content="b")], "negative_prompt")
    assert caught.value.param == "negative_prompt"


def test_a_chat_without_a_user_has_no_text(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DecodingError, match="no user message"):
        chat_of(tokenizer, CHAT[:1]).encode("b", "x")
