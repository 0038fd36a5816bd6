"""Message spans: templates of many habits, random chats, against a rendering in which every piece is known."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from serving import make_tokenizer
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import ByteLevel, TemplateProcessing
from transformers import PreTrainedTokenizerFast

from whipstaff.decoding.method import DecodingError
from whipstaff.server.prompt.message_spans import Chat, Message, Prompt, id_of
from whipstaff.server.prompt.prompt_source import PromptSource
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.where import Messages, Where

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set rest = messages[1:] -%}{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
{%- else -%}{%- set rest = messages -%}{%- set system = '' -%}{%- endif -%}
{%- for m in rest -%}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles must alternate') }}{%- endif -%}
{%- if m['role'] == 'user' -%}
{{ bos_token + '[INST] ' + (system if loop.first else '') + m['content'].strip() + ' [/INST]' }}
{%- else -%}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""
QWEN3 = """\
{%- for m in messages -%}
{%- if m['role'] == 'assistant' -%}
{%- set content = m['content'].split('</think>')[-1].lstrip('\n') -%}
{{- '<|im_start|>assistant\n' + ('<think>\n\n</think>\n\n' if loop.last else '') + content + '<|im_end|>\n' -}}
{%- else -%}{{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""
PARTS = (
    "{% for m in messages %}[{{ m['role'] }}]{% for part in m['content'] %}<{{ part['text'] }}>{% endfor %}\n"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "qwen3": QWEN3}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    made = make_tokenizer()
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    return made


def chat(tokenizer: Any, template: str, messages: Sequence[Message], ids: list[int] | None = None) -> Chat:
    render = renderer(tokenizer, template)
    if ids is None:
        ids = tokenizer.encode(render(messages, True), add_special_tokens=False)
    return Chat(tokenizer, messages, ids, render)


def renderer(tokenizer: Any, template: str) -> Callable[[Sequence[Message], bool], str]:
    def render(messages: Sequence[Message], is_prompt: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                list(messages), chat_template=template, tokenize=False, add_generation_prompt=is_prompt
            )
        )

    return render


WORDS = [
    "def",
    " return",
    "x = 1",
    "Ünïcödé 日本",
    "🙂",
    "\n\n",
    "  ",
    "<|eot",
    "None.",
    "user",
    "raise ValueError(",
    "a",
]


def random_chat(rng: random.Random) -> list[dict[str, Any]]:
    """Texts begin and end with a number of their own, so that each stands once in the prompt."""
    roles = ["system"] * rng.randint(0, 1) + ["user", "assistant"] * rng.randint(0, 3) + ["user"]
    messages = []
    for index, role in enumerate(roles):
        words = [f"{index}begins", *rng.choices(WORDS, k=rng.randint(0, 6)), f"{index}ends"]
        messages.append({"role": role, "content": rng.choice([" ", ""]).join(words)})
    return messages


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(12))
def test_spans_are_the_tokens_that_hold_the_content(tokenizer: Any, name: str, seed: int) -> None:
    rng = random.Random(seed)
    messages = random_chat(rng)
    text = renderer(tokenizer, TEMPLATES[name])(messages, True)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    asked = chat(tokenizer, TEMPLATES[name], messages)
    for index, message in enumerate(messages):
        first = text.index(message["content"])
        last = first + len(message["content"])
        tokens = [i for i, (start, end) in enumerate(encoding["offset_mapping"]) if start < last and first < end]
        expected = [(tokens[0], tokens[-1] + 1)]
        assert asked.spans(Messages(index=index)) == expected
        assert asked.spans(Messages(index=index - len(messages))) == expected
        of_role = [i for i, other in enumerate(messages) if other["role"] == message["role"]]
        assert asked.spans(Messages(role=message["role"], index=of_role.index(index))) == expected
        assert expected[0] in asked.spans(Messages(role=message["role"]))
    assert len(asked.spans(Messages())) == len(messages)
    assert asked.spans(Messages(role="tool")) == asked.spans(Messages(index=len(messages))) == []


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(12))
def test_whole_messages_tile_the_prompt(tokenizer: Any, name: str, seed: int) -> None:
    """Up to the invitation to answer."""
    messages = random_chat(random.Random(seed))
    render = renderer(tokenizer, TEMPLATES[name])
    asked = chat(tokenizer, TEMPLATES[name], messages)
    whole = asked.spans(Messages(whole=True))
    tokens = tokenizer(render(messages, True), add_special_tokens=False)["input_ids"]
    if name == "llama2" and messages[0]["role"] == "system":
        assert whole[0] == whole[1]  # folded into the user's
        whole = whole[1:]
    assert [first for first, _ in whole] == [0, *(last for _, last in whole[:-1])]
    said = [tokenizer.decode(tokens[first:last], clean_up_tokenization_spaces=False) for first, last in whole]
    assert "".join(said) == (render(messages, False) if name != "llama2" else render(messages, True))
    for part, message in zip(said[::-1], messages[::-1], strict=False):
        assert message["content"] in part
        if name == "chatml":
            assert part == f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
        if name == "llama3":
            head = f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n"
            assert part.removeprefix("<s>") == f"{head}{message['content']}<|eot_id|>"


def test_what_a_template_trims_or_cuts_is_no_part(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "\n  hello there  \n"}]
    ids = tokenizer.encode(renderer(tokenizer, LLAMA3)(messages, True), add_special_tokens=False)
    ((first, last),) = chat(tokenizer, LLAMA3, messages).spans(Messages(role="user"))
    assert tokenizer.decode(ids[first:last]) == "hello there"
    messages = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "<think>hm</think>\n\nso"}]
    messages += [{"role": "user", "content": "ah"}]
    ids = tokenizer.encode(renderer(tokenizer, QWEN3)(messages, True), add_special_tokens=False)
    ((first, last),) = chat(tokenizer, QWEN3, messages).spans(Messages(role="assistant"))
    assert tokenizer.decode(ids[first:last]) == "so"


def test_a_token_that_straddles_an_edge_is_part(tokenizer: Any) -> None:
    template = "{% for m in messages %}def{{ m['content'] }}return{% endfor %}"  # BPE merges across the edges
    for content in ("ault", " x", "s r", "_", "\n\n"):
        messages = [{"role": "user", "content": content}]
        text = f"def{content}return"
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        tokens = [
            i for i, (start, end) in enumerate(encoding["offset_mapping"]) if start < 3 + len(content) and end > 3
        ]
        assert chat(tokenizer, template, messages).spans(Messages()) == [(tokens[0], tokens[-1] + 1)]


def test_parts_of_text(tokenizer: Any) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]
    messages = [{"role": "user", "content": parts}, {"role": "user", "content": parts[:1]}]
    asked = chat(tokenizer, PARTS, messages)
    ids = tokenizer.encode(renderer(tokenizer, PARTS)(messages, True), add_special_tokens=False)
    said = [tokenizer.decode(ids[first:last]) for first, last in asked.spans(Messages(role="user"))]
    assert "hello><there" in said[0] and "hello" in said[1] and "there" not in said[1]


def test_a_message_without_content_has_a_place(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": ""}, {"role": "user", "content": "hi"}]
    asked = chat(tokenizer, CHATML, messages)
    ids = tokenizer.encode("<|im_start|>system\n", add_special_tokens=False)
    assert asked.bounds(Messages(role="system")) == [(len(ids), len(ids))]
    assert asked.spans(Messages(role="system")) == []
    assert len(asked.spans(Messages())) == len(asked.spans(Messages(index=1))) == 1


def test_special_tokens_of_the_tokenizer_itself(tokenizer: Any) -> None:
    """Some prompts are tokenised with a beginning-of-sequence token besides the template's text."""
    made = make_tokenizer()
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    messages = [{"role": "user", "content": "hello"}]
    text = renderer(made, CHATML)(messages, True)
    ids = made.encode(text)
    assert ids[0] == 0
    ((first, last),) = chat(made, CHATML, messages, ids).spans(Messages())
    ((first_without, last_without),) = chat(made, CHATML, messages).spans(Messages())
    assert (first, last) == (first_without + 1, last_without + 1)
    ((first, last),) = chat(made, CHATML, messages, ids).spans(Messages(whole=True))
    assert made.decode(ids[first:last]) == "<|im_start|>user\nhello<|im_end|>\n"


def test_offsets_that_leave_out_blanks(tokenizer: Any) -> None:
    """As GPT-2's do: a token of blanks alone then seems to have no characters."""
    made = make_tokenizer()
    made.backend_tokenizer.post_processor = ByteLevel(trim_offsets=True)
    messages = [{"role": "user", "content": "  return\n\n   x  "}]
    ids = made.encode(renderer(made, "[{{ messages[0]['content'] }}]")(messages, True))
    asked = chat(made, "[{{ messages[0]['content'] }}]", messages)
    ((first, last),) = asked.spans(Messages())
    assert (first, last) == (1, len(ids) - 1) and made.decode(ids[1:-1]) == messages[0]["content"]


def test_a_message_without_content_has_a_place_before_the_token_that_holds_it(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": ""}]
    asked = chat(tokenizer, "import de{{ messages[0]['content'] }}f", messages)
    expected, straddled = tokenizer.encode("import def")[:-1], tokenizer.encode(" def")
    assert len(straddled) == 1 and asked.bounds(Messages()) == [(len(expected), len(expected))]


def test_calls_of_tools_have_no_content(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}<s>{{ m['role'] }}:{% if m['tool_calls'] %}{{ m['tool_calls'] }}{% else %}"
        "{{ m['content'] }}{% endif %}{% endfor %}"
    )
    messages: list[dict[str, Any]] = [{"role": "user", "content": "hi"}]
    messages.append({"role": "assistant", "content": None, "tool_calls": "now()"})
    messages += [{"role": "tool", "content": "noon"}]
    asked = chat(tokenizer, template, messages)
    assert len(asked.spans(Messages())) == 2 and asked.spans(Messages(role="assistant")) == []
    ids = tokenizer.encode(renderer(tokenizer, template)(messages, True), add_special_tokens=False)
    said = [tokenizer.decode(ids[first:last]) for first, last in asked.spans(Messages(whole=True))]
    assert said == ["<s>user:hi", "<s>assistant:now()", "<s>tool:noon"]
    with pytest.raises(SteeringError, match="content of message 1, which has the role 'assistant'"):
        asked.bounds(Messages(role="assistant"))


def test_ends_that_the_template_hides(tokenizer: Any) -> None:
    """Where only the last message ends as it does, nothing tells how the others would: they share what they have."""
    template = "{% for m in messages %}<s>{{ m['content'] }}{{ '!' if loop.last else ';' }}{% endfor %}"
    messages = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    asked = chat(tokenizer, template, messages)
    ids = tokenizer.encode("<s>one;<s>two!", add_special_tokens=False)
    assert asked.spans(Messages(whole=True)) == [(0, len(ids))] * 2
    assert len(set(asked.spans(Messages()))) == 2


def test_what_cannot_be_told_is_refused(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "hello"}]
    ids = tokenizer.encode(renderer(tokenizer, CHATML)(messages, True), add_special_tokens=False)
    with pytest.raises(SteeringError, match="it was truncated"):
        chat(tokenizer, CHATML, messages, ids[1:]).spans(Messages())
    for template in (
        "{{ messages[0]['content'] | upper }}",
        "{{ messages | length }}",
        "{{ messages[0]['content'] }}" * 2,
        "{{ messages[0]['content'] }}{{ messages[0]['content'] | length }}",
        "{{ messages[0]['content'] | length }}{{ messages[0]['content'] }}",
        "{{ 'ab' if 'll' in messages[0]['content'] else 'ab' + messages[0]['content'] + 'ab' }}",
    ):
        with pytest.raises(SteeringError, match="does not show where it puts the content of message 0"):
            chat(tokenizer, template, messages).spans(Messages())


def test_clauses_resolve(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    asked = chat(tokenizer, CHATML, messages)
    where = Where.model_validate({"messages": [{"role": "system"}], "exclude": {"tokens": ["<|im_end|>"]}})
    resolved = where.resolved(asked.spans, lambda text: id_of(tokenizer, text))
    assert resolved.intervals(100) == asked.spans(Messages(role="system"))
    assert resolved.token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    with pytest.raises(SteeringError, match="no message"):
        Where.model_validate({"messages": [{"role": "tool"}]}).resolved(asked.spans, lambda text: 0)


def test_ids(tokenizer: Any) -> None:
    assert id_of(tokenizer, "<|eot_id|>") == tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert id_of(tokenizer, "</s>") == 1
    for text in ("a", "\n", "def", " self"):
        assert tokenizer.decode([id_of(tokenizer, text)]) == text
    assert id_of(tokenizer, "Ġself") == id_of(tokenizer, " self")
    words = Tokenizer(WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    known = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
    assert (id_of(known, "a"), id_of(known, "[UNK]")) == (0, 1)
    for each, text in ((tokenizer, "hippopotamus"), (known, "b")):
        with pytest.raises(SteeringError, match="is not one token but"):
            id_of(each, text)
    with pytest.raises(SteeringError, match="is not one token but 0"):
        id_of(tokenizer, "")


# ---- texts in prompts


def prompt_of(tokenizer: Any, text: str, written: bool = True) -> Prompt:
    ids = tokenizer.encode(text)
    source = PromptSource(ids, tokenizer, True, lambda _: [], written=text if written else None)
    return Prompt(len(ids), ids, 99, tokenizer, source=source)


@pytest.mark.parametrize("written", [True, False])
def test_a_text_is_found_in_a_prompt_of_text(tokenizer: Any, written: bool) -> None:
    prompt = prompt_of(tokenizer, "def main(): return x + main()", written)
    assert prompt.ids is not None
    for text in ("main", "return x", "def main(): return x + main()", "x"):
        start, end = prompt.text_at(text, "span")
        assert text in tokenizer.decode(prompt.ids[start:end])
        assert all(text not in tokenizer.decode(prompt.ids[start:cut]) for cut in range(start, end))
        assert all(text not in tokenizer.decode(prompt.ids[cut:end]) for cut in range(start + 1, end))
    with pytest.raises(DecodingError, match="does not stand in the prompt") as caught:
        prompt.text_at("nowhere", "span")
    assert caught.value.param == "span"


def test_a_text_and_messages_are_found_in_a_chat(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why be kind?"}]
    located = chat(tokenizer, CHATML, messages)
    ids = tokenizer.encode(renderer(tokenizer, CHATML)(messages, True), add_special_tokens=False)
    prompt = Prompt(len(ids), ids, 99, tokenizer, located)
    start, end = prompt.text_at("why be", "span")
    assert "why be" in tokenizer.decode(ids[start:end]) and end - start < 8
    assert prompt.messages_at("user", -1, "span") == located.spans(Messages(role="user", index=-1))
    assert len(prompt.messages_at(None, None, "span")) == 2
    for role, index in (("tool", None), (None, 2)):
        with pytest.raises(DecodingError, match="no message matches"):
            prompt.messages_at(role, index, "span")


def test_what_is_more_than_text_has_no_texts(tokenizer: Any) -> None:
    with pytest.raises(DecodingError, match="name windows instead"):
        Prompt(3, None, 99, tokenizer).text_at("a", "span")
