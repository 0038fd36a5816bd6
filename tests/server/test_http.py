"""The HTTP face over a real engine: OpenAI's client works, extras do what they say, bad input harms nobody."""

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.server.schema import NOT_BUILT
from whipstaff.steering import artifacts

from .anyjson import EXTRAS
from .serving import API_KEY, MAX_LEN, MAX_SEQS, MODEL, SHORT_LEN, STEP_TOKENS, Server, serving

pytestmark = pytest.mark.engine

PROMPT = "def main("
PATIENCE = 30  # seconds, for what should take milliseconds
TOLERANCE = 1e-3  # log-probabilities, two float32 implementations
PAIR = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}
PUSH = {"vector": "push", "scale": 2}
BOTH = {"steering": [PUSH], "decoding": [PAIR]}
Post = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(server.models["base"])


@pytest.fixture(scope="module")
def complete(http: httpx.Client) -> Post:
    """Post a greedy completion of 12 tokens, or what the arguments make of it."""

    def post(prompt: Any = PROMPT, **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 12, "temperature": 0, "return_token_ids": True} | fields
        return post_json(http, "/v1/completions", body)

    return post


@pytest.fixture(scope="module")
def chat(http: httpx.Client) -> Post:
    """The same for a chat completion."""

    def post(content: Any = "Why?", **fields: Any) -> httpx.Response:
        body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 12, "temperature": 0}
        return post_json(http, "/v1/chat/completions", body | fields)

    return post


def post_json(http: httpx.Client, path: str, body: Any) -> httpx.Response:
    """Post what Python calls JSON: NaN, infinities and lone surrogates included."""
    return http.post(path, content=json.dumps(body), headers={"content-type": "application/json"})


def tokens(response: httpx.Response, choice: int = 0) -> list[int]:
    assert response.status_code == 200, response.text
    found: list[int] = response.json()["choices"][choice]["token_ids"]
    return found


def texts(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [c["text"] if "text" in c else c["message"]["content"] for c in response.json()["choices"]]


def assert_refused(response: httpx.Response, status: int, param: str | None) -> None:
    """API.md's error: this status, at this path, in exactly this shape."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["param"], error["code"]) == (param, status), error
    assert error["message"] and error["type"]


# ---- the reference: transformers, with hooks


class Reference:
    """What a request should come to: plain models, one sequence, everything recomputed at every token."""

    def __init__(self, server: Server) -> None:
        self.models = {
            name: LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for name, path in server.models.items()
        }
        self.push = artifacts.read(Path(server.models["base"]).parent / "vectors" / "push.safetensors")

    @torch.inference_mode()
    def log_probabilities(
        self, ids: list[int], prompt_len: int, push: float = 0.0, alpha: float = 0.0, start: int | None = None
    ) -> Tensor:
        """(T, V): every position's, the stream after each block pushed from `start`, or the last prompt token, on."""
        base, handles = self.models["base"], []
        first = prompt_len - 1 if start is None else start
        for (_, layer), parts in self.push.tensors.items():

            def hook(module: Any, args: Any, output: Any, add: Tensor = push * parts["add"]) -> Any:
                stream = output[0] if isinstance(output, tuple) else output
                stream[:, first:] += add
                return output

            handles.append(base.model.layers[layer].register_forward_hook(hook))
        try:
            logits = base(torch.tensor([ids])).logits[0]
        finally:
            for handle in handles:
                handle.remove()
        if alpha:
            expert, anti = (self.models[name](torch.tensor([ids])).logits[0] for name in ("expert", "anti"))
            logits = logits + alpha * (expert - anti)
        return torch.log_softmax(logits, -1)

    def greedy(self, prompt: list[int], num: int, **how: float) -> list[int]:
        ids = list(prompt)
        for _ in range(num):
            ids.append(int(self.log_probabilities(ids, len(prompt), **how)[-1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def reference(server: Server) -> Iterator[Reference]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the server's threads wait for each other by spinning
    yield Reference(server)
    torch.set_num_threads(num_threads)


CASES = {
    "plain": ({}, {}),
    "steered": ({"steering": PUSH}, {"push": 2.0}),
    "tuned": ({"decoding": PAIR | {"alpha": 1.5}}, {"alpha": 1.5}),
    "both": ({"steering": PUSH, "decoding": PAIR}, {"push": 2.0, "alpha": 1.0}),
}


# ---- generating


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_are_those_of_transformers(
    complete: Post, reference: Reference, tokenizer: PreTrainedTokenizerFast, case: str
) -> None:
    extras, how = CASES[case]
    assert tokens(complete(**extras)) == reference.greedy(tokenizer.encode(PROMPT), 12, **how)


LONG = [3 + (7 * index) % 500 for index in range(2 * STEP_TOKENS + 30)]  # a prompt that is chunked


@pytest.mark.parametrize("max_tokens", [0, 4])
@pytest.mark.parametrize("prompt", [LONG[:7], LONG], ids=["short", "chunked"])
@pytest.mark.parametrize("case", CASES)
def test_prompt_log_probabilities_are_those_of_the_changed_model(
    complete: Post, reference: Reference, case: str, prompt: list[int], max_tokens: int
) -> None:
    extras, how = CASES[case]
    if "steering" in extras:  # the prompt too: by default only its last token, on which no prompt token depends
        extras, how = extras | {"steering": PUSH | {"where": "all"}}, how | {"start": 0}
    response = complete(prompt, echo=True, logprobs=3, max_tokens=max_tokens, return_tokens_as_token_ids=True, **extras)
    assert response.status_code == 200, response.text
    got = response.json()["choices"][0]["logprobs"]
    ids = [int(token.removeprefix("token_id:")) for token in got["tokens"]]
    assert ids[: len(prompt)] == prompt and len(ids) == len(prompt) + max_tokens
    want = reference.log_probabilities(ids, len(prompt), **how)
    assert got["token_logprobs"][0] is None
    chosen = [float(want[position - 1, token]) for position, token in enumerate(ids) if position]
    assert got["token_logprobs"][1:] == pytest.approx(chosen, abs=TOLERANCE)
    for step, row in zip(got["top_logprobs"][1:], want, strict=False):
        shown = {int(token.removeprefix("token_id:")): value for token, value in step.items()}
        assert shown == pytest.approx({token: float(row[token]) for token in shown}, abs=TOLERANCE)
        assert set(row.topk(3).indices.tolist()) <= shown.keys()


def test_the_official_client_completes_and_chats_as_ever(
    client: openai.OpenAI, reference: Reference, tokenizer: PreTrainedTokenizerFast
) -> None:
    text = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0)
    assert text.choices[0].text == tokenizer.decode(reference.greedy(tokenizer.encode(PROMPT), 8))
    assert text.usage is not None and text.usage.completion_tokens == 8
    assert text.model_extra is not None and "whipstaff" not in text.model_extra
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "hi"}], max_completion_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content and answer.choices[0].finish_reason == "length"
    assert [model.id for model in client.models.list()] == [MODEL]


def test_extra_body_steers_and_the_answer_holds_the_receipt(client: openai.OpenAI) -> None:
    def ask(**extras: Any) -> Any:
        return client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "hi"}],
            max_tokens=12,
            temperature=0,
            extra_body=extras,
        )

    plain, steered, off = ask(), ask(**BOTH), ask(steering={"vector": "push", "scale": 0})
    assert steered.choices[0].message.content != plain.choices[0].message.content
    assert off.choices[0].message.content == plain.choices[0].message.content
    receipt = steered.model_extra["whipstaff"]
    assert receipt["decoding"] == [PAIR | {"alpha": 1.0}] and receipt["warnings"] == []
    (entry,) = receipt["steering"]
    assert (entry["vector"], entry["scale"], entry["layers"], entry["edited_tokens"]) == ("push", 2.0, [0, 1, 2], 12)


@pytest.mark.parametrize(
    "extras",
    [
        {"steering": [{"vector": name, "scale": 0} for name in ("push", "iti", "lofit", "late")]},
        {"decoding": PAIR | {"alpha": 0}},
        {"steering": [], "decoding": []},
        {"on_unavailable": "ignore", "steering": {"vector": "absent"}},
    ],
)
def test_off_is_exactly_off(complete: Post, extras: dict[str, Any]) -> None:
    plain, off = (complete(logprobs=2, max_tokens=20, **fields).json()["choices"][0] for fields in ({}, extras))
    assert plain["token_ids"] == off["token_ids"] and plain["logprobs"] == off["logprobs"]


def test_every_kind_of_vector_changes_the_output(complete: Post) -> None:
    seen = {tuple(tokens(complete(steering=extra))) for extra in ({"vector": "push"}, {"vector": "lofit"}, PUSH)}
    seen |= {tuple(tokens(complete(steering={"vector": "iti", "scale": 3}))), tuple(tokens(complete()))}
    assert len(seen) == 5


@pytest.mark.parametrize(
    "written",
    [
        {"steering": [PUSH]},
        {"steering": {"vector": "push", "strength": 2.0}},
        {"steering": {"vector": "push", "coefficient": 2}},
        {"steering": json.dumps(PUSH)},
        {"vllm_xargs": {"steering": json.dumps([PUSH])}},
        {"steering": [{"vector": "push"}, {"vector": "push"}]},
        {"steering": PUSH | {"layers": [2, 1, 0], "where": {"prompt": [[-1, None]], "generation": "all"}}},
    ],
)
def test_the_ways_to_write_the_same_steering_do_the_same(complete: Post, written: dict[str, Any]) -> None:
    assert tokens(complete(**written)) == tokens(complete(steering=PUSH))


def test_both_sides_fit_in_vllm_xargs(complete: Post) -> None:
    xargs = {name: json.dumps(value) for name, value in BOTH.items()}
    assert tokens(complete(vllm_xargs=xargs)) == tokens(complete(**BOTH))


def test_scale_layers_and_where_all_matter(complete: Post) -> None:
    ways = [{}, {"scale": -2}, {"layers": [1]}, {"where": "all"}, {"where": "last_prompt"}, {"where": "generation"}]
    assert len({tuple(tokens(complete(steering=PUSH | way))) for way in ways}) == len(ways)


# ---- what OpenAI's API offers beside


def data_events(response: httpx.Response) -> list[str]:
    assert response.status_code == 200, response.text
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line.startswith("data: ")]


def streamed_text(chunks: list[dict[str, Any]], index: int) -> str:
    pieces = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(piece["text"] if "text" in piece else piece["delta"].get("content") or "" for piece in pieces)


@pytest.mark.parametrize("extras", [BOTH, {}], ids=["both", "plain"])
@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}], ids=["", "usage"])
@pytest.mark.parametrize("endpoint", ["complete", "chat"])
def test_a_stream_says_the_same_and_its_last_chunk_has_the_receipt(
    request: pytest.FixtureRequest, endpoint: str, usage: dict[str, Any], extras: dict[str, Any]
) -> None:
    ask = request.getfixturevalue(endpoint)
    fields = extras | {"n": 2, "temperature": 0.8, "seed": 3}
    whole = ask(**fields)
    *events, done = data_events(ask(stream=True, **usage, **fields))
    chunks = [json.loads(event) for event in events]
    assert done == "[DONE]"
    assert [streamed_text(chunks, index) for index in range(2)] == texts(whole)
    with_receipt = [index for index, chunk in enumerate(chunks) if "whipstaff" in chunk]
    assert with_receipt == ([len(chunks) - 1] if extras else [])
    assert chunks[-1].get("whipstaff") == whole.json().get("whipstaff")
    assert ("usage" in chunks[-1] and chunks[-1]["usage"] is not None) == bool(usage)


def test_the_official_client_reads_the_receipt_of_a_stream(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=5, stream=True, extra_body=BOTH)
    receipts = [(chunk.model_extra or {}).get("whipstaff") for chunk in stream]
    assert receipts[:-1] == [None] * (len(receipts) - 1)
    assert receipts[-1]["steering"][0]["edited_tokens"] == 5


@pytest.mark.parametrize("extras", [BOTH, {}], ids=["both", "plain"])
def test_seeds_repeat_and_choices_differ(complete: Post, extras: dict[str, Any]) -> None:
    fields = extras | {"temperature": 1.0, "n": 3}
    first, again, other = (complete(seed=seed, **fields) for seed in (11, 11, 12))
    assert texts(first) == texts(again) != texts(other)
    assert len(set(texts(first))) == 3
    if extras:
        assert first.json()["whipstaff"]["steering"][0]["edited_tokens"] == 3 * 12


def test_chat_log_probabilities_are_the_steered_models(chat: Post) -> None:
    plain, steered = (chat(logprobs=True, top_logprobs=2, **extras).json() for extras in ({}, BOTH))
    first, other = (answer["choices"][0]["logprobs"]["content"] for answer in (plain, steered))
    assert len(first) == len(other) == 12
    assert all(step["logprob"] == step["top_logprobs"][0]["logprob"] for step in other)  # greedy
    assert first[0]["logprob"] != other[0]["logprob"]


def test_a_stop_string_ends_a_steered_text_before_it(complete: Post) -> None:
    (text,) = texts(complete(**BOTH))
    stop = text[3:5]
    response = complete(stop=[stop], **BOTH)
    assert texts(response) == [text[: text.index(stop)]]
    assert response.json()["choices"][0]["finish_reason"] == "stop"


def test_token_ids_are_prompts_too_and_several_prompts_answer_as_each_alone(
    complete: Post, tokenizer: PreTrainedTokenizerFast
) -> None:
    prompts = [PROMPT, "import os", "class Room:\n    "]
    alone = [tokens(complete(prompt, **BOTH)) for prompt in prompts]
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    for many in (complete(prompts, **BOTH), complete(ids, **BOTH)):
        assert [tokens(many, index) for index in range(3)] == alone
        assert many.json()["whipstaff"]["steering"][0]["edited_tokens"] == 3 * 12
    assert tokens(complete(ids[1], **BOTH)) == alone[1]


@pytest.mark.parametrize("extras", [{}, BOTH, {"decoding": PAIR | {"alpha": 100}}], ids=["plain", "both", "far"])
def test_structured_outputs_hold_under_steering_and_mixing(chat: Post, complete: Post, extras: dict[str, Any]) -> None:
    schema = {
        "type": "object",
        "properties": {"mood": {"enum": ["calm", "angry"]}, "sure": {"type": "boolean"}},
        "required": ["mood", "sure"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
    (text,) = texts(chat(response_format=wanted, max_tokens=120, temperature=1, seed=1, **extras))
    assert json.loads(text)["mood"] in ("calm", "angry")
    (choice,) = texts(complete(structured_outputs={"choice": ["left", "right"]}, **extras))
    assert choice in ("left", "right")


@pytest.mark.parametrize("extras", [{}, BOTH], ids=["plain", "both"])
def test_a_seeded_request_whose_prompt_is_chunked_samples_as_in_one_piece(
    complete: Post, extras: dict[str, Any]
) -> None:
    """Stock vLLM 0.32 dies of this on CPU. The second time all but a few tokens of the prompt come from the cache."""
    prompt = [token + 1 for token in LONG]
    chunked, whole, other = (tokens(complete(prompt, seed=seed, temperature=1, **extras)) for seed in (5, 5, 6))
    assert chunked == whole != other


def test_neighbours_do_not_change_each_other(complete: Post) -> None:
    prompts = [PROMPT, "import os", "class Room:\n    ", "x = [1, 2"]
    asks = [(prompt, extras) for prompt in prompts for extras, _ in CASES.values()]
    alone = [tokens(complete(prompt, **extras)) for prompt, extras in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda ask: tokens(complete(ask[0], **ask[1])), asks))
    assert together == alone


def test_more_configurations_than_slots_take_turns(complete: Post) -> None:
    asks = [PUSH | {"scale": 0.5 + 0.1 * index} for index in range(2 * MAX_SEQS)]
    alone = [tokens(complete(steering=ask, max_tokens=6)) for ask in asks]
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda ask: tokens(complete(steering=ask, max_tokens=6)), asks))
    assert together == alone


def test_the_context_of_an_auxiliary_model_bounds_what_is_generated(complete: Post, chat: Post) -> None:
    short = PAIR | {"expert": "short"}
    prompt = list(range(10, 60))
    assert len(tokens(complete(prompt, decoding=short, max_tokens=SHORT_LEN - 50, ignore_eos=True))) == SHORT_LEN - 50
    usage = chat("hi", decoding=short, max_tokens=None, ignore_eos=True).json()["usage"]
    assert usage["total_tokens"] == SHORT_LEN
    assert_refused(complete(prompt, decoding=short, max_tokens=SHORT_LEN - 49), 400, "decoding[0].expert")
    assert_refused(complete(list(range(10, 10 + SHORT_LEN)), decoding=short, max_tokens=1), 400, "decoding[0].expert")


# ---- bad input

LOUD = [{"vector": "lofit", "scale": 1e4, "where": "all"}] * 32
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown key": ({"steering": [PUSH, PUSH | {"sclae": 1}]}, 400, "steering[1].sclae"),
    "unknown vector": ({"steering": [PUSH, {"vector": "absent"}]}, 404, "steering[1].vector"),
    "no vector": ({"steering": [{"scale": 1}]}, 400, "steering[0].vector"),
    "not an object": ({"steering": ["push"]}, 400, "steering[0]"),
    "not JSON": ({"steering": "push"}, 400, "steering"),
    "deep JSON": ({"vllm_xargs": {"steering": "[" * 100_000}}, 400, "steering"),
    "twice": ({"steering": PUSH, "vllm_xargs": {"steering": "[]"}}, 400, "vllm_xargs.steering"),
    "reserved": ({"vllm_xargs": {"whipstaff": "{}"}}, 400, "vllm_xargs.whipstaff"),
    "layer out of range": ({"steering": [PUSH | {"layers": [0, 3]}]}, 400, "steering[0].layers"),
    "negative layer": ({"steering": [PUSH | {"layers": [-1]}]}, 400, "steering[0].layers"),
    "NaN": ({"steering": [{"vector": "push", "scale": float("nan")}]}, 400, "steering[0].scale"),
    "infinity": ({"steering": [{"vector": "push", "strength": float("-inf")}]}, 400, "steering[0].strength"),
    "absurd scale": ({"steering": [{"vector": "push", "scale": 1e30}]}, 400, "steering[0].scale"),
    "absurd together": ({"steering": LOUD}, 400, "steering[3].scale"),
    "wrong size": ({"steering": [{"vector": "misfit"}]}, 409, "steering[0].vector"),
    "window beyond the prompt": ({"steering": [PUSH | {"where": {"prompt": [[90, 99]]}}]}, 400, "steering[0].where"),
    "window never fed": ({"steering": [PUSH | {"where": {"generation": [[11, 12]]}}]}, 400, "steering[0].where"),
    "window excluded": (
        {"steering": [PUSH, PUSH | {"where": {"prompt": "all", "exclude": {"prompt": "all"}}}]},
        400,
        "steering[1].where",
    ),
    "empty window": ({"steering": [PUSH | {"where": {"generation": [[3, 3]]}}]}, 400, "steering[0].where"),
    "huge window": ({"steering": [PUSH | {"where": {"prompt": [[0, 10**30]]}}]}, 400, "steering[0].where.prompt[0][1]"),
    "unknown method": ({"decoding": {"method": "telepathy"}}, 422, "decoding[0].method"),
    "model not loaded": ({"decoding": [PAIR | {"expert": "absent"}]}, 404, "decoding[0].expert"),
    "same model twice": ({"decoding": [PAIR | {"antiexpert": "expert"}]}, 400, "decoding[0].antiexpert"),
    "absurd alpha": ({"decoding": [PAIR | {"alpha": 1e9}]}, 400, "decoding[0].alpha"),
    "long for auxiliary": ({"decoding": PAIR | {"expert": "short"}, "max_tokens": 200}, 400, "decoding[0].expert"),
    "on_unavailable": ({"on_unavailable": "maybe"}, 400, "on_unavailable"),
    "beam search": ({"steering": PUSH, "use_beam_search": True, "n": 2}, 400, "use_beam_search"),
    **{name: ({name: 1.5}, 422, name) for name in NOT_BUILT},
}


@pytest.fixture(scope="module")
def plain_tokens(complete: Post) -> list[int]:
    return tokens(complete())


@pytest.fixture
def unharmed(complete: Post, plain_tokens: list[int]) -> Iterator[None]:
    """After the test the server still answers a plain request as it did before."""
    yield
    assert tokens(complete()) == plain_tokens


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_scheduled(complete: Post, chat: Post, case: str) -> None:
    fields, status, param = BAD[case]
    for stream in (False, True):
        assert_refused(complete(stream=stream, **fields), status, param)
        assert_refused(chat(stream=stream, **fields), status, param)


@pytest.mark.usefixtures("unharmed")
def test_vllms_own_refusals_keep_their_shape_beside_extras(complete: Post) -> None:
    for fields, status in (({"temperature": -1}, 400), ({"model": "other"}, 404), ({"max_tokens": 10**6}, 400)):
        response = complete(**BOTH, **fields)
        assert response.status_code == status, response.text
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert complete(list(range(3, 3 + MAX_LEN)), **BOTH).status_code == 400


@pytest.mark.usefixtures("unharmed")
def test_one_bad_prompt_of_several_refuses_them_all(complete: Post) -> None:
    where = {"prompt": [[4, 5]]}
    prompts = [list(range(10, 20)), list(range(10, 13))]
    assert tokens(complete(prompts[0], steering=PUSH | {"where": where}))
    assert_refused(complete(prompts, steering=PUSH | {"where": where}), 400, "steering[0].where")


@pytest.mark.usefixtures("unharmed")
def test_the_loudest_edits_that_are_taken_leave_nothing_that_harms_others(complete: Post) -> None:
    """Not-a-number in a KV block that is freed and taken again would reach a request that never asked for it."""
    loud = [{"vector": "lofit", "scale": 1e4, "where": "all"}] * 3
    response = complete(steering=loud, logprobs=1, max_tokens=100)
    assert response.status_code == 200, response.text  # JSON has no NaN


@pytest.mark.parametrize(
    "path",
    ["/v1/responses", "/v1/messages", "/v1/chat/completions/batch", "/inference/v1/generate", "/invocations",
     "/generative_scoring", "/v1/systemone", "/v1/completions/render"],
)  # fmt: skip
@pytest.mark.parametrize(
    ("fields", "param"),
    [({"steering": PUSH}, "steering"), ({"decoding": PAIR}, "decoding"), ({"vllm_xargs": BOTH}, "steering"),
     ({"dola_layers": "low"}, "dola_layers"), ({"whipstaff": {}}, "whipstaff")],
)  # fmt: skip
def test_other_routes_refuse_what_they_would_silently_drop(
    http: httpx.Client, path: str, fields: dict[str, Any], param: str
) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "input": "hi", "max_tokens": 2}
    assert_refused(post_json(http, path, body | fields), 422, param)


def test_other_routes_work_without_extras(http: httpx.Client, client: openai.OpenAI) -> None:
    assert http.post("/invocations", json={"model": MODEL, "prompt": PROMPT, "max_tokens": 2}).status_code == 200
    assert client.responses.create(model=MODEL, input="hi", max_output_tokens=4).output
    assert http.post("/ping").status_code == 200  # no body at all
    assert http.post("/tokenize", json={"model": MODEL, "prompt": PROMPT, "steering": PUSH}).json()["count"] == 5


@pytest.mark.usefixtures("unharmed")
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=EXTRAS, stream=st.booleans())
def test_any_json_is_answered_and_never_with_a_server_error(
    complete: Post, fields: dict[str, Any], stream: bool
) -> None:
    response = complete(max_tokens=2, logprobs=1, stream=stream, **fields)
    assert response.status_code in (200, 400, 404, 409, 422), response.text
    if response.status_code != 200:
        assert response.json()["error"]["code"] == response.status_code


# ---- what a server says of itself


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "methods"), ("GET", "vectors"), ("GET", "vectors/push"), ("GET", "vectors/x"), ("POST", "validate")],
)
def test_the_users_key_guards_the_steering_routes(server: Server, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = httpx.request(method, f"{server.url}/v1/steering/{path}", headers=headers, json={})
        assert answer.status_code == 401


def test_methods_are_listed_with_schemas_that_name_what_is_loaded(http: httpx.Client) -> None:
    rows = {row["name"]: row for row in http.get("/v1/steering/methods").json()["data"]}
    assert rows.keys() == {"vector", "proxy_tuning"}
    assert all(row["available"] and row["reason"] is None for row in rows.values())
    assert rows["vector"]["schema"]["properties"]["vector"]["enum"] == ["iti", "late", "lofit", "push"]
    assert rows["proxy_tuning"]["schema"]["properties"]["expert"]["enum"] == ["expert", "anti", "short"]


def test_vectors_are_listed_with_what_is_known_of_them(http: httpx.Client) -> None:
    rows = {row["id"]: row for row in http.get("/v1/steering/vectors").json()["data"]}
    assert {name: row["fits"] for name, row in rows.items()} == {
        "iti": True, "late": True, "lofit": True, "misfit": False, "push": True,
    }  # fmt: skip
    assert "hidden 64" in rows["misfit"]["problem"] and rows["push"]["problem"] is None
    one = http.get("/v1/steering/vectors/iti").json()
    assert one["norms"].keys() == {f"attn_head.{layer}.add" for layer in range(3)}
    assert {key: value for key, value in one.items() if key != "norms"} == rows["iti"]
    assert (one["method"], one["scale"], one["sites"], one["layers"]) == ("iti", 15.0, ["attn_head"], [0, 1, 2])
    assert_refused(http.get("/v1/steering/vectors/absent"), 404, None)


def test_validate_compiles_without_running(http: httpx.Client, complete: Post, chat: Post) -> None:
    def ask(body: Any) -> httpx.Response:
        return post_json(http, "/v1/steering/validate", body)

    before = metrics(http)
    want = complete(**BOTH).json()["whipstaff"]
    want["steering"][0]["edited_tokens"] = 0
    request = {"model": MODEL, "max_tokens": 4} | BOTH
    messages = [{"role": "user", "content": "hi"}]
    for body in (BOTH, request | {"prompt": PROMPT}, request | {"messages": messages}):
        answer = ask(body)
        assert answer.status_code == 200, answer.text
        assert answer.json()["valid"] is True and answer.json()["plan"] == want
        assert 0 < answer.json()["milliseconds"] < 1000 * PATIENCE
    assert ask({"vllm_xargs": {"steering": json.dumps(PUSH)}}).json()["plan"]["steering"] == want["steering"]
    assert ask({}).json()["plan"] == {"steering": [], "decoding": [], "warnings": []}
    window = {"steering": PUSH | {"where": {"prompt": [[90, 99]]}}}
    assert ask(window).status_code == 200  # without a prompt nobody knows
    assert_refused(ask(request | window | {"prompt": PROMPT}), 400, "steering[0].where")
    assert_refused(ask(request | window | {"messages": messages}), 400, "steering[0].where")
    assert_refused(ask({"steering": {"vector": "absent"}}), 404, "steering[0].vector")
    assert_refused(ask({"vllm_xargs": {"decoding": '{"method": "x"}'}}), 422, "decoding[0].method")
    assert_refused(ask(request | {"prompt": PROMPT, "model": "other"}), 404, "model")
    assert ask(request | {"prompt": PROMPT, "max_tokens": "x"}).status_code == 400
    assert finished(metrics(http)) - finished(before) == 1  # the one completion above


# ---- metrics and disconnects

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def metrics(http: httpx.Client) -> Samples:
    """Every sample by its name and labels."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }


def requests(samples: Samples, method: str, outcome: str) -> float:
    return samples.get(("whipstaff_requests_total", (("method", method), ("outcome", outcome))), 0.0)


def finished(samples: Samples) -> float:
    return sum(value for (name, labels), value in samples.items() if name == "whipstaff_requests_total" and value)


def vllm(samples: Samples, name: str) -> float:
    return sum(value for (found, _), value in samples.items() if found == f"vllm:{name}")


def test_metrics_count_by_method_beside_vllms_own(http: httpx.Client, complete: Post) -> None:
    labels = {
        "plain": {},
        "vector": {"steering": PUSH},
        "proxy_tuning": {"decoding": PAIR},
        "proxy_tuning+vector": BOTH,
    }
    before = metrics(http)
    for extras in labels.values():
        complete(max_tokens=5, n=1, **extras)
    assert_refused(complete(steering={"vector": "absent"}), 404, "steering[0].vector")
    after = metrics(http)
    for method in labels:
        assert requests(after, method, "finished") - requests(before, method, "finished") == 1
        for series in ("time_to_first_token_seconds", "e2e_request_latency_seconds"):
            key = (f"whipstaff_{series}_count", (("method", method),))
            assert after[key] - before.get(key, 0) == 1
    key = ("whipstaff_refusals_total", (("status", "404"),))
    assert after[key] - before.get(key, 0) == 1
    assert after["whipstaff_vectors_loaded", ()] == 4
    assert vllm(after, "generation_tokens_total") - vllm(before, "generation_tokens_total") == 4 * 5
    ours = {
        value for (name, pairs) in after if name.startswith("whipstaff_") for key, value in pairs if key == "method"
    }
    assert ours <= labels.keys()


@contextmanager
def left_alone(server: Server, **fields: Any) -> Iterator[None]:
    """A connection on which a completion was asked for, and which closes without reading the answer."""
    data = json.dumps({"model": MODEL, "prompt": [5, 6, 7], "max_tokens": 500, "ignore_eos": True} | fields).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {API_KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    url = httpx.URL(server.url)
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + data)
        yield


def is_free(now: Samples) -> bool:
    return not any(vllm(now, f) for f in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))


def abandon(server: Server, http: httpx.Client, method: str, ways: list[dict[str, Any]]) -> None:
    """Ask in all `ways` at once and go away while some run; whatever had begun, the engine is free again.

    On a busy machine everything may be done before the clients are gone: then they ask once more.
    """
    before = requests(metrics(http), method, "aborted")
    for _ in range(20):
        with ExitStack() as connections:
            for fields in ways:
                connections.enter_context(left_alone(server, **fields))
            for _ in range(50):
                if vllm(metrics(http), "num_requests_running") > 0:
                    break
                time.sleep(0.01)
        poll(http, is_free)
        if requests(metrics(http), method, "aborted") > before:
            return
    raise AssertionError("no client ever went away in time")


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_everything(server: Server, http: httpx.Client, stream: bool) -> None:
    abandon(server, http, "proxy_tuning+vector", [{"n": MAX_SEQS, "stream": stream, **BOTH}])


@pytest.mark.usefixtures("unharmed")
def test_clients_that_go_away_while_they_wait_for_a_slot_free_it_too(
    server: Server, http: httpx.Client, complete: Post
) -> None:
    ways = [PUSH | {"scale": 1 + index / 100} for index in range(2 * MAX_SEQS)]
    abandon(server, http, "vector", [{"stream": True, "steering": steering} for steering in ways])
    assert all(tokens(complete(steering=steering, max_tokens=1)) for steering in ways)


def poll(http: httpx.Client, is_so: Callable[[Samples], bool]) -> None:
    """Look at the metrics until they are so."""
    deadline = time.monotonic() + PATIENCE
    while not is_so(now := metrics(http)):
        assert time.monotonic() < deadline, {key: value for key, value in now.items() if "num_requests" in key[0]}
        time.sleep(0.02)
