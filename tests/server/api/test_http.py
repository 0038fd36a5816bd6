"""The HTTP face over a real engine: OpenAI's client works, extras do what they say, bad input harms nobody."""

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from anyjson import EXTRAS
from asking import (
    BOTH,
    MOOD,
    PAIR,
    PROMPT,
    PUSH,
    TOLERANCE,
    Post,
    Samples,
    assert_refused,
    data_events,
    metrics,
    ok,
    poll,
    post_json,
    streamed_text,
    texts,
    tokens,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import steered
from serving import API_KEY, MAX_LEN, MAX_SEQS, MODEL, SHORT_LEN, STEP_TOKENS, Server
from shared import HEADS, PRESETS, SOFT
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.decoding.methods import METHODS as DECODING
from whipstaff.server.engine.frontend.counters import PAUSE
from whipstaff.server.metrics import REASONS
from whipstaff.steering import vector_file
from whipstaff.steering.methods import METHODS

pytestmark = pytest.mark.engine

PATIENCE = 30  # seconds, for what should take milliseconds


# ---- the reference: transformers, with hooks


class Reference:
    """What a request should come to: plain models, one sequence, everything recomputed at every token."""

    def __init__(self, server: Server) -> None:
        self.models = {
            name: LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
            for name, path in server.models.items()
        }
        self.push = vector_file.read(Path(server.models["base"]).parent / "vectors" / "push.safetensors")

    def log_probabilities(
        self, ids: list[int], prompt_len: int, push: float = 0.0, alpha: float = 0.0, start: int | None = None
    ) -> Tensor:
        """(T, V): every position's, the stream after each block pushed from `start`, or the last prompt token, on."""
        first = prompt_len - 1 if start is None else start
        edits = [
            steered.Edit(place.site, place.layer, push, None, parts["add"], lambda position, _: position >= first)
            for place, parts in self.push.tensors.items()
        ]
        base, expert, anti = (
            steered.logits(self.models[name], ids, prompt_len, edits if name == "base" else [])
            for name in ("base", "expert", "anti")
        )
        return (base + alpha * (expert - anti)).log_softmax(-1)

    def greedy(self, prompt: list[int], num: int, **how: Any) -> list[int]:
        ids = list(prompt)
        for _ in range(num):
            ids.append(int(self.log_probabilities(ids, len(prompt), **how)[-1].argmax()))
        return ids[len(prompt) :]


@pytest.fixture(scope="module")
def reference(server: Server) -> Reference:
    return Reference(server)


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
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
    assert {model.id for model in client.models.list()} == {MODEL, *(f"{MODEL}@{name}" for name in PRESETS)}


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
    assert receipt["decoding"] == [PAIR | {"alpha": 1.0, "expert_chat": False}] and receipt["warnings"] == []
    (entry,) = receipt["steering"]
    assert (entry["vector"], entry["scale"], entry["layers"], entry["edited_tokens"]) == ("push", 2.0, [0, 1, 2], 12)
    assert entry["dose"]["relative"] > 0 and entry["dose"]["at"].startswith("resid_post.")


@pytest.mark.parametrize(
    "extras",
    [
        {"steering": [{"vector": name, "scale": 0} for name in ("push", "iti", "lofit", "late", "ablate", "loreft")]},
        {"steering": {"vector": "sae", "features": [{"feature": 3, "set": 9}], "scale": 0}},
        {"steering": PUSH | {"schedule": {"shape": "constant", "from": 0}}},
        {"steering": PUSH | {"layers": [2], "when": {"probe": "probe", "above": 1e9}}},
        {"steering": PUSH | {"layers": [1, 2], "when": {"probe": "probe", "below": -1e9, "decide": "step"}}},
        {"decoding": PAIR | {"alpha": 0}},
        {"steering": [], "decoding": []},
        {"on_unavailable": "ignore", "steering": {"vector": "absent"}},
    ],
)
def test_off_is_exactly_off(complete: Post, extras: dict[str, Any]) -> None:
    plain, off = (complete(logprobs=2, max_tokens=20, **fields).json()["choices"][0] for fields in ({}, extras))
    assert plain["token_ids"] == off["token_ids"] and plain["logprobs"] == off["logprobs"]


def test_every_kind_of_vector_changes_the_output(complete: Post) -> None:
    seen = {tuple(tokens(complete(steering={"vector": name}))) for name in ("push", "iti", "lofit", "loreft", "both")}
    seen |= {tuple(tokens(complete(steering={"vector": "ablate", "scale": 3}))), tuple(tokens(complete()))}
    seen |= {tuple(tokens(complete(steering={"vector": "sae", "features": [{"feature": 3, "set": 9}]})))}
    seen |= {tuple(tokens(complete(steering={"vector": "soft"})))}
    assert len(seen) == 9


SPARSE = {"vector": "sae", "features": [{"feature": 2, "add": 3}], "where": "all"}
STEP: dict[str, Any] = {
    "vector": "late",
    "scale": 4,
    "where": "all",
    "when": {"probe": "probe", "above": 0, "decide": "step"},
}
LATCHED = {"vector": "iti", "layers": [1, 2], "when": {"probe": "probe", "above": -1e6}}
FADING: dict[str, Any] = PUSH | {"schedule": {"shape": "linear", "from": 2, "to": 0, "tokens": 6}}
UNSURE = {"vector": "late", "schedule": {"shape": "entropy", "low": 0.1, "high": 5}}
MIXED: list[dict[str, Any]] = [
    SPARSE,
    STEP,
    LATCHED,
    FADING,
    {"vector": "loreft"},
    {"vector": "ablate", "scale": 0.5},
    UNSURE,
]


def test_early_layers_are_contrasted_and_told(complete: Post) -> None:
    by_name = complete(dola_layers=[0, 2], explain={"top": 1})
    by_entry = complete(decoding={"method": "dola", "layers": [2, 0]})
    assert tokens(by_name) == tokens(by_entry) != tokens(complete())
    assert [said["layers"] for said in by_name.json()["whipstaff"]["decoding"]] == [[0, 2]]
    chosen = {record["facts"]["layer"] for record in by_name.json()["choices"][0]["explain"]}
    assert chosen <= {0, 2} and chosen
    entry = {"method": "dola", "relative_top": 0.0, "post_softmax": False}
    scored = complete(echo=True, logprobs=0, max_tokens=1, decoding=entry).json()["choices"][0]["logprobs"]
    assert max(scored["token_logprobs"][1:-1]) > 0  # differences, not log-probabilities


@pytest.mark.parametrize("endpoint", ["complete", "chat"])
def test_conditions_and_schedules_stream_as_they_answer_and_say_what_fired(
    request: pytest.FixtureRequest, complete: Post, endpoint: str
) -> None:
    ask = request.getfixturevalue(endpoint)
    whole = ask(steering=MIXED)
    *events, done = data_events(ask(stream=True, steering=MIXED))
    chunks = [json.loads(event) for event in events]
    assert done == "[DONE]" and [streamed_text(chunks, 0)] == texts(whole)
    receipt = whole.json()["whipstaff"]
    assert chunks[-1]["whipstaff"] == receipt
    assert texts(ask()) != texts(whole)
    said = receipt["steering"]
    assert [entry["vector"] for entry in said] == [entry["vector"] for entry in MIXED]
    assert all(entry["dose"]["relative"] > 0 and len(entry["digest"]) == 64 for entry in said)
    assert said[1]["when"] == STEP["when"] and said[3]["schedule"].items() <= FADING["schedule"].items()
    prompt_len = whole.json()["usage"]["prompt_tokens"]
    assert said[1]["edited_tokens"] == prompt_len + 11
    assert 0 < said[1]["fired"]["tokens"] < said[1]["fired"]["of"] == prompt_len + 11
    assert said[2]["fired"].items() >= {"tokens": 12, "of": 12}.items() and len(said[2]["fired"]["readings"]) == 1
    assert said[6]["fired"]["of"] == 11
    assert [entry["vector"] for entry in said if "fired" in entry] == ["late", "iti", "late"]
    assert all("do not commute" in warning for warning in receipt["warnings"]) and receipt["warnings"]


def test_a_condition_that_always_holds_is_none_and_one_that_never_does_is_off(complete: Post) -> None:
    push = PUSH | {"layers": [1, 2]}
    always, never = ({"probe": "probe", "above": threshold} for threshold in (-1e6, 1e6))
    for decide in ("prompt", "step"):
        assert tokens(complete(steering=push | {"when": always | {"decide": decide}})) == tokens(
            complete(steering=push)
        )
        assert tokens(complete(steering=push | {"when": never | {"decide": decide}})) == tokens(complete())
    reading = complete(steering=push | {"when": always}).json()["whipstaff"]["steering"][0]["fired"]["readings"][0]
    for above, num in ((reading - 0.01, 12), (reading + 0.01, 0)):
        (said,) = complete(steering=push | {"when": {"probe": "probe", "above": above}}).json()["whipstaff"]["steering"]
        assert said["fired"] == {"tokens": num, "of": 12, "readings": [pytest.approx(reading, abs=1e-3)]}


@pytest.mark.parametrize("fields", [{}, {"steering": [PUSH]}, {"decoding": PAIR}, {"guidance_scale": 2.0}])
def test_an_answer_ends_where_a_probe_says_so(complete: Post, fields: dict[str, Any]) -> None:
    """Each for itself; the receipt says what was read of every token."""
    fields = {**fields, "ignore_eos": True}
    on = ok(complete(**fields, stop_when={"probe": "probe", "below": -1e6}))
    (read,) = on["whipstaff"]["stop_when"]["readings"]
    assert tokens(on) == tokens(complete(**fields)) and len(read) == len(tokens(on)) - 1
    last = read.index(max(read[2:]))
    limit = (read[last] + max(reading for reading in read if reading < read[last])) / 2
    first = next(index for index, reading in enumerate(read) if reading > limit)
    for stop in ({"probe": "probe", "above": limit}, json.dumps({"probe": "probe", "above": limit, "layer": 0})):
        ended = ok(complete(**fields, stop_when=stop))
        assert tokens(ended) == tokens(on)[: first + 1] and ended["usage"]["completion_tokens"] == first + 1
        assert (ended["choices"][0]["finish_reason"], ended["choices"][0]["stop_reason"]) == ("stop", "stop_when")
        said = ended["whipstaff"]["stop_when"]
        assert said["readings"] == [pytest.approx(read[: first + 1], abs=1e-4)] and said["above"] == limit


def test_answers_of_one_prompt_end_each_for_itself(complete: Post) -> None:
    asked = {"n": 4, "temperature": 1.0, "seed": 1, "ignore_eos": True}
    told = ok(complete(**asked, stop_when={"probe": "probe", "above": 1e6}))["whipstaff"]["stop_when"]["readings"]
    limit = sorted(reading for read in told for reading in read)[-3] - 1e-4
    answer = ok(complete(**asked, stop_when={"probe": "probe", "above": limit}))
    ends = [choice["finish_reason"] for choice in answer["choices"]]
    assert set(ends) == {"stop", "length"}
    for index, (before, read) in enumerate(zip(told, answer["whipstaff"]["stop_when"]["readings"], strict=True)):
        hits = [at for at, reading in enumerate(before) if reading > limit]
        assert (ends[index] == "stop") == bool(hits)
        num = hits[0] + 1 if hits else len(before)
        assert read == pytest.approx(before[:num], abs=1e-4)
        assert len(tokens(answer, index)) == (num if hits else num + 1)


def test_several_sequences_fire_each_for_itself(complete: Post) -> None:
    (said,) = complete(steering=STEP, n=3, temperature=1, seed=4).json()["whipstaff"]["steering"]
    assert said["edited_tokens"] == said["fired"]["of"] == 3 * (5 + 11)
    assert 0 < said["fired"]["tokens"] < said["fired"]["of"]


def test_a_schedule_ends(complete: Post) -> None:
    """An edit that is full for the first token and gone from the second on is an edit of the last prompt token."""
    short = PUSH | {"schedule": {"shape": "linear", "from": 1, "to": 0, "tokens": 1}}
    first = {"prompt": [[-1, None]], "generation": [[0, 1]]}
    assert tokens(complete(steering=short)) == tokens(complete(steering=PUSH | {"where": first}))


def test_tokens_are_named_by_id_or_text_and_counted(complete: Post, tokenizer: PreTrainedTokenizerFast) -> None:
    (opening,) = tokenizer.encode("(")
    by_id, by_text = (complete(steering=PUSH | {"where": {"tokens": [token]}}) for token in (opening, "("))
    assert tokens(by_id) == tokens(by_text) == tokens(complete(steering=PUSH | {"where": "last_prompt"}))
    (said,) = by_text.json()["whipstaff"]["steering"]
    assert said["where"][0]["tokens"] == [opening]
    assert said["edited_tokens"] == 1 + tokens(by_text)[:-1].count(opening)
    two = [PUSH | {"where": {"tokens": ["("]}}, PUSH | {"where": {"tokens": ["(", "def"]}}]
    assert_refused(complete(steering=two), 400, "steering[1].where.tokens")


def test_messages_of_a_chat_are_chosen_by_role(chat: Post) -> None:
    def said(clause: Any) -> Any:
        (entry,) = chat("open the door", steering=PUSH | {"where": clause}).json()["whipstaff"]["steering"]
        return entry["where"][0]["prompt"], entry["edited_tokens"]

    ((start, end),), num = said({"messages": [{"role": "user"}]})
    assert 0 < start < end and num == end - start
    ((whole_start, whole_end),), _ = said({"messages": [{"role": "user", "whole": True}]})
    assert whole_start <= start and end <= whole_end
    steering = PUSH | {"where": {"messages": [{"role": "tool"}]}}
    assert_refused(chat(steering=steering), 400, "steering.where.messages")


def test_the_rows_of_a_soft_prompt_are_paid_for(complete: Post) -> None:
    plain, soft = complete(), complete(steering=[{"vector": "soft"}, PUSH])
    assert soft.json()["usage"]["prompt_tokens"] == plain.json()["usage"]["prompt_tokens"] + 3
    first, second = soft.json()["whipstaff"]["steering"]
    assert (first["prompt_tokens"], first["insert"], second["edited_tokens"]) == (3, 0, 12)


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
    ways: list[dict[str, Any]] = [
        {},
        {"scale": -2},
        {"layers": [1]},
        {"where": "all"},
        {"where": "last_prompt"},
        {"where": "generation"},
    ]
    assert len({tuple(tokens(complete(steering=PUSH | way))) for way in ways}) == len(ways)


# ---- what OpenAI's API offers beside


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
    assert receipts[-1] and receipts[-1]["steering"][0]["edited_tokens"] == 5


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
    (text,) = texts(chat(response_format=MOOD, max_tokens=120, temperature=1, seed=1, **extras))
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
    assert_refused(complete(prompt, decoding=short, max_tokens=SHORT_LEN - 49), 400, "decoding.expert")
    assert_refused(complete(list(range(10, 10 + SHORT_LEN)), decoding=short, max_tokens=1), 400, "decoding.expert")


# ---- bad input

LOUD = [{"vector": "lofit", "scale": 1e4, "where": "all"}] * 16
BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown key": ({"steering": [PUSH, PUSH | {"sclae": 1}]}, 400, "steering[1].sclae"),
    "alone": ({"steering": PUSH | {"when": {"probe": "push", "above": 1}}}, 400, "steering.when.probe"),
    "unknown probe": ({"steering": [PUSH | {"when": {"probe": "x", "above": 1}}]}, 404, "steering[0].when.probe"),
    "nothing to stop at": ({"stop_when": {"probe": "probe"}}, 400, "stop_when"),
    "stop at no probe": ({"stop_when": {"probe": "push", "above": 1}}, 400, "stop_when.probe"),
    "stop at nobody": ({"stop_when": {"probe": "x", "above": 1}}, 404, "stop_when.probe"),
    "stop where it is not": ({"stop_when": {"probe": "probe", "above": 1, "layer": 2}}, 400, "stop_when.layer"),
    "stop, and go on": ({"stop_when": {"probe": "probe", "above": 1, "release": 0}}, 400, "stop_when.release"),
    "a search that is stopped": (
        {"stop_when": {"probe": "probe", "above": 1}, "decoding": {"method": "beam_search", "num_beams": 2}},
        400,
        "stop_when",
    ),
    "endless": ({"steering": [PUSH | {"schedule": {"shape": "linear"}}]}, 400, "steering[0].schedule"),
    "absent feature": (
        {"steering": [{"vector": "sae", "features": [{"feature": 99, "set": 1}]}]},
        400,
        "steering[0].features[0].feature",
    ),
    "method in need": ({"steering": {"method": "caa"}}, 400, "steering.method"),
    "unknown steering": ({"steering": {"method": "levitation"}}, 422, "steering.method"),
    "dense": ({"steering": {"method": "mote", "experts": {"0": {"off": [0]}}}}, 422, "steering.method"),
    "dense too": ({"steering": [PUSH, {"vector": "experts"}]}, 422, "steering[1].vector"),
    "left alone": (
        {"steering": {"method": "pasta", "heads": {"0": [0]}, "spans": [[0, 1]]}},
        422,
        "steering.method",
    ),
    "unknown vector": ({"steering": [PUSH, {"vector": "absent"}]}, 404, "steering[1].vector"),
    "no vector": ({"steering": [{"scale": 1}]}, 400, "steering[0]"),
    "not an object": ({"steering": ["push"]}, 400, "steering[0]"),
    "not JSON": ({"steering": "push"}, 400, "steering"),
    "deep JSON": ({"vllm_xargs": {"steering": "[" * 100_000}}, 400, "vllm_xargs.steering"),
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
    "unknown method": ({"decoding": {"method": "telepathy"}}, 422, "decoding.method"),
    "model not loaded": ({"decoding": [PAIR | {"expert": "absent"}]}, 404, "decoding[0].expert"),
    "same model twice": ({"decoding": [PAIR | {"antiexpert": "expert"}]}, 400, "decoding[0].antiexpert"),
    "absurd alpha": ({"decoding": [PAIR | {"alpha": 1e9}]}, 400, "decoding[0].alpha"),
    "long for auxiliary": ({"decoding": PAIR | {"expert": "short"}, "max_tokens": 200}, 400, "decoding.expert"),
    "on_unavailable": ({"on_unavailable": "maybe"}, 400, "on_unavailable"),
    "beam search": ({"steering": PUSH, "use_beam_search": True, "n": 2, "prompt_logprobs": 1}, 400, "prompt_logprobs"),
    "no negative prompt": ({"guidance_scale": 2, "negative_prompt": []}, 400, "negative_prompt"),
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
    assert_refused(complete(prompts, steering=PUSH | {"where": where}), 400, "steering.where")


@pytest.mark.usefixtures("unharmed")
def test_the_loudest_edits_that_are_taken_leave_nothing_that_harms_others(complete: Post) -> None:
    """Not-a-number in a KV block that is freed and taken again would reach a request that never asked for it."""
    loud = [{"vector": "lofit", "scale": 1e4, "where": "all"}] * 3
    response = complete(steering=loud, logprobs=1, max_tokens=100)
    assert response.status_code == 200, response.text  # JSON has no NaN


@pytest.mark.parametrize(
    "path",
    ["/inference/v1/generate", "/invocations",
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
    [
        *(("GET", path) for path in ("methods", "vectors", "vectors/push", "vectors/x", "presets", "presets/x")),
        *(("POST", path) for path in ("validate", "vectors", "presets")),
        *(("DELETE", path) for path in ("vectors/push", "presets/x")),
    ],
)
def test_the_users_key_guards_the_steering_routes(server: Server, method: str, path: str) -> None:
    for headers in ({}, {"Authorization": "Bearer wrong"}):
        answer = httpx.request(method, f"{server.url}/v1/steering/{path}", headers=headers, json={})
        assert answer.status_code == 401


def test_without_an_admin_key_nothing_can_be_changed(http: httpx.Client) -> None:
    listed = http.get("/v1/steering/presets").json()
    assert listed["object"] == "list" and {row["id"] for row in listed["data"]} == PRESETS.keys()
    for method, path in (
        ("POST", "vectors?name=x"),
        ("DELETE", "vectors/push"),
        ("POST", "presets"),
        ("DELETE", "presets/x"),
    ):
        answer = http.request(method, f"/v1/steering/{path}", headers={"X-Whipstaff-Admin-Key": "x"})
        assert_refused(answer, 403, None)
        assert "--admin-key KEY and --registry DIR" in answer.json()["error"]["message"]


def test_methods_are_listed_with_schemas_that_name_what_is_loaded(http: httpx.Client) -> None:
    rows = {row["name"]: row for row in http.get("/v1/steering/methods").json()["data"]}
    assert rows.keys() == {*(name for name, method in METHODS.items() if method.kind.named_in != "decoding"), *DECODING}
    for name, row in rows.items():
        assert row["schema"]["type"] == "object" and row["paper"] and isinstance(row["defaults"], dict), name
        assert row["available"] is (row["reason"] is None), name
    used = {"vector", "caa", "iti", "lofit", "directional_ablation", "sae", "loreft", "probe", "soft_prompt"}
    served = {name for name, method in DECODING.items() if not method.needs_adapters}
    assert {name for name, row in rows.items() if row["available"]} == used | served
    assert rows["mote"]["reason"] == "the served model has no experts"
    assert all("--steering-sites attention" in rows[name]["reason"] for name in ("pasta", "prefix_kv"))
    assert rows["caa"]["schema"]["properties"]["vector"]["enum"] == ["late", "push"]
    assert (rows["iti"]["defaults"]["scale"], rows["iti"]["sites"], rows["iti"]["off"]) == (
        15,
        ["attn_head"],
        {"scale": 0},
    )
    assert rows["proxy_tuning"]["schema"]["properties"]["expert"]["enum"] == ["expert", "anti", "short"]


def test_vectors_are_listed_with_what_is_known_of_them(http: httpx.Client) -> None:
    rows = {row["id"]: row for row in http.get("/v1/steering/vectors").json()["data"]}
    assert [name for name, row in rows.items() if not row["fits"]] == ["misfit"]
    assert {name: row["method"] for name, row in rows.items()} == {
        "ablate": "directional_ablation", "both": "vector", "experts": "vector", "iti": "iti", "late": "caa",
        "lofit": "lofit", "loreft": "loreft", "misfit": "caa", "probe": "probe",
        "push": "caa", "sae": "sae", "soft": "soft_prompt", **dict.fromkeys(SOFT, "soft_prompt"), **HEADS,
    }  # fmt: skip
    assert rows["ablate"]["sites"] == ["attn_out", "mlp_out", "resid_pre"] and rows["soft"]["layers"] == []
    assert "hidden 64" in rows["misfit"]["problem"] and rows["push"]["problem"] is None
    one = http.get("/v1/steering/vectors/iti").json()
    assert one["norms"].keys() == {f"attn_head.{layer}.{part}" for layer in range(3) for part in ("direction", "sigma")}
    assert {key: value for key, value in one.items() if key not in ("norms", "doses", "cosines")} == rows["iti"]
    assert one["cosines"] == {}  # nobody else edits heads along a direction
    strong, weak = one["doses"]
    assert (strong["scale"], weak["scale"]) == (15, 1) and strong["at"] == weak["at"]
    assert strong["relative"] == pytest.approx(15 * weak["relative"]) and weak["relative"] > 0
    assert http.get("/v1/steering/vectors/misfit").json()["doses"] == []
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
    assert_refused(ask(request | window | {"prompt": PROMPT}), 400, "steering.where")
    assert_refused(ask(request | window | {"messages": messages}), 400, "steering.where")
    assert_refused(ask({"steering": {"vector": "absent"}}), 404, "steering.vector")
    assert_refused(ask({"vllm_xargs": {"decoding": '{"method": "x"}'}}), 422, "vllm_xargs.decoding.method")
    assert_refused(ask(request | {"prompt": PROMPT, "model": "other"}), 404, "model")
    assert ask(request | {"prompt": PROMPT, "max_tokens": "x"}).status_code == 400
    assert finished(metrics(http)) - finished(before) == 1  # the one completion above


# ---- metrics and disconnects


def requests(samples: Samples, method: str, outcome: str) -> float:
    return samples.get(("whipstaff_requests_total", (("method", method), ("outcome", outcome))), 0.0)


def finished(samples: Samples) -> float:
    return sum(value for (name, _), value in samples.items() if name == "whipstaff_requests_total")


def vllm(samples: Samples, name: str) -> float:
    return sum(value for (found, _), value in samples.items() if found == f"vllm:{name}")


def of_method(samples: Samples, series: str, method: str) -> float:
    return samples.get((f"whipstaff_{series}", (("method", method),)), 0.0)


def refused(samples: Samples, reason: str) -> float:
    return samples["whipstaff_refusals_total", (("reason", reason),)]


@pytest.mark.parametrize("stream", [True, False])
def test_metrics_count_by_method_beside_vllms_own(http: httpx.Client, complete: Post, stream: bool) -> None:
    labels: dict[str, dict[str, Any]] = {
        "plain": {},
        "caa": {"steering": PUSH},
        "several": {"steering": MIXED},
        "proxy_tuning": {"decoding": PAIR},
        "mixed": BOTH,
    }
    before = metrics(http)
    for extras in labels.values():
        complete(max_tokens=5, ignore_eos=True, stream=stream, **extras)
    after = metrics(http)
    for method in labels:
        assert requests(after, method, "length") - requests(before, method, "length") == 1

        def grown(series: str, method: str = method) -> float:
            return of_method(after, series, method) - of_method(before, series, method)

        assert grown("time_to_first_token_seconds_count") == grown("e2e_request_latency_seconds_count") == 1
        assert grown("inter_token_latency_seconds_count") == 4
        assert grown("generated_tokens_total") == grown("computed_tokens_total") == 5
        parts = grown("time_to_first_token_seconds_sum"), grown("inter_token_latency_seconds_sum")
        assert min(parts) > 0 and sum(parts) <= grown("e2e_request_latency_seconds_sum") * 1.001
    assert after["whipstaff_vectors_loaded", ()] == 11 + len(HEADS) + len(SOFT)
    assert vllm(after, "generation_tokens_total") - vllm(before, "generation_tokens_total") == 5 * 5
    labelled = {pair for (name, pairs) in after if name.startswith("whipstaff_") for pair in pairs}
    names = {"plain", "several", "mixed", *DECODING, *METHODS}
    assert {value for key, value in labelled if key == "method"} <= names
    assert {key for key, _ in labelled} <= {
        *("method", "outcome", "reason", "le", "preset", "kind", "state", "ran", "traffic"),
        *("version", "vllm", "device", "mode", "action"),
    }


def test_metrics_say_why_requests_were_refused(server: Server, http: httpx.Client, complete: Post) -> None:
    """Whoever refuses them."""
    before = metrics(http)
    for answer, status in (
        (complete(steering={"vector": "absent"}), 404),
        (complete(model="other"), 404),
        (complete(steering={"vector": "push", "scale": "much"}), 400),
        (complete(max_tokens="many"), 400),
        (complete(steering={"vector": "misfit"}), 409),
        (complete(decoding={"method": "x"}), 422),
        (httpx.post(f"{server.url}/v1/completions", json={"model": MODEL, "prompt": PROMPT}), 401),
        (http.delete("/v1/steering/vectors/push"), 403),
    ):
        assert answer.status_code == status, answer.text
    after = metrics(http)
    grown = {reason: refused(after, reason) - refused(before, reason) for reason in set(REASONS.values())}
    told = {"unknown_name": 2, "bad_value": 2, "conflict": 1, "unavailable": 1, "unauthorized": 1, "policy": 1}
    assert {reason: number for reason, number in grown.items() if number} == told
    assert finished(after) == finished(before)


def test_metrics_say_what_steering_does(http: httpx.Client, complete: Post) -> None:
    def grown(name: str) -> float:
        return after[f"whipstaff_{name}", ()] - before[f"whipstaff_{name}", ()]

    before = metrics(http)
    said = [complete(steering=steering).json()["whipstaff"]["steering"] for steering in (MIXED, [PUSH], [STEP])]
    complete()
    post_json(http, "/v1/steering/validate", {"steering": MIXED})
    after = metrics(http)
    fired = [entry["fired"] for entries in said for entry in entries if "fired" in entry]
    assert grown("conditional_tokens_total") == sum(one["of"] for one in fired) > 0
    assert grown("conditional_tokens_open_total") == sum(one["tokens"] for one in fired) > 0
    assert grown("dose_count") == 3
    assert grown("dose_sum") == pytest.approx(
        sum(max(entry["dose"]["relative"] for entry in entries) for entries in said)
    )
    admitted = "whipstaff_admission_seconds_count", (("kind", "steering"),)
    assert after[admitted] - before.get(admitted, 0) == 3
    assert after["whipstaff_slots", ()] == MAX_SEQS and after["whipstaff_selftest_ok", ()] == 1


def test_metrics_say_what_the_engine_counts(http: httpx.Client, complete: Post) -> None:
    """Once a second, whoever asks."""

    def uploads(now: Samples) -> float:
        return now["whipstaff_table_uploads_total", ()]

    def cached(now: Samples, what: str, traffic: str) -> float:
        return now[f"whipstaff_prefix_cache_{what}_total", (("traffic", traffic),)]

    complete()
    time.sleep(2 * PAUSE)
    before = metrics(http)
    prompt, steering = [11 + index for index in range(100)], PUSH | {"scale": 1.2345, "where": "all"}
    for _ in range(2):
        complete(prompt, steering=steering)
    poll(http, lambda now: cached(now, "hits", "steered") > cached(before, "hits", "steered"))
    after = metrics(http)
    assert uploads(after) == uploads(before) + 1
    assert cached(after, "queries", "steered") - cached(before, "queries", "steered") == 200
    assert cached(after, "hits", "steered") - cached(before, "hits", "steered") == 96  # whole blocks of 32
    assert cached(after, "queries", "plain") == cached(before, "queries", "plain")
    assert after["whipstaff_table_upload_bytes_total", ()] > before["whipstaff_table_upload_bytes_total", ()]
    aux = "whipstaff_aux_steps_total"
    assert after[aux, (("ran", "no"),)] > before[aux, (("ran", "no"),)]
    assert after[aux, (("ran", "yes"),)] == before[aux, (("ran", "yes"),)]


@pytest.mark.usefixtures("unharmed")
def test_metrics_say_who_has_slots_and_who_waits(server: Server, http: httpx.Client) -> None:
    ways = [{"steering": PUSH | {"scale": 2 + index / 100}} for index in range(2 * MAX_SEQS)]
    before, seen = metrics(http), list[tuple[float, float]]()
    with ExitStack() as connections:
        for fields in ways:
            connections.enter_context(left_alone(server, stream=True, **fields))
        while not seen or seen[-1] != (0, 0) or len(set(seen)) == 1:
            seen.append(slots(metrics(http)))
            assert len(seen) < 50 * PATIENCE, seen[-20:]
            time.sleep(0.02)
    assert any(used == MAX_SEQS and waiting for used, waiting in seen), seen
    assert all(used <= MAX_SEQS and waiting <= MAX_SEQS for used, waiting in seen), seen
    after, waited = metrics(http), "whipstaff_slot_wait_seconds_count"
    assert 1 <= after[waited, ()] - before[waited, ()] <= MAX_SEQS
    assert after["whipstaff_slot_wait_seconds_sum", ()] > before["whipstaff_slot_wait_seconds_sum", ()]


def slots(now: Samples) -> tuple[float, float]:
    """In use, and requests that wait for some."""
    return now["whipstaff_slots_in_use", ()], now["whipstaff_requests_waiting_for_slots", ()]


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
    abandon(server, http, "mixed", [{"n": MAX_SEQS, "stream": stream, **BOTH}])


@pytest.mark.usefixtures("unharmed")
def test_clients_that_go_away_while_they_wait_for_a_slot_free_it_too(
    server: Server, http: httpx.Client, complete: Post
) -> None:
    ways = [PUSH | {"scale": 1 + index / 100} for index in range(2 * MAX_SEQS)]
    abandon(server, http, "caa", [{"stream": True, "steering": steering} for steering in ways])
    assert all(tokens(complete(steering=steering, max_tokens=1)) for steering in ways)
