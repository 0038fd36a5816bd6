"""Searches and ranked answers over HTTP: beams are transformers', vLLM's own beam search answers the same, the best
candidates are those that their own log-probabilities say; what cannot be is refused by its field."""

import json
from functools import partial
from typing import Any

import httpx
import pytest
import torch
from asking import PAIR, PROMPT, PUSH, Post, assert_refused, data_events, metrics, ok, poll, streamed_text, texts
from asking import tokens as tokens_of
from reference import contrastive_search, opera_lite
from search_loop import Loop, of_vllm
from serving import Server
from transformers import LlamaForCausalLM

from whipstaff.decoding.methods.opera_lite import OperaLiteParams
from whipstaff.decoding.search.beam_search import BeamSearchParams
from whipstaff.decoding.search.opera import Opera, OperaSetting
from whipstaff.steering import vector_file

from .test_http import is_free, left_alone, requests, vllm

pytestmark = pytest.mark.engine

NUM_TOKENS, BEAMS, EOS = 10, 4, 1
PROMPTS = [PROMPT, "import os\n\nclass", "x = [1, 2"]
NEUTRAL = PUSH | {"scale": 1e-9}  # a vector that changes no token


@pytest.fixture(scope="module")
def complete(complete: Post) -> Post:
    """Without the temperature that other tests say, which a search has no use for."""
    return partial(complete, max_tokens=NUM_TOKENS, temperature=None)


@pytest.fixture(scope="module")
def chat(chat: Post) -> Post:
    return partial(chat, max_tokens=NUM_TOKENS, temperature=None)


@pytest.fixture(scope="module")
def model(server: Server) -> Any:
    return LlamaForCausalLM.from_pretrained(server.models["base"], dtype=torch.float32).eval()


@torch.inference_mode()
def beams_of(model: Any, ids: list[int], num: int, **more: Any) -> tuple[list[list[int]], list[float]]:
    """The best answers of transformers' beam search, without padding, and their scores."""
    found = model.generate(
        torch.tensor([ids]),
        **{"num_beams": BEAMS, "max_new_tokens": NUM_TOKENS, "do_sample": False} | more,
        num_return_sequences=num,
        output_scores=True,
        return_dict_in_generate=True,
    )
    texts = [[token for token in row[len(ids) :].tolist() if token != 2] for row in found.sequences]
    return texts, found.sequences_scores.tolist()


@pytest.mark.parametrize("more", [{}, {"length_penalty": 0.2}, {"early_stopping": True}])
def test_beams_are_those_of_transformers(server: Server, complete: Post, model: Any, more: dict[str, Any]) -> None:
    answer = ok(complete(PROMPTS, num_beams=BEAMS, num_return_sequences=3, **more))
    said = answer["whipstaff"]
    assert len(answer["choices"]) == 3 * len(PROMPTS) and said["warnings"] == []
    assert said["decoding"][0]["num_beams"] == BEAMS and len(said["search"]) == len(PROMPTS)
    for number, search in enumerate(said["search"]):
        choices = answer["choices"][3 * number : 3 * number + 3]
        wanted, scores = beams_of(model, choices[0]["prompt_token_ids"], 3, **more)
        assert [one["token_ids"] for one in choices] == wanted
        assert search["scores"][:3] == pytest.approx(scores, abs=1e-4)
        assert search["sequences"] == BEAMS and search["forks"] > 0 and search["tokens_computed"] > NUM_TOKENS
    assert answer["usage"]["completion_tokens"] == sum(len(one["token_ids"]) for one in answer["choices"])
    computed = sum(search["tokens_computed"] for search in said["search"])
    assert answer["usage"]["completion_tokens_details"]["computed_tokens"] == computed
    assert [one["index"] for one in answer["choices"]] == list(range(3 * len(PROMPTS)))


def test_a_chat_and_a_stream_say_the_same(complete: Post, chat: Post) -> None:
    fields = {"num_beams": BEAMS, "n": 2}
    for ask in (complete, chat):
        whole = ask(**fields)
        events = data_events(ask(stream=True, stream_options={"include_usage": True}, **fields))[:-1]
        chunks = [json.loads(event) for event in events]
        assert [streamed_text(chunks, index) for index in range(2)] == texts(whole) and texts(whole)[0] != texts(whole)[
            1
        ]
        for name in ("completion_tokens", "completion_tokens_details"):
            assert chunks[-1]["usage"][name] == whole.json()["usage"][name]
        assert chunks[-1]["whipstaff"]["search"] == whole.json()["whipstaff"]["search"]


RETRACTING: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": BEAMS, "n": 2, "max_tokens": 24},
    "opera": {
        "decoding": {"method": "opera", "beams": 2, "candidates": 3, "threshold": 2, "switch_length": 2, "visits": 2},
        "max_tokens": 24,
        "ignore_eos": True,
    },
    "stopped": {"num_beams": BEAMS, "max_tokens": 24, "stop": ["t"]},
}


@pytest.mark.parametrize("name", RETRACTING)
def test_what_is_streamed_ahead_is_taken_back(complete: Post, chat: Post, name: str) -> None:
    """What is left of it is the answer; what stands there on the way is more than what is settled."""
    fields, num = RETRACTING[name], 0
    for ask, prompt in ((complete, PROMPT), (chat, "Why?")):
        whole = ask(prompt, **fields)
        lagging = [json.loads(event) for event in data_events(ask(prompt, stream=True, **fields))[:-1]]
        events = data_events(ask(prompt, stream=True, stream_retractions=True, **fields))[:-1]
        ahead = [json.loads(event) for event in events]
        assert [with_retractions(ahead, index) for index in range(len(texts(whole)))] == texts(whole)
        assert ahead[-1]["whipstaff"]["search"] == whole.json()["whipstaff"]["search"]
        choices = [[one for chunk in chunks for one in chunk["choices"]] for chunks in (ahead, lagging)]
        ids = [[token for one in chunks for token in one.get("token_ids") or ()] for chunks in choices]
        assert ids[0] == ids[1]
        num += sum("retracted" in chunk.get("whipstaff", {}) for chunk in ahead)
        assert len(ahead) > len(lagging) or "stop" in fields
    assert num > 0 or "stop" in fields  # what stands behind it is never shown


def with_retractions(chunks: list[dict[str, Any]], index: int) -> str:
    """The text of a choice, as a client keeps it."""
    text = ""
    for chunk in chunks:
        for said in chunk.get("whipstaff", {}).get("retracted", ()):
            if said["index"] == index:
                assert 0 < said["characters"] <= len(text) and not chunk["choices"]
                text = text[: -said["characters"]]
        text += streamed_text([chunk], index)
    return text


def test_beams_go_together_with_the_rest(complete: Post) -> None:
    """Steering, conditions, mixes, further prompts, penalties, biases."""
    alone = tokens_of(complete(num_beams=BEAMS))
    push = {"vector": "push", "scale": 0.5, "where": "all"}
    when = {"probe": "probe", "above": 0.0, "decide": "step"}
    others: list[dict[str, Any]] = [
        {"steering": push},
        {"steering": push | {"when": when, "layers": [1, 2]}},
        {"decoding": [PAIR]},
        {"decoding": [{"method": "cfg", "guidance_scale": 3.0, "negative_prompt": "import"}]},
        {"repetition_penalty": 2.0},
        {"logit_bias": {str(alone[0]): -100}},
    ]
    found = [tokens_of(complete(num_beams=2, **fields)) for fields in others]
    assert all(tokens != alone for tokens in found) and len(set(map(tuple, found))) == len(others)
    assert found == [tokens_of(complete(num_beams=2, **fields)) for fields in others]


@pytest.mark.parametrize("more", [{}, {"length_penalty": 0.0}, {"ignore_eos": True}])
def test_vllms_beam_search_answers_the_same(complete: Post, model: Any, more: dict[str, Any]) -> None:
    """As vLLM's loop, written over transformers, at temperature 0: at others it draws a token more for each beam."""
    fields = {"use_beam_search": True, "n": 3, "temperature": 0, **more}
    ours = complete(**fields)
    (prompt,) = {tuple(one["prompt_token_ids"]) for one in ours.json()["choices"]}
    params = BeamSearchParams(num_beams=3, scoring="vllm", length_penalty=more.get("length_penalty", 1.0))
    wanted = of_vllm(model, prompt, params, None if "ignore_eos" in more else EOS, NUM_TOKENS)
    said = ours.json()["whipstaff"]
    answers = [one["token_ids"] for one in ours.json()["choices"]]
    found = [[token for token in answer if "ignore_eos" in more or token != EOS] for answer in answers]
    assert found == [list(text) for text, _ in wanted]
    assert said["search"][0]["scores"] == pytest.approx([score for _, score in wanted], abs=1e-4)
    assert said["search"][0]["sequences"] == 3 and said["decoding"][0]["scoring"] == "vllm"
    assert texts(complete(**fields, steering=NEUTRAL)) == texts(ours) != texts(complete(**fields, steering=PUSH))


@pytest.mark.parametrize("name", RETRACTING)
def test_log_probabilities_are_those_of_the_model(complete: Post, chat: Post, model: Any, name: str) -> None:
    """Of every answer's tokens and the likeliest ones where they stand, streamed or not."""
    fields = RETRACTING[name] | {"logprobs": 2, "return_tokens_as_token_ids": True}
    answer = ok(complete(**fields))
    for choice in answer["choices"]:
        prompt, tokens, said = choice["prompt_token_ids"], choice["token_ids"], choice["logprobs"]
        with torch.inference_mode():
            rows = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1].log_softmax(1)
        own = rows[range(len(tokens)), tokens].tolist()
        assert said["token_logprobs"] == pytest.approx(own, abs=1e-3) and len(said["tokens"]) == len(tokens)
        for best, row, value in zip(said["top_logprobs"], rows, own, strict=True):
            likeliest = row.topk(2).values.tolist()
            wanted = likeliest if value > likeliest[-1] - 1e-3 else [*likeliest, value]
            assert sorted(best.values()) == pytest.approx(sorted(wanted), abs=1e-3)
    for extra in ({}, {"stream_retractions": True}):
        chunks = [json.loads(event) for event in data_events(complete(stream=True, **fields, **extra))[:-1]]
        for choice in answer["choices"]:
            mine = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
            pieces = [one for one in mine if one["logprobs"]]
            for part in ("tokens", "token_logprobs"):
                streamed = [value for one in pieces for value in one["logprobs"][part]]
                assert streamed == choice["logprobs"][part]
    said = ok(chat(**RETRACTING[name], logprobs=True, top_logprobs=1))["choices"][0]
    assert [len(one["top_logprobs"]) for one in said["logprobs"]["content"]] == [1] * len(said["token_ids"])


def test_a_tree_search_tells_its_classifiers_scores(complete: Post) -> None:
    kcts = {"method": "kcts", "classifier": "wary", "k": 4, "simulations": 6}
    answer = ok(complete(decoding=kcts, max_tokens=4, ignore_eos=True, explain={"top": 0}))
    (choice,) = answer["choices"]
    assert [one["id"] for one in choice["explain"]] == choice["token_ids"]
    assert all(0 < one["facts"]["classifier"] < 1 and one["token"] is not None for one in choice["explain"])


# ---- what reads attention and hidden states

OPERA = {"method": "opera", "beams": 2, "candidates": 3, "threshold": 2, "switch_length": 2, "visits": 2}


@pytest.fixture(scope="module")
def loop(server: Server) -> Loop:
    model = LlamaForCausalLM.from_pretrained(server.models["base"], attn_implementation="eager", dtype=torch.float32)
    return Loop(model.eval(), reads_attention=True)


def test_opera_is_its_loop_over_transformers(complete: Post, chat: Post, loop: Loop) -> None:
    """Rollbacks among them, streamed and not."""
    fields = {"decoding": OPERA, "max_tokens": 24, "ignore_eos": True}
    answer = ok(complete(PROMPTS, **fields))
    rollbacks = 0
    for choice, search in zip(answer["choices"], answer["whipstaff"]["search"], strict=True):
        prompt = choice["prompt_token_ids"]
        setting = OperaSetting(**OPERA, trusted=((1, len(prompt)),))
        ran = loop.run(Opera(), setting, prompt, 24)
        assert choice["token_ids"] == list(ran.best)
        assert (search["tried"], search["sequences"]) == (ran.count("tried"), 2)
        rollbacks += search["rollbacks"]
        assert search["rollbacks"] == ran.count("rollbacks")
    assert rollbacks > 0 and tokens_of(complete(**fields)) != tokens_of(complete(max_tokens=24, ignore_eos=True))
    for ask in (complete, chat):
        chunks = [json.loads(event) for event in data_events(ask(stream=True, **fields))[:-1]]
        assert [streamed_text(chunks)] == texts(ask(**fields))


def test_opera_draws_of_its_candidates_by_the_requests_seed(complete: Post, chat: Post, loop: Loop) -> None:
    """The same tokens alone, beside others and streamed."""
    own = OPERA | {"beams": 1, "candidates": 4, "temperature": 0.9}
    fields = {"decoding": own, "max_tokens": 16, "ignore_eos": True}
    found = []
    for seed in (7, 8):
        answer = ok(complete(PROMPTS, seed=seed, **fields))
        for choice, search in zip(answer["choices"], answer["whipstaff"]["search"], strict=True):
            prompt = choice["prompt_token_ids"]
            ran = loop.run(Opera(), OperaSetting(**own, trusted=((1, len(prompt)),)), prompt, 16, seed=seed)
            assert choice["token_ids"] == list(ran.best) and search["tried"] == ran.count("tried")
        assert answer["whipstaff"]["warnings"] == []
        found.append(answer["choices"][0]["token_ids"])
        assert found[-1] == tokens_of(complete(PROMPTS[0], seed=seed, **fields))
    greedy = tokens_of(complete(decoding=own | {"temperature": 0}, max_tokens=16, ignore_eos=True))
    assert len({tuple(one) for one in (*found, greedy)}) == 3
    for ask in (complete, chat):
        chunks = [json.loads(event) for event in data_events(ask(stream=True, seed=7, **fields))[:-1]]
        assert [streamed_text(chunks)] == texts(ask(seed=7, **fields))


@torch.inference_mode()
def seen_by(model: Any, ids: list[int]) -> tuple[Any, Any, Any]:
    """The last logits of a text, and how much each of its tokens looks at those before, and its last hidden states."""
    out = model(torch.tensor([ids]), output_attentions=True, output_hidden_states=True)
    attention = [row[: i + 1].tolist() for i, row in enumerate(out.attentions[-1][0].amax(0))]
    return out.logits[0, -1].tolist(), attention, out.hidden_states[-1][0].tolist()


def last_hidden(model: Any, ids: list[int], token: int) -> list[float]:
    found: list[float] = seen_by(model, [*ids, token])[2][-1]
    return found


def test_operas_penalty_on_one_sequence(complete: Post, loop: Loop) -> None:
    own = {"method": "opera_lite", "penalty_weight": 10.0, "scale_factor": 500.0, "switch_length": 1}
    answer = ok(complete(decoding=own, ignore_eos=True, temperature=0))["choices"][0]
    prompt, found = answer["prompt_token_ids"], list[int]()
    params = OperaLiteParams.model_validate(own)
    for _ in range(NUM_TOKENS):
        logits, attention, _ = seen_by(loop.model, [*prompt, *found])
        amount = opera_lite.penalty(attention, len(prompt), params, [(1, len(prompt))])
        row = opera_lite.rewrite(logits, amount, params.candidates)
        found.append(max(range(len(row)), key=lambda v: row[v]))
    assert answer["token_ids"] == found
    assert found != tokens_of(complete(ignore_eos=True, temperature=0))


def test_contrastive_search_is_its_formula(complete: Post, loop: Loop) -> None:
    answer = ok(complete(penalty_alpha=0.6, top_k=4, ignore_eos=True, temperature=0))["choices"][0]
    prompt, found = answer["prompt_token_ids"], list[int]()
    for _ in range(NUM_TOKENS):
        logits, _, before = seen_by(loop.model, [*prompt, *found])
        feed = partial(last_hidden, loop.model, [*prompt, *found])
        found.append(contrastive_search.choose(logits, before, feed, 4, 0.6)[0])
    assert answer["token_ids"] == found
    assert found != tokens_of(complete(ignore_eos=True, temperature=0))


# ---- budgets


def test_budgets_end_a_search_with_what_it_has(complete: Post) -> None:
    """After so many tokens, what it says is what it would say if they were all that it may."""
    most = {"decoding": {"method": "beam_search", "num_beams": 3, "max_computed_tokens": 3 * 4}}
    answer = ok(complete(**most, max_tokens=100, ignore_eos=True))
    (choice,), (search,) = answer["choices"], answer["whipstaff"]["search"]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "max_computed_tokens")
    assert (search["ended_by"], search["tokens_computed"]) == ("max_computed_tokens", 12)
    assert choice["token_ids"] == tokens_of(complete(num_beams=3, max_tokens=4, ignore_eos=True))
    for method in (most["decoding"], OPERA, {"method": "kcts", "classifier": "wary", "k": 4, "simulations": 6}):
        spent = {**method, "max_computed_tokens": None, "max_time": 1e-6}
        answer = ok(complete(decoding=spent, max_tokens=100, ignore_eos=True))
        assert answer["choices"][0]["stop_reason"] == answer["whipstaff"]["search"][0]["ended_by"] == "max_time"
        assert len(answer["choices"][0]["token_ids"]) == answer["usage"]["completion_tokens"] == 1


# ---- ranked answers


def test_the_best_of_several(complete: Post, chat: Post) -> None:
    sampled = {"temperature": 1.0, "seed": 5}
    everybody = ok(complete(n=6, logprobs=0, **sampled))["choices"]
    means = [sum(one["logprobs"]["token_logprobs"]) / len(one["token_ids"]) for one in everybody]
    order = sorted(range(6), key=lambda index: -means[index])
    answer = ok(complete(n=2, best_of=6, **sampled))
    assert [one["token_ids"] for one in answer["choices"]] == [everybody[index]["token_ids"] for index in order[:2]]
    (ranked,) = answer["whipstaff"]["search"]
    assert ranked["scores"] == pytest.approx(sorted(means, reverse=True), abs=1e-3)
    assert (ranked["sequences"], ranked["tokens_computed"]) == (6, sum(len(one["token_ids"]) for one in everybody))
    assert answer["usage"]["completion_tokens"] == sum(len(one["token_ids"]) for one in answer["choices"])
    for ask in (complete, chat):
        chunks = [json.loads(event) for event in data_events(ask(best_of=4, n=2, stream=True, **sampled))[:-1]]
        assert [streamed_text(chunks, index) for index in range(2)] == texts(ask(best_of=4, n=2, **sampled))


def test_who_else_ranks(server: Server, complete: Post, model: Any) -> None:
    sampled = {"temperature": 1.0, "seed": 7, "ignore_eos": True}
    everybody = ok(complete(n=4, explain={"top": 1}, **sampled))["choices"]
    judge = LlamaForCausalLM.from_pretrained(server.models["expert"], dtype=torch.float32).eval()
    head = vector_file.read(server.log.parent / "heads" / "wary.safetensors").shared_parts

    @torch.inference_mode()
    def by_model(prompt: list[int], answer: list[int]) -> float:
        log_p = judge(torch.tensor([[*prompt, *answer]])).logits[0].log_softmax(-1)
        return float(sum(log_p[len(prompt) + i - 1, token] for i, token in enumerate(answer)) / len(answer))

    @torch.inference_mode()
    def by_classifier(prompt: list[int], answer: list[int]) -> float:
        hidden = model.model(torch.tensor([[*prompt, *answer[:-1]]])).last_hidden_state[0, -1]
        return float((head["weight"] @ hidden + head["bias"]).log_softmax(-1)[1])

    prompt = everybody[0]["prompt_token_ids"]
    for own, score in (({"model": "expert"}, by_model), ({"classifier": "wary"}, by_classifier)):
        scores = [score(prompt, one["token_ids"]) for one in everybody]
        answer = ok(complete(decoding={"method": "best_of", "num_candidates": 4, **own}, **sampled))
        assert answer["whipstaff"]["search"][0]["scores"] == pytest.approx(sorted(scores, reverse=True), abs=1e-3)
        (choice,) = answer["choices"]
        assert choice["token_ids"] == everybody[scores.index(max(scores))]["token_ids"] and "explain" not in choice


# ---- what is refused, and what is left behind

REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "room": ({"num_beams": 60}, 422, "num_beams"),
    "answers": ({"num_beams": 2, "n": 3}, 400, "n"),
    "grammar": ({"num_beams": 2, "structured_outputs": {"regex": "[0-9]"}}, 400, "num_beams"),
    "prompt": ({"num_beams": 2, "prompt_logprobs": 1}, 400, "prompt_logprobs"),
    "tree": ({"decoding": {"method": "kcts", "classifier": "wary"}, "logprobs": 1}, 400, "logprobs"),
    "truncation": ({"num_beams": 2, "typical_p": 0.5}, 400, "typical_p"),
    "no budget": ({"decoding": {"method": "opera", "max_time": 0}}, 400, "decoding.max_time"),
    "unstreamed": ({"num_beams": 2, "stream_retractions": "perhaps"}, 400, "stream_retractions"),
    "one candidate": ({"decoding": {"method": "opera", "candidates": 1}}, 400, "decoding.candidates"),
    "beams that draw": ({"decoding": {"method": "opera", "temperature": 0.5}}, 400, "decoding.temperature"),
    "absent adapter": (
        {"decoding": {"method": "kcts", "classifier": "wary", "adapter": "law"}},
        422,
        "decoding.adapter",
    ),
    "no classifier": ({"decoding": {"method": "kcts"}}, 400, "decoding.classifier"),
    "absent classifier": ({"decoding": {"method": "kcts", "classifier": "nobody"}}, 404, "decoding.classifier"),
    "stop": ({"num_beams": 2, "n": 2, "stop": ["a"]}, 400, "stop"),
    "fewer": ({"best_of": 2, "n": 3}, 400, "n"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_name_their_field(complete: Post, name: str) -> None:
    fields, status, param = REFUSED[name]
    assert_refused(complete(**fields), status, param)
    assert_refused(complete(stream=True, **fields), status, param)


def test_a_temperature_is_told_to_do_nothing(complete: Post) -> None:
    answer = complete(num_beams=2, temperature=0.7)
    assert answer.json()["whipstaff"]["warnings"] == ["temperature did nothing: beam_search draws no tokens"]
    assert tokens_of(answer) == tokens_of(complete(num_beams=2))


def test_a_stop_string_cuts_the_answer(complete: Post) -> None:
    """And the receipt says what was computed until then."""
    (whole,) = texts(complete(num_beams=BEAMS))
    answer = ok(complete(num_beams=BEAMS, stop=[whole[4:6]]))
    (choice,), (search,) = answer["choices"], answer["whipstaff"]["search"]
    assert choice["text"] == whole[: whole.index(whole[4:6])]
    assert (search["sequences"], search["ended_by"], search["scores"]) == (BEAMS, "stop", [])
    assert search["tokens_computed"] >= BEAMS * (len(choice["token_ids"]) - 1) > 0
    assert answer["usage"]["completion_tokens_details"]["computed_tokens"] == search["tokens_computed"]


@pytest.mark.parametrize("more", [{}, {"stop": ""}, {"stop_token_ids": []}, {"max_tokens": 1}])
def test_however_a_tree_search_ends_its_tokens_are_explained(complete: Post, more: dict[str, Any]) -> None:
    kcts = {"method": "kcts", "classifier": "wary", "k": 4, "simulations": 6}
    fields = {"decoding": kcts, "max_tokens": 8, "ignore_eos": True, "explain": {"top": 0}}
    whole = ok(complete(**fields))["choices"][0]
    if "stop" in more:
        more = {"stop": [whole["text"][2:4]]}
    if "stop_token_ids" in more:
        more = {"stop_token_ids": [whole["token_ids"][3]], "ignore_eos": False}
    answer = ok(complete(**fields | more))
    (choice,), (search,) = answer["choices"], answer["whipstaff"]["search"]
    assert len(choice["token_ids"]) > 0 and (not more or len(choice["token_ids"]) < len(whole["token_ids"]))
    assert choice["explain"] == whole["explain"][: len(choice["token_ids"])]
    assert search["sequences"] == 1 and search["tokens_computed"] > 0
    chunks = [json.loads(event) for event in data_events(complete(stream=True, **fields | more))[:-1]]
    assert [one for chunk in chunks for part in chunk["choices"] for one in part.get("explain", ())] == choice[
        "explain"
    ]
    assert chunks[-1]["whipstaff"]["search"] == answer["whipstaff"]["search"]


def test_metrics_count_what_a_search_computed(http: httpx.Client, complete: Post) -> None:
    own = "whipstaff_computed_tokens_total", (("method", "opera"),)
    before = metrics(http).get(own, 0)
    answer = ok(complete(decoding=OPERA, max_tokens=24, ignore_eos=True))
    (search,) = answer["whipstaff"]["search"]
    wanted = search["tokens_computed"] + search["tried"]
    assert answer["usage"]["completion_tokens_details"]["computed_tokens"] == wanted > 24 * 2
    poll(http, lambda now: now.get(own, 0) - before >= wanted)
    assert metrics(http)[own] - before == wanted


GUIDED = {"method": "cfg", "guidance_scale": 2.0, "negative_prompt": "import"}
TRYING = {"method": "kwd", "classifier": "wary", "k": 3}
SAMPLED = {"temperature": 1.0, "seed": 5}
ROWS = 1 + 2 * (NUM_TOKENS - 1)  # that a search of two beams decides over
TAKEN: dict[str, tuple[dict[str, Any], str, int, int]] = {  # fields, label, fed and tried for NUM_TOKENS tokens
    "ranked": (SAMPLED | {"best_of": 4}, "best_of", 4 * NUM_TOKENS, 0),
    "ranked of two prompts": (SAMPLED | {"best_of": 4, "decoding": GUIDED}, "several", 4 * 2 * NUM_TOKENS, 0),
    "ranked that try": (SAMPLED | {"best_of": 2, "decoding": TRYING}, "several", 2 * NUM_TOKENS, 2 * 3 * NUM_TOKENS),
    "two prompts": ({"decoding": GUIDED}, "cfg", 2 * NUM_TOKENS, 0),
    "tries": ({"decoding": TRYING, "temperature": 0}, "kwd", NUM_TOKENS, 3 * NUM_TOKENS),
    "unlike": ({"penalty_alpha": 0.6, "top_k": 4, "temperature": 0}, "contrastive_search", NUM_TOKENS, 4 * NUM_TOKENS),
    "beams that try": ({"num_beams": 2, "decoding": TRYING}, "several", ROWS - 1, 3 * ROWS),
}


def has_grown(series: Any, most: float, now: Any) -> bool:
    return bool(now.get(series, 0) >= most)


def generates(before: Any, now: Any) -> bool:
    return vllm(now, "generation_tokens_total") > vllm(before, "generation_tokens_total")


@pytest.mark.parametrize("name", TAKEN)
def test_usage_and_metrics_say_what_answers_take(http: httpx.Client, complete: Post, name: str) -> None:
    """Candidates that nobody gets, further prompts, and tokens that are tried among it; streamed and not."""
    fields, label, fed, tried = TAKEN[name]
    own = "whipstaff_computed_tokens_total", (("method", label),)
    for more in ({}, {"stream": True, "stream_options": {"include_usage": True}}):
        before = metrics(http).get(own, 0)
        answer = complete(ignore_eos=True, **fields, **more)
        told = json.loads(data_events(answer)[-2]) if more else ok(answer)
        usage, searches = told["usage"], told["whipstaff"].get("search", [])
        assert usage["completion_tokens"] == NUM_TOKENS
        assert usage["completion_tokens_details"]["computed_tokens"] == fed + tried
        assert [(one["tokens_computed"], one["tried"]) for one in searches] == [(fed, tried)] * len(searches)
        poll(http, partial(has_grown, own, before + fed + tried))
        assert metrics(http)[own] - before == fed + tried
    assert not ok(complete())["usage"].get("completion_tokens_details")


def test_what_was_computed_for_who_went_away_is_counted(server: Server, http: httpx.Client, complete: Post) -> None:
    """Of candidates nothing is heard before all are there."""
    own = "whipstaff_computed_tokens_total", (("method", "several"),)
    for _ in range(8):  # on a busy machine the answer may be there before its client has gone away
        before = metrics(http)
        with left_alone(server, best_of=4, decoding=GUIDED, temperature=1.0):
            poll(http, partial(generates, before))
        poll(http, is_free)
        now = metrics(http)
        if requests(now, "several", "aborted") > requests(before, "several", "aborted"):
            break
    else:
        raise AssertionError("no client ever went away in time")
    poll(http, lambda now: now.get(own, 0) > before.get(own, 0))


def test_nothing_is_left_of_searches_whose_clients_went_away(
    server: Server, http: httpx.Client, complete: Post
) -> None:
    before = metrics(http)["whipstaff_search_forks_total", ()]
    with left_alone(server, num_beams=BEAMS, max_tokens=300):
        complete(num_beams=BEAMS, ignore_eos=True)
    tokens_of(complete(num_beams=2))
    forks, running, living = (
        (f"whipstaff_{name}", ()) for name in ("search_forks_total", "searches_running", "search_sequences_living")
    )
    poll(http, lambda now: now[forks] > before and not now[running] and not now[living])
