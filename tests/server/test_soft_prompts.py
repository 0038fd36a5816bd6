"""Soft prompts and clauses that name messages, over HTTP: what is placed between tokenising and scheduling."""

import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from whipstaff.server.chat import Prompt
from whipstaff.server.errors import BadRequest
from whipstaff.server.placing import SoftPrompt, place_plan
from whipstaff.steering import artifacts
from whipstaff.steering.artifacts import Header
from whipstaff.steering.inserts import Wanted, place_inserts, shift
from whipstaff.steering.methods.virtual_tokens import InsertParams
from whipstaff.steering.plan import SteeringPlan

from .serving import MAX_LEN, MODEL, SHAPE, Server, save_models, serving

WORDS = [40, 77, 130, 205, 66]  # tokens whose embeddings the soft prompt's rows are
TEXT = "def main("


@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 12)), max_size=5),
    st.sets(st.integers(0, 9)),
)
def test_what_is_inserted_can_be_taken_out(ids: list[int], chosen: list[tuple[int, int]], avoid: set[int]) -> None:
    wanted = [Wanted(str(i), num, min(before, len(ids))) for i, (num, before) in enumerate(chosen)]
    expanded, inserts = place_inserts(ids, wanted, avoid)
    rows = {
        position: insert.digest for insert in inserts for position in range(insert.start, insert.start + insert.num)
    }
    assert [token for position, token in enumerate(expanded) if position not in rows] == ids
    assert len(expanded) == len(ids) + len(rows)
    assert not {expanded[position] for position in rows} & avoid
    for digest, num, before in wanted:
        (insert,) = [insert for insert in inserts if insert.digest == digest]
        assert insert.num == num
        assert sum(position not in rows for position in range(insert.start)) == before
    order = [(wanted[int(insert.digest)].before, int(insert.digest)) for insert in inserts]
    assert order == sorted(order)
    real = [position for position in range(len(expanded)) if position not in rows]
    for start in range(len(ids)):
        for end in range(start + 1, len(ids) + 1):
            assert shift((start, end), inserts) == (real[start], real[end - 1] + 1)


def test_placeholders_are_tokens_of_the_prompt() -> None:
    assert place_inserts([5, 6], [Wanted("a", 2, 1)])[0] == [5, 5, 5, 6]
    assert place_inserts([5, 6], [Wanted("a", 2, 1)], {5})[0] == [5, 6, 6, 6]
    assert place_inserts([5, 6], [Wanted("a", 1, 0)], {5, 6, 0})[0] == [1, 5, 6]


def test_rows_need_room() -> None:
    soft = SoftPrompt("steering[0]", "a", InsertParams(), 5)
    plan, ids = place_plan(SteeringPlan(()), [], [soft], Prompt(3, [7, 8, 9], 8, None))
    assert ids == [7] * 5 + [7, 8, 9] and plan.inserts == (("a", 0, 5),)
    for prompt, message in (
        (Prompt(3, [7, 8, 9], 7, None), "room for 4"),
        (Prompt(3, None, 99, None), "text or tokens"),
    ):
        with pytest.raises(BadRequest, match=message) as caught:
            place_plan(SteeringPlan(()), [], [soft], prompt)
        assert caught.value.param == "steering[0].vector"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("soft")
    model = LlamaForCausalLM.from_pretrained(save_models(folder / "again")["base"])
    rows: Tensor = model.get_input_embeddings().weight.detach()[WORDS]
    (folder / "soft").mkdir()
    artifacts.write(folder / "soft" / "words.safetensors", Header(method="soft_prompt", model=SHAPE), {"rows": rows})
    noise = torch.randn(4, SHAPE.hidden_size, generator=torch.Generator().manual_seed(0))
    artifacts.write(folder / "soft" / "noise.safetensors", Header(method="soft_prompt", model=SHAPE), {"rows": noise})
    with serving(folder, "--vectors", str(folder / "soft")) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> Any:
    return AutoTokenizer.from_pretrained(server.models["base"])


def complete(http: httpx.Client, prompt: Any, **fields: Any) -> dict[str, Any]:
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True, **fields}
    return answered(http.post("/v1/completions", json=body))


def chat(http: httpx.Client, messages: Any, **fields: Any) -> httpx.Response:
    body = {"model": MODEL, "messages": messages, "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    return http.post("/v1/chat/completions", json={**body, **fields})


def answered(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def tokens(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


@pytest.mark.engine
def test_rows_that_are_embeddings_do_as_their_tokens(http: httpx.Client, tokenizer: Any) -> None:
    """At every kind of place, twice (from the cache), for several prompts of one request, and for some of the rows."""
    ids = tokenizer.encode(TEXT)
    for insert, before in ((0, 0), (2, 2), (-1, len(ids) - 1), (len(ids), len(ids))):
        plain = complete(http, [*ids[:before], *WORDS, *ids[before:]])
        for _ in range(2):
            soft = complete(http, TEXT, steering={"vector": "words", "insert": insert})
            assert tokens(soft) == tokens(plain)
            assert soft["usage"]["prompt_tokens"] == len(ids) + len(WORDS)
        (entry,) = soft["whipstaff"]["steering"]
        assert (entry["vector"], entry["insert"], entry["prompt_tokens"]) == ("words", insert, len(WORDS))
    other = tokenizer.encode("import os")
    both = complete(http, [TEXT, "import os"], steering={"vector": "words", "insert": -1, "tokens": 3})
    assert tokens(both) == tokens(complete(http, [[*x[:-1], *WORDS[:3], x[-1]] for x in (ids, other)]))
    two = [{"vector": "words", "insert": 1}, {"vector": "words", "tokens": 1, "insert": 1}]
    assert tokens(complete(http, TEXT, steering=two)) == tokens(complete(http, [ids[0], *WORDS, WORDS[0], *ids[1:]]))
    thrice = complete(http, TEXT, steering={"vector": "words"}, n=3, temperature=1, top_k=1)
    assert tokens(thrice) == tokens(complete(http, [*WORDS, *ids])) * 3
    assert tokens(complete(http, TEXT, steering={"vector": "noise"})) != tokens(complete(http, TEXT))


@pytest.mark.engine
def test_streams_count_the_rows_too(http: httpx.Client, tokenizer: Any) -> None:
    body = {"model": MODEL, "prompt": TEXT, "max_tokens": 6, "temperature": 0, "steering": {"vector": "noise"}}
    whole = answered(http.post("/v1/completions", json=body))
    with http.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: {")]
    assert (
        "".join(httpx.Response(200, text=line).json()["choices"][0]["text"] for line in lines)
        == (whole["choices"][0]["text"])
    )
    assert whole["usage"]["prompt_tokens"] == len(tokenizer.encode(TEXT)) + 4


@pytest.mark.engine
def test_a_system_message_can_hold_the_rows(http: httpx.Client, tokenizer: Any) -> None:
    for content in ("be kind", ""):
        messages = [{"role": "system", "content": content}, {"role": "user", "content": "why?"}]
        ids = answered(chat(http, messages))["prompt_token_ids"]
        head = tokenizer.encode("<s>system: ")
        while ids[: len(head)] != head:  # a blank may be merged with what follows it
            head.pop()
        expected = tokens(complete(http, [*ids[: len(head)], *WORDS, *ids[len(head) :]]))
        steering = {"vector": "words", "insert": {"message": {"role": "system"}, "at": "start"}}
        assert tokens(answered(chat(http, messages, steering=steering))) == expected


@pytest.mark.engine
def test_messages_become_windows(http: httpx.Client, tokenizer: Any) -> None:
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
        named = answered(chat(http, messages, steering={**push, "where": {"messages": [clause]}}))
        window = [inside[0], inside[-1] + 1]
        counted = answered(chat(http, messages, steering={**push, "where": {"prompt": [window]}}))
        assert tokens(named) == tokens(counted) != tokens(answered(chat(http, messages)))
        assert named["whipstaff"] == counted["whipstaff"]
        moved = answered(
            chat(http, messages, steering=[{**push, "where": {"messages": [clause]}}, {"vector": "words"}])
        )
        steering = [{**push, "where": {"prompt": [[end + len(WORDS) for end in window]]}}, {"vector": "words"}]
        assert tokens(moved) == tokens(answered(chat(http, messages, steering=steering)))


@pytest.mark.engine
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
def test_what_cannot_be_placed_names_its_field(http: httpx.Client, steering: dict[str, Any], param: str | None) -> None:
    messages = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "why?"}]
    response = chat(http, messages, steering=steering)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == f"steering.{param or 'where.exclude.messages'}"
    validated = http.post("/v1/steering/validate", json={"messages": messages, "model": MODEL, "steering": steering})
    assert validated.json() == response.json()


@pytest.mark.engine
def test_limits(http: httpx.Client) -> None:
    body = {"model": MODEL, "temperature": 0, "steering": {"vector": "words"}}
    for num, max_tokens, status in ((MAX_LEN - 9, 4, 200), (MAX_LEN - 9, 5, 400), (MAX_LEN - 5, None, 400)):
        more = {} if max_tokens is None else {"max_tokens": max_tokens}
        response = http.post("/v1/completions", json={**body, "prompt": [5] * num, **more})
        assert response.status_code == status, response.text
        assert status == 200 or response.json()["error"]["param"] == "steering.vector"
    pair = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}
    response = http.post("/v1/completions", json={**body, "prompt": TEXT, "decoding": pair})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "steering.vector")
    where = {"messages": [{"role": "user"}]}
    response = http.post(
        "/v1/completions", json={**body, "prompt": TEXT, "steering": {"vector": "push", "where": where}}
    )
    assert (response.status_code, response.json()["error"]["param"]) == (400, "steering.where")
