"""APIs of chats that are not OpenAI's, over HTTP: what they say is what chats say."""

import json
from typing import Any

import httpx
import openai
import pytest
from asking import Post, assert_refused, ok, post_json, texts
from serving import Server

pytestmark = pytest.mark.engine

CHEERFUL = {"vector": "cheerful"}
ASKED = [{"role": "user", "content": "Where does Mara live?"}]
OTHER = [{"role": "user", "content": "Who is Tobin?"}]
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steered": {"steering": CHEERFUL},
    "mixed": {"decoding": {"method": "contrastive", "amateur": "untuned"}},
    "a further prompt": {"guidance_scale": 3, "negative_prompt": "sun"},
    "in vllm_xargs": {"vllm_xargs": {"repetition_penalty": 1.0, "steering": json.dumps(CHEERFUL)}},
    "a search": {"decoding": {"method": "beam_search", "num_beams": 2}},
    "a preset": {"model": "demo@gloomy"},
    "drawn": {"temperature": 1.0, "seed": 3, "typical_p": 0.5},
}


@pytest.fixture(scope="module")
def server(demo_server: Server) -> Server:
    return demo_server


def body_of(fields: dict[str, Any]) -> dict[str, Any]:
    asked = {"model": "demo", "messages": ASKED, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    return asked | fields


@pytest.fixture(scope="module")
def chat(http: httpx.Client) -> Post:
    def post(**fields: Any) -> httpx.Response:
        return post_json(http, "/v1/chat/completions", body_of(fields))

    return post


@pytest.fixture(scope="module")
def message(http: httpx.Client) -> Post:
    def post(**fields: Any) -> httpx.Response:
        return post_json(http, "/v1/messages", body_of(fields))

    return post


def events(response: httpx.Response) -> list[tuple[str, dict[str, Any]]]:
    assert response.status_code == 200, response.text
    found = [one.split("\n", 1) for one in response.text.split("\n\n") if one]
    return [(head.removeprefix("event: "), json.loads(data.removeprefix("data: "))) for head, data in found]


def streamed(said: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(body["delta"]["text"] for name, body in said if name == "content_block_delta")


def same(receipt: dict[str, Any]) -> dict[str, Any]:
    """Of a receipt, what does not change from one request to the next."""
    return {name: value for name, value in receipt.items() if name != "search"}


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_message_says_what_the_chat_says(chat: Post, message: Post, fields: dict[str, Any]) -> None:
    wanted, whole, pieces = chat(**fields), ok(message(**fields)), events(message(stream=True, **fields))
    assert [part["text"] for part in whole["content"]] == texts(wanted)
    assert streamed(pieces) == texts(wanted)[0]
    assert whole["model"] == ok(wanted)["model"] and whole["usage"]["output_tokens"] == 8
    last = {name: body for name, body in pieces}["message_delta"]
    assert pieces[-1][0] == "message_stop" and last["usage"]["output_tokens"] == 8
    for said in (whole, last):
        assert ("whipstaff" in said) == ("whipstaff" in ok(wanted)) == bool(fields)
        if fields:
            assert same(said["whipstaff"]) == same(ok(wanted)["whipstaff"])


def test_it_is_not_the_plain_answer(chat: Post) -> None:
    assert texts(chat(**FIELDS["steered"])) != texts(chat()) != texts(chat(**FIELDS["a preset"]))


def test_explanations_and_activations_come_with_a_message(chat: Post, message: Post) -> None:
    fields = {"steering": CHEERFUL, "explain": {"top": 2}, "capture": [{"site": "resid_post", "layers": [1]}]}
    wanted, whole, pieces = chat(**fields), ok(message(**fields)), events(message(stream=True, **fields))
    records = [one["id"] for one in ok(wanted)["choices"][0]["explain"]]
    assert [one["id"] for one in whole["explain"]] == records and len(records) == 8
    assert [one["id"] for _, body in pieces for one in body.get("explain", ())] == records
    assert any("explain" in body for name, body in pieces if name == "content_block_delta")
    assert whole["whipstaff"]["captured"] == ok(wanted)["whipstaff"]["captured"]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"steering": {"vector": "nobody"}}, 404, "steering.vector"),
        ({"decoding": [{"method": "cfg", "guidance_scale": "x"}]}, 400, "decoding[0].guidance_scale"),
        ({"vllm_xargs": {"dola_layers": "odd"}}, 400, "vllm_xargs.dola_layers"),
        ({"model": "demo@nobody"}, 404, "model"),
        (
            {"stream": True, "stream_retractions": True, "decoding": {"method": "beam_search"}},
            400,
            "stream_retractions",
        ),
        ({"seed": "x"}, 400, "seed"),
        ({"temperature": -1, "steering": CHEERFUL}, 400, "temperature"),
        ({"steering": CHEERFUL | {"where": {"prompt": [[900, 901]]}}}, 400, "steering.where"),
    ],
)
def test_a_refusal_has_its_shape_and_names_the_field(
    message: Post, fields: dict[str, Any], status: int, param: str
) -> None:
    refused = message(**fields)
    said = refused.json()
    assert refused.status_code == status and said.keys() == {"type", "error"} and said["type"] == "error", said
    assert said["error"].keys() == {"type", "message"} and said["error"]["message"].startswith(f"{param}: "), said


# ---- vLLM's batches of chats


@pytest.fixture(scope="module")
def batch(http: httpx.Client) -> Post:
    def post(**fields: Any) -> httpx.Response:
        return post_json(http, "/v1/chat/completions/batch", body_of({"messages": [ASKED, OTHER]} | fields))

    return post


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_batch_says_what_its_chats_say(chat: Post, batch: Post, fields: dict[str, Any]) -> None:
    if "typical_p" in fields:
        fields = fields | {"temperature": 0}  # what is drawn depends on a request's own seed
    if fields != FIELDS["a search"]:  # which explains no tokens
        fields = fields | {"explain": {"top": 1}}
    together = ok(batch(**fields))
    alone = [ok(chat(**fields, messages=messages)) for messages in (ASKED, OTHER)]
    assert [one["message"]["content"] for one in together["choices"]] == [
        one["choices"][0]["message"]["content"] for one in alone
    ]
    for choice, one in zip(together["choices"], alone, strict=True):
        assert choice.get("explain") == one["choices"][0].get("explain")
    assert together["whipstaff"]["decoding"] == alone[0]["whipstaff"]["decoding"]
    assert len(together["whipstaff"].get("search", ())) == (2 if "search" in alone[0]["whipstaff"] else 0)


def test_a_refusal_of_a_batch_names_the_field(batch: Post) -> None:
    assert_refused(batch(steering={"vector": "nobody"}), 404, "steering.vector")
    assert_refused(batch(decoding={"method": "cfg", "guidance_scale": "x"}), 400, "decoding.guidance_scale")
    assert_refused(batch(n=2), 400, "n")
    search = FIELDS["a search"]
    assert_refused(batch(**search, stream_retractions=True), 400, "stream_retractions")
    repeats = {"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 3}
    assert_refused(batch(**search, repetition_detection=repeats), 400, "repetition_detection")
    refused = batch(steering=CHEERFUL | {"where": {"prompt": [[900, 901]]}})
    assert_refused(refused, 400, "steering.where")
    assert refused.json()["error"]["message"].startswith("prompt[0]: ")


# ---- OpenAI's responses


@pytest.fixture(scope="module")
def respond(http: httpx.Client) -> Post:
    def post(**fields: Any) -> httpx.Response:
        return post_json(http, "/v1/responses", response_body(fields))

    return post


BAD_SHAPE = {"type": "json_schema", "name": "x", "schema": {"type": "?"}}


def response_body(fields: dict[str, Any]) -> dict[str, Any]:
    asked = {"model": "demo", "input": ASKED, "temperature": 0, "max_output_tokens": 8, "ignore_eos": True}
    return asked | fields


def said_in(response: dict[str, Any]) -> list[str]:
    return [part["text"] for item in response["output"] for part in item["content"]]


@pytest.mark.parametrize("fields", FIELDS.values(), ids=FIELDS)
def test_a_response_says_what_the_chat_says(chat: Post, respond: Post, fields: dict[str, Any]) -> None:
    wanted, whole, pieces = chat(**fields), ok(respond(**fields)), events(respond(stream=True, **fields))
    assert said_in(whole) == texts(wanted)
    assert "".join(body["delta"] for name, body in pieces if name == "response.output_text.delta") == texts(wanted)[0]
    assert [body["sequence_number"] for _, body in pieces] == list(range(len(pieces)))
    name, last = pieces[-1]
    assert name == last["type"] == "response.completed"
    for said in (whole, last["response"]):
        assert said["model"] == ok(wanted)["model"] and said["usage"]["output_tokens"] == 8
        assert said_in(said) == texts(wanted)
        assert ("whipstaff" in said) == ("whipstaff" in ok(wanted)) == bool(fields)
        for sequence in said.get("whipstaff", {}).get("sequences", ()):
            sequence["prompt_tokens"] -= num_more(said, ok(wanted))
        if fields:
            assert same(said["whipstaff"]) == same(ok(wanted)["whipstaff"])


def num_more(response: dict[str, Any], chat: dict[str, Any]) -> int:
    """Tokens of the same prompt: of this API alone, vLLM puts the tokenizer's special tokens before the template's."""
    more: int = response["usage"]["input_tokens"] - chat["usage"]["prompt_tokens"]
    assert more in (0, 1)
    return more


def test_what_it_asks_may_be_written_in_several_ways(chat: Post, respond: Post) -> None:
    system = {"role": "system", "content": "Be brief."}
    wanted = texts(chat(messages=[system, *ASKED], steering=CHEERFUL))
    text = ASKED[0]["content"]
    parts = [{"role": "user", "content": [{"type": "input_text", "text": text}]}]
    for asked in ({"input": text}, {"input": ASKED}, {"input": parts}):
        assert said_in(ok(respond(instructions="Be brief.", steering=CHEERFUL, **asked))) == wanted
    where = {"messages": [{"role": "user"}]}
    chosen = ok(chat(messages=[system, *ASKED], steering=CHEERFUL | {"where": where}))
    ((start, end),) = chosen["whipstaff"]["steering"][0]["where"][0]["prompt"]
    for asked in ({"input": text}, {"input": parts}):
        made = ok(respond(instructions="Be brief.", steering=CHEERFUL | {"where": where}, **asked))
        more = num_more(made, chosen)
        assert made["whipstaff"]["steering"][0]["where"][0]["prompt"] == [[start + more, end + more]]


def test_openais_own_client_reads_the_receipt(client: openai.OpenAI, chat: Post) -> None:
    extras: dict[str, Any] = {"steering": CHEERFUL, "explain": {"top": 1}, "ignore_eos": True}
    asked: dict[str, Any] = {"model": "demo", "input": ASKED[0]["content"], "temperature": 0, "max_output_tokens": 8}
    wanted = ok(chat(steering=CHEERFUL, explain={"top": 1}))
    records = [one["id"] for one in wanted["choices"][0]["explain"]]
    whole = client.responses.create(**asked, extra_body=extras)
    assert whole.output_text == wanted["choices"][0]["message"]["content"]
    streamed = list(client.responses.create(**asked, extra_body=extras, stream=True))
    last = streamed[-1]
    assert last.type == "response.completed" and last.response.output_text == whole.output_text
    for response in (whole, last.response):
        more: dict[str, Any] = response.model_extra or {}
        assert more["whipstaff"]["steering"] == wanted["whipstaff"]["steering"]
        assert [one["id"] for one in more["explain"]] == records and len(records) == 8
    pieces = [one for one in streamed if one.type == "response.output_text.delta"]
    told = [record["id"] for one in pieces for record in (one.model_extra or {}).get("explain", ())]
    assert told == records[: len(told)] and told
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**asked, extra_body={"decoding": {"method": "cfg", "guidance_scale": "x"}})
    assert refused.value.param == "decoding.guidance_scale"


def test_activations_come_with_a_response(chat: Post, respond: Post) -> None:
    fields = {"steering": CHEERFUL, "capture": [{"site": "resid_post", "layers": [1]}]}
    made, wanted = ok(respond(**fields)), ok(chat(**fields))
    (own,), (theirs,) = (said["whipstaff"]["captured"] for said in (made, wanted))
    num, width = theirs["tensors"]["0.resid_post.1"]
    assert own["tensors"]["0.resid_post.1"] == [num + num_more(made, wanted), width]


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"steering": {"vector": "nobody"}}, 404, "steering.vector"),
        ({"decoding": [{"method": "cfg", "guidance_scale": "x"}]}, 400, "decoding[0].guidance_scale"),
        ({"vllm_xargs": {"dola_layers": "odd"}}, 400, "vllm_xargs.dola_layers"),
        ({"model": "demo@nobody"}, 404, "model"),
        ({"stream": True, "stream_retractions": True, "num_beams": 2}, 400, "stream_retractions"),
        ({"seed": "x"}, 400, "body.seed"),
        ({"n": 2}, 400, "body.n"),
        ({"num_beams": 2, "include": ["message.output_text.logprobs"]}, 200, ""),
        ({"max_output_tokens": "x"}, 400, "body.max_output_tokens"),
        ({"temperature": -1, "steering": CHEERFUL}, 400, "temperature"),
        ({"steering": CHEERFUL | {"where": {"prompt": [[900, 901]]}}}, 400, "steering.where"),
        ({"bad_words": [""], "steering": CHEERFUL}, 400, "bad_words"),
        ({"background": True}, 400, "background"),
        ({"previous_response_id": "resp_1"}, 404, "previous_response_id"),
        ({"tools": [{"type": "web_search_preview"}], "steering": CHEERFUL}, 400, "tools[0].type"),
        ({"text": {"format": BAD_SHAPE}, "steering": CHEERFUL}, 400, "text"),
        ({"max_tokens": 3, "on_unknown": "error"}, 400, "max_tokens"),
    ],
)  # fmt: skip
def test_a_refused_response_names_the_field(respond: Post, fields: dict[str, Any], status: int, param: str) -> None:
    if status != 200:
        return assert_refused(respond(**fields), status, param)
    assert ok(respond(**fields))


def test_a_response_tells_what_did_nothing(respond: Post, http: httpx.Client) -> None:
    answer = respond(store=True, max_tokens=3)
    warnings = ok(answer)["whipstaff"]["warnings"]
    assert warnings[0].startswith("store did nothing") and "did you mean max_output_tokens?" in warnings[1]
    assert answer.headers["x-whipstaff-warnings"] == "; ".join(warnings)
    assert_refused(http.get(f"/v1/responses/{ok(answer)['id']}"), 404, "response_id")
    assert "whipstaff" not in ok(respond()) and "whipstaff" not in ok(respond(store=False))


def test_a_response_is_validated_as_it_would_be_answered(respond: Post, http: httpx.Client) -> None:
    fields = {"steering": CHEERFUL | {"where": {"messages": [{"role": "user"}]}}}
    plan = ok(post_json(http, "/v1/steering/validate", response_body(fields)))["plan"]
    receipt = ok(respond(**fields))["whipstaff"]
    assert plan["steering"][0]["where"] == receipt["steering"][0]["where"]
    fields = {"steering": CHEERFUL | {"where": {"messages": [{"role": "nobody"}]}}}
    bad = post_json(http, "/v1/steering/validate", response_body(fields))
    refused = respond(**fields)
    assert refused.status_code == 400 and bad.json() == refused.json()
