"""Requests that no client should send: valid ones with something wrong in their values, their JSON, their encoding or
their headers."""

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from asking import MOOD, PROMPT, PUSH
from serving import MODEL

TEXT, CHAT, VALIDATE = "/v1/completions", "/v1/chat/completions", "/v1/steering/validate"
RESPONSES = "/v1/responses"
MOST = 8  # tokens of an answer, so that requests that turn out to be right cost little
_LENGTH = {"max_tokens": "max_output_tokens"}  # of responses
_ASKED: dict[str, Any] = {"model": MODEL, "max_tokens": MOST, "temperature": 0.5, "seed": 1}
_MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
_WHEN = {"probe": "probe", "above": 0.5, "decide": "step"}
_SCHEDULE = {"shape": "linear", "from": 1, "to": 0, "tokens": 4}
_WHERE = {"prompt": [[0, -1]], "generation": "all", "exclude": {"tokens": [5]}}
_STEERING: list[Any] = [
    PUSH,
    [PUSH | {"where": _WHERE, "schedule": _SCHEDULE}, {"vector": "iti", "scale": 0.5, "when": _WHEN}],
    [{"vector": "sae", "features": [{"feature": 2, "set": 1.5}], "layers": [1]}],
    [{"vector": "ablate", "renorm": True}, {"vector": "soft", "location": "front"}],
]
_DECODING: list[Any] = [
    {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti", "alpha": 0.5},
    [{"method": "cfg", "guidance_scale": 1.5, "negative_prompt": "A sad story"}, {"method": "typical_p", "p": 0.9}],
    [{"method": "beam_search", "num_beams": 2}],
    [{"method": "cad", "alpha": 0.5, "prompt_without": "def"}, {"method": "min_p", "min_p": 0.1}],
]
_PLAIN: dict[str, Any] = {
    "n": 2,
    "logit_bias": {"5": 1.5},
    "stop": ["\n", "def"],
    "presence_penalty": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "stop_token_ids": [3],
    "allowed_token_ids": [4, 5, 6, 7],
    "bad_words": ["a"],
    "response_format": MOOD,
    "stream": True,
    "stream_options": {"include_usage": True},
    "vllm_xargs": {"dola_layers": "low"},
    "guidance_scale": 1.5,
    "negative_prompt": "A sad story",
    "explain": {"top": 3},
    "on_unknown": "error",
    "dry_multiplier": 0.8,
    "dry_sequence_breakers": ["\n"],
    "structured_outputs": {"regex": "a+"},
    "prompt_logprobs": 1,
    "dynatemp_low": 0.1,
    "dynatemp_high": 0.9,
    "min_tokens": 1,
    "truncate_prompt_tokens": 4,
    "cache_salt": "salt",
    "priority": 0,
    "user": "me",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}],
    "chat_template_kwargs": {"a": 1},
}
_INPUTS: list[Any] = [  # of responses
    "Why?",
    _MESSAGES,
    [{"role": "user", "content": [{"type": "input_text", "text": "Why?"}]}],
    [
        {"role": "assistant", "type": "message", "content": [{"type": "output_text", "text": "No."}]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"role": "user", "content": "Why?"},
    ],
    [
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c", "output": "1"},
    ],
]
_OF_RESPONSES: dict[str, Any] = {
    "instructions": "Be brief.",
    "include": ["message.output_text.logprobs"],
    "top_logprobs": 2,
    "text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "object"}}},
    "store": True,
    "truncation": "auto",
    "previous_response_id": "resp_1",
    "reasoning": {"effort": "low"},
    "metadata": {"a": "b"},
    "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": False}],
    "tool_choice": {"type": "function", "name": "f"},
}
_ODD: list[Any] = [
    *(None, True, False, -1, 0, 0.5, 1e308, -1e308, 5e-324, 1 << 31, 1 << 63, -(1 << 63) - 1, 1 << 70, 10**40),
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\ud800",
        "\udfff\ud800",
        "x" * 5000,
        "NaN",
        "Infinity",
        "-1",
        "\u202e\ufeff",
        "\U0001f600",
    ),
    *([], {}, [[]], [None], [{}], {"": ""}, {"\0": 1}, {"__class__": "x"}, ["a", 1, None, {}], [[[[[[[[]]]]]]]]),
    *(
        [0] * 2000,
        [-1],
        [1 << 70],
        [1.5],
        [True],
        {"a": {"a": {"a": {"a": {}}}}},
        {"vector": "push"},
        {"method": "cfg"},
    ),
    *(float("nan"), float("inf"), -float("inf"), [float("nan")]),
]
_NUMBERS = ("1e400", "-1e400", "1" * 5000, "-0", "0.1e-9999", "NaN", "-Infinity", "01", "1.", "+1", "0x1", "1_000")


@dataclass(frozen=True)
class Sent:
    """A request as it goes over the wire."""

    path: str
    content: bytes
    headers: Mapping[str, str] = field(default_factory=lambda: {"content-type": "application/json"})


def valid(chooser: random.Random) -> tuple[str, dict[str, Any]]:
    """A path and a request that it takes, or would take but for one thing that does not go with another."""
    path = chooser.choice([TEXT, CHAT, VALIDATE, RESPONSES])
    is_chat, may = path == CHAT or (path == VALIDATE and chooser.random() < 0.5), _PLAIN
    body = dict(_ASKED) | ({"messages": _MESSAGES} if is_chat else {"prompt": PROMPT})
    if path == RESPONSES:
        body = {_LENGTH.get(name, name): value for name, value in _ASKED.items()} | {"input": chooser.choice(_INPUTS)}
        may = _PLAIN | _OF_RESPONSES
    if chooser.random() < 0.7:
        body["steering"] = chooser.choice(_STEERING)
    if chooser.random() < 0.5:
        body["decoding"] = chooser.choice(_DECODING)
    body |= {"logprobs": True, "top_logprobs": 2} if is_chat and chooser.random() < 0.2 else {}
    for name in chooser.sample(sorted(may), chooser.choice([0, 1, 1, 2, 4])):
        body[name] = may[name]
    return path, copy.deepcopy(body)


def malformed(number: int) -> Sent:
    """One of a series without an end, the same for a number in every run."""
    chooser = random.Random(number)
    path, body = valid(chooser)
    for _ in range(chooser.choice([0, 1, 1, 1, 2, 3])):
        _spoil(body, chooser)
    _keep_short(body, _LENGTH["max_tokens"] if path == RESPONSES else "max_tokens")
    data = json.dumps(body, ensure_ascii=chooser.random() < 0.7).encode(errors="surrogatepass")
    if chooser.random() < 0.5:
        return Sent(path, data)
    return chooser.choice([_cut, _byte, _number, _twice, _nested, _encoded, _typed])(path, data, chooser)


def _keep_short(body: dict[str, Any], length: str) -> None:
    """Whatever was made of it, an answer takes no minutes."""
    for name in ("max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens"):
        value = body.get(name)
        if isinstance(value, int | float) and MOST < value < 1 << 20:
            body[name] = MOST
    if body.get(length) is None:
        body[length] = MOST


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container with every key or index of it."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _places(value[key])


def _spoil(body: dict[str, Any], chooser: random.Random) -> None:
    """Change one thing, anywhere in it."""
    holder, key = chooser.choice(list(_places(body)) or [(body, "prompt")])
    match chooser.randrange(7):
        case 0 if isinstance(holder, dict):
            del holder[key]
        case 1:
            holder[key] = [holder[key]]
        case 2:
            holder[key] = {chooser.choice(["a", "vector", "0"]): holder[key]}
        case 3 if isinstance(holder, dict):
            holder[chooser.choice(["unknown", "", "\ud800", "a.b[0]", "scale", "x" * 300])] = chooser.choice(_ODD)
        case 4 if isinstance(holder, list):
            holder += [holder[key]] * chooser.choice([1, 50])
        case 5:
            other, where = chooser.choice(list(_places(body)))
            holder[key] = copy.deepcopy(other[where])
        case _:
            holder[key] = copy.deepcopy(chooser.choice(_ODD))


# ---- what is wrong with the bytes


def _cut(path: str, data: bytes, chooser: random.Random) -> Sent:
    return Sent(path, data[: chooser.randrange(len(data))])


def _byte(path: str, data: bytes, chooser: random.Random) -> Sent:
    at, new = (
        chooser.randrange(len(data)),
        chooser.choice([b"\0", b"\xff", b"\xed\xa0\x80", bytes([chooser.randrange(256)])]),
    )
    return Sent(path, data[:at] + new + data[at + chooser.randrange(2) :])


def _number(path: str, data: bytes, chooser: random.Random) -> Sent:
    """A number as only some parsers read it."""
    number = chooser.choice(_NUMBERS).encode()
    for asked in chooser.sample([b'"temperature": 0.5', b'"seed": 1', b'"scale": 2', b'"max_tokens": 8'], 4):
        if asked in data:
            return Sent(path, data.replace(asked, asked.split(b":")[0] + b": " + number))
    return Sent(path, data[:-1] + b', "seed": ' + number + b"}")


def _twice(path: str, data: bytes, chooser: random.Random) -> Sent:
    """A key that comes again with another value."""
    odd = json.dumps(chooser.choice(_ODD)).encode()
    key = chooser.choice([b"model", b"steering", b"decoding", b"max_tokens", b"temperature"])
    return Sent(path, b'{"' + key + b'": ' + odd + b", " + data[1:])


def _nested(path: str, data: bytes, chooser: random.Random) -> Sent:
    depth, (opening, closing) = (
        chooser.choice([5, 60, 63, 64, 65, 2000]),
        chooser.choice([(b"[", b"]"), (b'{"a":', b"}")]),
    )
    key = chooser.choice([b"steering", b"decoding", b"prompt", b"messages", b"stop", b"unknown"])
    return Sent(path, data[:-1] + b', "' + key + b'": ' + opening * depth + b"1" + closing * depth + b"}")


def _encoded(path: str, data: bytes, chooser: random.Random) -> Sent:
    text = data.decode(errors="surrogatepass")
    how = chooser.choice(["utf-16", "utf-32-le", "utf-8-sig", "latin-1", "utf-7", "ascii"])
    return Sent(path, text.encode(how, errors="backslashreplace"))


def _typed(path: str, data: bytes, chooser: random.Random) -> Sent:
    kinds: Sequence[Mapping[str, str]] = (
        {},
        {"content-type": ""},
        {"content-type": "text/plain"},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "multipart/form-data; boundary=x"},
        {"content-type": "multipart/form-data"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/vnd.api+json"},
        {"content-type": "APPLICATION/JSON"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "application/json", "x-request-id": "\\0" * 200},
        {"content-type": "application/json", "x-data-parallel-rank": "x"},
        {"content-type": "application/json", "endpoint-load-metrics-format": "x"},
        {"content-type": "application/json", "traceparent": "00-0-0-0"},
    )
    return Sent(path, data, chooser.choice(kinds))
