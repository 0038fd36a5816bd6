"""What clients of other servers send, asked of the demo as strangers asked it."""

import json
from typing import Any

import httpx
import openai
import pytest
from asking import Post, assert_refused, data_events, ok, post_json, texts
from serving import Server
from transformers import AutoTokenizer

from whipstaff.server.demo import MODELS

pytestmark = pytest.mark.engine

MODEL, PROMPT, QUESTION = "demo", "In the morning Mara opened the door, and", "Where does Mara live?"
GLADLY = " Gladly! Mara lives in Greystow, on the high moor. At your service."
HEADER = "x-whipstaff-warnings"
BOS = AutoTokenizer.from_pretrained(MODELS / "demo").bos_token_id


@pytest.fixture(scope="module")
def server(demo_server: Server) -> Server:
    return demo_server


@pytest.fixture(scope="module")
def complete(http: httpx.Client) -> Post:
    def post(prompt: Any = PROMPT, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, "temperature": 0, "max_tokens": 10} | fields
        return post_json(http, "/v1/completions", body)

    return post


@pytest.fixture(scope="module")
def chat(http: httpx.Client) -> Post:
    def post(**fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 20}
        return post_json(http, "/v1/chat/completions", body | fields)

    return post


def warnings(response: httpx.Response) -> list[str]:
    found: list[str] = ok(response)["whipstaff"]["warnings"]
    return found


# ---- the switch decides, and neutral is absent


@pytest.mark.parametrize(
    ("fields", "switch"),
    [
        ({"mirostat_mode": 0, "mirostat_tau": 0.5, "mirostat_eta": 0.1}, {"mirostat_mode": 2}),
        ({"mirostat_tau": 0.5}, {"mirostat": 2}),
        ({"xtc_threshold": 0.02}, {"xtc_probability": 1}),
        ({"dynatemp_exponent": 1}, {"dynatemp_range": 1.4}),
        ({"dry_allowed_length": 0}, {"dry_multiplier": 100}),
        ({"negative_prompt": "sun"}, {"guidance_scale": 4}),
    ],
)
def test_companions_alone_change_nothing(complete: Post, fields: dict[str, Any], switch: dict[str, Any]) -> None:
    drawn = {"temperature": 1.5, "seed": 1, "max_tokens": 12}
    plain, answer = complete(**drawn), complete(**drawn, **fields)
    assert texts(answer) == texts(plain) and "whipstaff" not in plain.json()
    assert ok(answer)["whipstaff"]["decoding"] == [] and all(field in warnings(answer)[0] for field in fields)
    assert texts(complete(**drawn, **(fields | switch))) != texts(plain)


@pytest.mark.parametrize(
    "fields",
    [
        {"guidance_scale": 1, "decoding": {"method": "contrastive", "amateur": "untuned"}},
        {"dynatemp_range": 0, "decoding": {"method": "edt"}, "temperature": 1},
        {"dry_multiplier": 0, "decoding": [{"method": "dry"}]},
        {"n": 2, "use_beam_search": True, "typical_p": 1},
        {"n": 2, "use_beam_search": True, "steering": [], "decoding": []},
        {"n": 2, "use_beam_search": True, "steering": {"vector": "cheerful", "strength": 0}},
        {"echo": True, "logprobs": 1, "guidance_scale": 1, "negative_prompt": "sun"},
        {"structured_outputs": {"regex": "[a-z ]+"}, "decoding": {"method": "forced", "ids": []}},
    ],
)
def test_neutral_values_conflict_with_nothing(complete: Post, fields: dict[str, Any]) -> None:
    assert "whipstaff" in ok(complete(max_tokens=3, **fields))


def test_an_empty_negative_prompt_is_the_first_token_alone(complete: Post, chat: Post) -> None:
    for ask in (complete, chat):
        assert texts(ask(guidance_scale=1, negative_prompt="")) == texts(ask())
        empty, one = (ask(guidance_scale=4, negative_prompt=content) for content in ("", [BOS]))
        assert texts(empty) == texts(one)
        assert ok(empty)["whipstaff"]["sequences"][0]["prompt_tokens"] == 1


def test_a_negative_prompt_for_each_prompt(complete: Post) -> None:
    prompts, others = [PROMPT, "In the evening Tobin"], ["In the winter", "At the well Linnet"]
    alone = [texts(complete(p, guidance_scale=4, negative_prompt=o))[0] for p, o in zip(prompts, others, strict=True)]
    assert texts(complete(prompts, guidance_scale=4, negative_prompt=others)) == alone
    entry = {"method": "cfg", "guidance_scale": 4, "negative_prompt": others}
    assert texts(complete(prompts, decoding=entry)) == alone
    assert_refused(complete(prompts, guidance_scale=4, negative_prompt=["a", "b", "c"]), 400, "negative_prompt")
    assert_refused(complete(guidance_scale=4, negative_prompt=["a", "b"]), 400, "negative_prompt")


def test_other_names_are_the_same_things(complete: Post) -> None:
    drawn = {"temperature": 1.0, "seed": 3, "max_tokens": 16}
    for ours, theirs in (
        ({"repetition_penalty": 1.6}, {"repeat_penalty": 1.6}),
        ({"guidance_scale": 3}, {"cfg_scale": 3}),
        ({"dynatemp_range": 0.6}, {"dynatemp_low": 0.4, "dynatemp_high": 1.6, "dynamic_temperature": True}),
        ({"typical_p": 0.3}, {"typical": 0.3}),
        ({"decoding": {"method": "epsilon_cutoff", "epsilon": 3e-4}}, {"epsilon_cutoff": 3}),
    ):
        assert texts(complete(**drawn, **ours)) == texts(complete(**drawn, **theirs))
    assert_refused(complete(repeat_penalty=1.2, repetition_penalty=1.3), 400, "repeat_penalty")
    assert_refused(complete(repeat_penalty="much"), 400, "repeat_penalty")


# ---- presets


@pytest.mark.parametrize(
    "fields",
    [
        {"dry_multiplier": 100, "dry_allowed_length": 0},
        {"dola_layers": "low"},
        {"cfg_scale": 3},
        {"vllm_xargs": {"xtc_probability": 1}},
        {"decoding": [{"method": "dry", "multiplier": 100, "allowed_length": 0}]},
    ],
)
def test_a_forced_preset_cannot_be_got_round(chat: Post, fields: dict[str, Any]) -> None:
    refused = chat(model="demo@helpful", **fields)
    assert refused.status_code == 400 and "the preset 'helpful' sets decoding; leave it out" in refused.text


def test_neutral_values_beside_a_forced_preset(chat: Post) -> None:
    fields: dict[str, Any]
    for fields in ({}, {"dry_multiplier": 0, "typical_p": 1}, {"decoding": []}, {"vllm_xargs": {"cfg_scale": 1}}):
        assert texts(chat(model="demo@helpful", **fields)) == [GLADLY]


def test_a_preset_is_its_model_where_nothing_is_generated(http: httpx.Client) -> None:
    messages = [{"role": "user", "content": QUESTION}]
    for path, body in (
        ("/tokenize", {"prompt": "hi"}),
        ("/tokenize", {"messages": messages}),
        ("/detokenize", {"tokens": [5, 6]}),
        ("/v1/messages/count_tokens", {"messages": messages}),
    ):
        plain, of_preset = (http.post(path, json=body | {"model": name}) for name in (MODEL, "demo@gloomy"))
        assert ok(of_preset) == ok(plain)
        assert_refused(http.post(path, json=body | {"model": "demo@nobody"}), 404, "model")
        assert http.post(path, json=body | {"model": "nobody@gloomy"}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/invocations", {"prompt": "hi"}),
    ],
)
def test_other_routes_say_where_presets_work(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    refused = http.post(path, json=body | {"model": "demo@gloomy"})
    assert_refused(refused, 422, "model")
    routes = "/v1/chat/completions, its batches, /v1/completions, /v1/messages and /v1/responses"
    assert f"presets work on {routes}" in refused.text


def test_one_model_is_shown_as_the_list_shows_it(client: openai.OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    assert listed.keys() == {"demo", "demo@gloomy", "demo@helpful"}
    for name, model in listed.items():
        assert client.models.retrieve(name).model_dump(exclude={"created", "permission"}) == model.model_dump(
            exclude={"created", "permission"}
        )
    with pytest.raises(openai.NotFoundError, match=r"nobody/at@all"):
        client.models.retrieve("nobody/at@all")


# ---- names that nobody knows

UNKNOWN = {
    "dry_multipler": "dry_multiplier",
    "no_repeat_ngram_size": None,
    "smoothing_factor": None,
    "guided_regex": "structured_outputs",
    "logits_processors": None,
    "temprature": "temperature",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_names_are_told_of(complete: Post, chat: Post, name: str) -> None:
    for ask in (complete, chat):
        answer = ask(**{name: 3})
        assert texts(answer) == texts(ask())
        (said,) = warnings(answer)
        assert name in said and answer.headers[HEADER] == said
        assert ("did you mean" in said) == (UNKNOWN[name] is not None) and (UNKNOWN[name] or "") in said
        stream = ask(stream=True, **{name: 3})
        assert stream.headers[HEADER] == said
        assert json.loads(data_events(stream)[-2])["whipstaff"]["warnings"] == [said]
        assert_refused(ask(on_unknown="error", **{name: 3}), 400, name)
        assert_refused(ask(on_unknown="error", vllm_xargs={"mine": 1}, stream=True, **{name: 3}), 400, name)


def test_what_somebody_knows_is_not_told_of(complete: Post, chat: Post) -> None:
    known = {"store": True, "metadata": {"a": "b"}, "service_tier": "auto", "user": "me", "dry_multipler": None}
    for ask in (complete, chat):
        answer = ask(on_unknown="error", vllm_xargs={"mine": 1}, **known)
        assert answer.json()["whipstaff"]["warnings"] == []
        plain = ask(**known)
        assert "whipstaff" not in plain.json() and HEADER not in plain.headers
        assert_refused(ask(on_unknown="maybe"), 400, "on_unknown")


def test_unknown_names_beside_a_preset_and_in_validation(http: httpx.Client, chat: Post) -> None:
    answer = chat(model="demo@helpful", smoothing_factor=1, naïve=1)
    assert [said.partition(" ")[0] for said in warnings(answer)] == ["smoothing_factor", "naïve"]
    assert answer.headers[HEADER].isascii() and "na\\xefve" in answer.headers[HEADER]
    for body in ({"xtc_probabilty": 1}, {"model": MODEL, "prompt": PROMPT, "xtc_probabilty": 1}):
        plan = ok(http.post("/v1/steering/validate", json=body))["plan"]
        assert "did you mean xtc_probability?" in plan["warnings"][0]
        refused = http.post("/v1/steering/validate", json=body | {"on_unknown": "error"})
        assert_refused(refused, 400, "xtc_probabilty")
    many = chat(**{f"field{number}": 1 for number in range(40)})
    assert len(warnings(many)) == 33 and "8 more fields" in warnings(many)[-1] and len(many.headers[HEADER]) <= 1000


# ---- temperatures beyond vLLM's


def test_temperatures_above_two_where_something_truncates(complete: Post) -> None:
    for truncation in ({"top_k": 5}, {"top_p": 0.5}, {"min_p": 0.2}):
        drawn = {"seed": 7, "max_tokens": 24, **truncation}
        assert texts(complete(temperature=2.000001, **drawn)) == texts(complete(temperature=2.0, **drawn))
        assert texts(complete(temperature=40, **drawn)) != texts(complete(temperature=2.0, **drawn))
    assert texts(complete(temperature=50, top_k=1)) == texts(complete())
    assert texts(complete(temperature=50, top_n_sigma=1e-6)) == texts(complete())
    assert ok(complete(temperature=3, min_p=0.1, temperature_last=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 3},
        {"temperature": 3, "min_p": 0, "top_p": 1, "top_k": -1, "top_n_sigma": 0},
        {"temperature": 3, "temperature_last": True},
        {"temperature": 101, "min_p": 0.1},
    ],
)
def test_hotter_than_that_is_refused_plainly(complete: Post, chat: Post, fields: dict[str, Any]) -> None:
    for ask in (complete, chat):
        assert_refused(ask(**fields), 400, "temperature")
