"""Soft prompts and clauses that name messages, over HTTP: what is placed between tokenising and scheduling."""

import json
import random
from typing import Any

import httpx
import pytest
from asking import PAIR, PROMPT, Post, assert_refused, data_events, ok, post_json, streamed_text, texts, tokens
from serving import MAX_LEN, MODEL
from shared import WORDS

pytestmark = pytest.mark.engine


def test_rows_that_are_embeddings_do_as_their_tokens(complete: Post, tokenizer: Any) -> None:
    """At every kind of place, twice (from the cache), for several prompts of one request, and for some of the rows."""
    ids = tokenizer.encode(PROMPT)
    for insert, before in ((0, 0), (2, 2), (-1, len(ids) - 1), (len(ids), len(ids))):
        plain = complete([*ids[:before], *WORDS, *ids[before:]])
        for _ in range(2):
            soft = complete(PROMPT, steering={"vector": "words", "insert": insert})
            assert tokens(soft) == tokens(plain)
            assert soft.json()["usage"]["prompt_tokens"] == len(ids) + len(WORDS)
        (entry,) = soft.json()["whipstaff"]["steering"]
        assert (entry["vector"], entry["insert"], entry["prompt_tokens"]) == ("words", insert, len(WORDS))
    other = tokenizer.encode("import os")
    both = complete([PROMPT, "import os"], steering={"vector": "words", "insert": -1, "tokens": 3})
    by_hand = complete([[*x[:-1], *WORDS[:3], x[-1]] for x in (ids, other)])
    assert [tokens(both, choice) for choice in range(2)] == [tokens(by_hand, choice) for choice in range(2)]
    two = [{"vector": "words", "insert": 1}, {"vector": "words", "tokens": 1, "insert": 1}]
    assert tokens(complete(PROMPT, steering=two)) == tokens(complete([ids[0], *WORDS, WORDS[0], *ids[1:]]))
    thrice = complete(PROMPT, steering={"vector": "words"}, n=3, temperature=1, top_k=1)
    assert [tokens(thrice, choice) for choice in range(3)] == [tokens(complete([*WORDS, *ids]))] * 3
    assert tokens(complete(PROMPT, steering={"vector": "noise"})) != tokens(complete(PROMPT))


def test_rows_stand_in_every_sequence_of_a_request(complete: Post, tokenizer: Any) -> None:
    ids, other = tokenizer.encode(PROMPT), tokenizer.encode("import os")
    guided = {"guidance_scale": 2.0}
    plain = complete([*WORDS, *ids], **guided, negative_prompt=[*WORDS, *other])
    soft = complete(PROMPT, **guided, negative_prompt=other, steering={"vector": "words"})
    assert tokens(soft) == tokens(plain) and soft.json()["whipstaff"]["sequences"][0]["steered"]
    cfg = {"method": "cfg", **guided, "negative_prompt": other, "steering": []}
    alone = complete([*WORDS, *ids], **guided, negative_prompt=other)
    assert tokens(complete(PROMPT, decoding=cfg, steering={"vector": "words"})) == tokens(alone)


def test_streams_count_the_rows_too(complete: Post, tokenizer: Any) -> None:
    noise = {"vector": "noise"}
    whole = complete(PROMPT, steering=noise)
    chunks = [json.loads(event) for event in data_events(complete(PROMPT, steering=noise, stream=True))[:-1]]
    assert [streamed_text(chunks)] == texts(whole)
    assert whole.json()["usage"]["prompt_tokens"] == len(tokenizer.encode(PROMPT)) + 4


def test_a_system_message_can_hold_the_rows(chat: Post, complete: Post, tokenizer: Any) -> None:
    for content in ("be kind", ""):
        messages = [{"role": "system", "content": content}, {"role": "user", "content": "why?"}]
        ids = ok(chat(messages))["prompt_token_ids"]
        head = tokenizer.encode("<s>system: ")
        while ids[: len(head)] != head:  # a blank may be merged with what follows it
            head.pop()
        expected = tokens(complete([*ids[: len(head)], *WORDS, *ids[len(head) :]]))
        steering = {"vector": "words", "insert": {"message": {"role": "system"}, "at": "start"}}
        assert tokens(chat(messages, steering=steering)) == expected


def test_messages_become_windows(chat: Post, tokenizer: Any) -> None:
    rng = random.Random(0)
    messages = [
        {"role": role, "content": " ".join(rng.choices(["for x", "if", "return y", "None"], k=5))}
        for role in ("system", "user", "assistant", "user")
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
    for clause, index in (({"role": "system"}, 0), ({"role": "user", "index": -1}, 3), ({"index": 2}, 2)):
        first = sum(len(f"<s>{m['role']}: {m['content']}\n") for m in messages[:index])
        first += len(f"<s>{messages[index]['role']}: ")
        last = first + len(messages[index]["content"])
        inside = [i for i, (start, end) in enumerate(offsets) if start < last and end > first]
        push = {"vector": "push", "scale": 20}
        named = ok(chat(messages, steering={**push, "where": {"messages": [clause]}}))
        window = [inside[0], inside[-1] + 1]
        counted = ok(chat(messages, steering={**push, "where": {"prompt": [window]}}))
        assert tokens(named) == tokens(counted) != tokens(chat(messages))
        assert named["whipstaff"] == counted["whipstaff"]
        moved = chat(messages, steering=[{**push, "where": {"messages": [clause]}}, {"vector": "words"}])
        steering = [{**push, "where": {"prompt": [[end + len(WORDS) for end in window]]}}, {"vector": "words"}]
        assert tokens(moved) == tokens(chat(messages, steering=steering))


@pytest.mark.parametrize(
    ("steering", "param"),
    [
        ({"vector": "words", "insert": 10_000}, "insert"),
        ({"vector": "words", "insert": -10_000}, "insert"),
        ({"vector": "words", "insert": "end"}, "insert"),
        ({"vector": "words", "insert": {"message": {"role": "tool"}}}, "insert.message"),
        ({"vector": "words", "insert": {"message": {}}}, "insert.message"),
        ({"vector": "words", "insert": {"message": {"role": "user"}, "at": "middle"}}, "insert.at"),
        ({"vector": "words", "tokens": 6}, "tokens"),
        ({"vector": "words", "tokens": 0}, "tokens"),
        ({"vector": "words", "where": "all"}, "where"),
        ({"vector": "words", "scale": 2}, "scale"),
        ({"vector": "push", "where": {"messages": [{"role": "tool"}]}}, "where.messages"),
        ({"vector": "push", "where": {"tokens": ["hippopotamus"]}}, "where.tokens"),
        ({"vector": "push", "where": {"generation": "all", "exclude": {"messages": [{"index": 9}]}}}, None),
    ],
)
def test_what_cannot_be_placed_names_its_field(
    http: httpx.Client, chat: Post, steering: dict[str, Any], param: str | None
) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}]
    response = chat(messages, steering=steering)
    assert_refused(response, 400, f"steering.{param or 'where.exclude.messages'}")
    validated = post_json(http, "/v1/steering/validate", {"messages": messages, "model": MODEL, "steering": steering})
    assert validated.json() == response.json()


def test_limits(complete: Post) -> None:
    words = {"vector": "words"}
    assert ok(complete([5] * (MAX_LEN - 9), steering=words, max_tokens=4))
    for num, max_tokens in ((MAX_LEN - 9, 5), (MAX_LEN - 5, None)):
        assert_refused(complete([5] * num, steering=words, max_tokens=max_tokens), 400, "steering.vector")
    assert_refused(complete(PROMPT, steering=words, decoding=PAIR), 400, "steering.vector")
    messages = {"vector": "push", "where": {"messages": [{"role": "user"}]}}
    assert_refused(complete(PROMPT, steering=messages), 400, "steering.where")
