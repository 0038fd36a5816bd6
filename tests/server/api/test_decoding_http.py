"""Decoding methods over HTTP: every one, every way to ask for it, and what it goes together with; what `explain` and
`logprobs_source` say is what plain transformers computes."""

import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from asking import (
    BOTH,
    MOOD,
    PAIR,
    PROMPT,
    TOLERANCE,
    Post,
    assert_refused,
    data_events,
    post_json,
    streamed_text,
    texts,
)
from asking import tokens as tokens_of
from reference import dola, seeded, steered
from reference.decoded import Decoding, Seen
from serving import API_KEY, LAYERS, MODEL, Server
from shared import HEADS, PRESETS, PUSHED
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM

from whipstaff.decoding.companions import CoupledParams
from whipstaff.decoding.methods import METHODS
from whipstaff.steering import vector_file

pytestmark = pytest.mark.engine

NUM_TOKENS, TOP = 12, 3
CO_LLM = {"method": "co_llm", "assistant": "expert", "head": "defer"}
DOLA = {"method": "dola", "layers": [0, 1, 2]}
ENTRIES: dict[str, dict[str, Any]] = {
    "proxy_tuning": PAIR,
    "dexperts": {"method": "dexperts", "expert": "expert", "antiexpert": "anti"},
    "contrastive": {"method": "contrastive", "amateur": "anti"},
    "contrastive_beta": {"method": "contrastive_beta", "amateur": "anti"},
    "adapter_free_ensemble": {"method": "adapter_free_ensemble", "weights": {"expert": 1.0, "anti": 3.0}},
    "dola": DOLA,
    "co_llm": CO_LLM,
    "kwd": {"method": "kwd", "classifier": "judge", "k": 9},
    "rule_adapter": {"method": "rule_adapter"},
    "dry": {"method": "dry", "multiplier": 3.0, "allowed_length": 1, "sequence_breakers": [":", "\n"]},
}
SAMPLED: dict[str, dict[str, Any]] = {
    "adaptive_temperature": {"method": "adaptive_temperature", "head": "tempers", "choose": "sample"},
    "edt": {"method": "edt", "t0": 1.2},
    "dynatemp": {"method": "dynatemp", "range": 0.9, "exponent": 12.0},
    "top_n_sigma": {"method": "top_n_sigma", "n": 1.5},
    "typical_p": {"method": "typical_p", "p": 0.6},
    "top_a": {"method": "top_a", "a": 0.3},
    "epsilon_cutoff": {"method": "epsilon_cutoff", "epsilon": 0.02},
    "eta_cutoff": {"method": "eta_cutoff", "epsilon": 0.02},
    "xtc": {"method": "xtc", "probability": 0.6, "threshold": 0.05},
    "mirostat": {"method": "mirostat", "mode": 2, "tau": 2.0, "eta": 0.3},
}
DRAWN: dict[str, Any] = {"temperature": 1.0, "seed": 5}
SIX = [*(ENTRIES[name] for name in ("proxy_tuning", "rule_adapter", "dry")), SAMPLED["xtc"], SAMPLED["mirostat"]]


@pytest.fixture(scope="module")
def complete(complete: Post) -> Post:
    return partial(complete, ignore_eos=True)


@pytest.fixture(scope="module")
def chat(chat: Post) -> Post:
    return partial(chat, ignore_eos=True)


# ---- the reference: transformers, everything at once


class Reference:
    """What the models say of a text, position by position."""

    def __init__(self, server: Server) -> None:
        self.models = {
            name: LlamaForCausalLM.from_pretrained(server.models[name], dtype=torch.float32).eval()
            for name in ("base", "expert", "anti")
        }
        self.tokenizer = AutoTokenizer.from_pretrained(server.models["base"])
        self.push = vector_file.read(server.log.parent / "vectors" / "push.safetensors")
        files = {name: vector_file.read(server.log.parent / "heads" / f"{name}.safetensors") for name in HEADS}
        self.defer = files["defer"].shared_parts
        self.heads = {
            files[name].method.name: {part: tensor.tolist() for part, tensor in files[name].shared_parts.items()}
            for name in ("defer", "judge", "tempers")
        }

    @torch.inference_mode()
    def streams(self, ids: list[int]) -> dict[str, Tensor]:
        """(T, V) logits by the models' names and early layers' numbers, and the hidden states (T, H)."""
        found = {name: model(torch.tensor([ids])).logits[0] for name, model in self.models.items()}
        base = self.models["base"]
        states = base.model(torch.tensor([ids]), output_hidden_states=True).hidden_states
        early = {str(layer): base.lm_head(states[layer][0]) for layer in range(LAYERS)}
        return {**found, **early, "hidden": states[-1][0]}

    def score(self, context: str, continuation: str, preset: str | None) -> float:
        """The log-probability of a continuation under a preset."""
        ids, start = self.tokenizer.encode(context + continuation), len(self.tokenizer.encode(context))
        seen = self.streams(ids)
        if preset == "mixed":
            edits = [
                steered.Edit(
                    place.site, place.layer, PUSHED["scale"], None, parts["add"], lambda position, prompt_len: True
                )
                for place, parts in self.push.tensors.items()
            ]
            seen["base"] = steered.logits(self.models["base"], ids, 0, edits)
        method = {"mixed": "proxy_tuning", "early": "dola"}.get(preset or "")
        log_p = self.final(method, seen, relative_top=0.0).log_softmax(-1)
        return float(log_p[range(start - 1, len(ids) - 1), ids[start:]].sum())

    def chances(self, seen: dict[str, Tensor]) -> Tensor:
        """(T,) that Co-LLM defers."""
        return (seen["hidden"] @ self.defer["weight"] + self.defer["bias"]).sigmoid()

    def final(self, method: str | None, seen: dict[str, Tensor], relative_top: float = 0.1) -> Tensor:
        """(T, V) what is drawn from."""
        base, expert, anti = (seen[name] for name in ("base", "expert", "anti"))
        if method == "proxy_tuning":
            return base + expert - anti
        if method == "co_llm":
            return torch.where(self.chances(seen)[:, None] > 0.5, expert, base)
        if method == "dola":
            rows = zip(base.tolist(), self.chosen(seen), strict=True)
            early = [(row, seen[str(layer)][position].tolist()) for position, (row, layer) in enumerate(rows)]
            return torch.tensor([dola.rewrite(*pair, relative_top) for pair in early])
        return base

    def chosen(self, seen: dict[str, Tensor]) -> list[int]:
        """DoLa's layer at every position."""
        early = torch.stack([seen[str(layer)] for layer in range(LAYERS)], 1).tolist()
        return [dola.choice(row, layers) for row, layers in zip(seen["base"].tolist(), early, strict=True)]


@pytest.fixture(scope="module")
def reference(server: Server) -> Reference:
    return Reference(server)


def whole_text(response: httpx.Response) -> tuple[list[int], int]:
    """A completion's prompt and answer as tokens, and where the answer begins."""
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    return [*choice["prompt_token_ids"], *choice["token_ids"]], len(choice["prompt_token_ids"])


# ---- ways to ask


def said(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry with all that it leaves to defaults, as receipts show it."""
    return METHODS[entry["method"]].params.model_validate(entry).model_dump(by_alias=True, exclude_none=True)


def test_every_method_of_one_prompt_is_tried_here() -> None:
    alone = {
        name
        for name, method in METHODS.items()
        if method.stage != "search" and not issubclass(method.params, CoupledParams)
    }
    elsewhere = {"forced"}  # test_companions_http.py
    elsewhere |= {"best_of"}  # test_search_http.py, as searches are
    elsewhere |= {"contrastive_search", "opera_lite"}  # test_search_http.py, against their formulas
    assert {*ENTRIES, *SAMPLED} == alone - elsewhere


@pytest.mark.parametrize("name", [*ENTRIES, *SAMPLED])
def test_a_method_answers_the_same_however_it_is_asked_for(complete: Post, chat: Post, name: str) -> None:
    entry, draw = (ENTRIES | SAMPLED)[name], DRAWN if name in SAMPLED else {}
    first = complete(decoding=[entry], **draw)
    assert first.json()["whipstaff"] == {"steering": [], "decoding": [said(entry)], "warnings": []}
    fields = {field: entry[param] for field, param in METHODS[name].shorthands.items() if param in entry}
    ways: list[dict[str, Any]] = [{"decoding": entry}, {"vllm_xargs": {"decoding": json.dumps([entry])}}]
    if fields:
        strings = {field: json.dumps(value) for field, value in fields.items()}
        ways += [fields, {"vllm_xargs": fields}, {"vllm_xargs": strings}]
    for way in ways:
        answer = complete(**draw, **way)
        assert tokens_of(answer) == tokens_of(first), way
        assert answer.json()["whipstaff"] == first.json()["whipstaff"], way
    fields = {"decoding": [entry], "n": 2, **DRAWN}  # vLLM takes no n > 1 at temperature 0
    for ask in (complete, chat):
        many = ask(**fields)
        chunks = [json.loads(event) for event in data_events(ask(stream=True, **fields))[:-1]]
        assert [streamed_text(chunks, index) for index in range(2)] == texts(many)
        assert chunks[-1]["whipstaff"] == many.json()["whipstaff"] == first.json()["whipstaff"]


def test_the_official_client_asks_with_and_without_extra_body(client: openai.OpenAI) -> None:
    ask: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    plain, mixed, short = (
        client.completions.create(**ask, extra_body=extra) for extra in (None, {"decoding": [PAIR]}, {"mirostat": 2})
    )
    assert plain.choices[0].text != mixed.choices[0].text
    assert short.model_extra["whipstaff"]["decoding"][0]["method"] == "mirostat"
    assert "whipstaff" not in (plain.model_extra or {})
    messages: Any = [{"role": "user", "content": "Why?"}]
    body = {"decoding": SIX, "explain": {"top": 1}}
    with client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=NUM_TOKENS, seed=1, stream=True, extra_body=body
    ) as stream:
        chunks = list(stream)
    extra = chunks[-1].model_extra or {}
    assert [entry["method"] for entry in extra["whipstaff"]["decoding"]] == [entry["method"] for entry in SIX]
    records = [one for chunk in chunks for c in chunk.choices for one in (c.model_extra or {}).get("explain", [])]
    assert 0 < len(records) <= NUM_TOKENS


@pytest.mark.parametrize("entries", [[entry] for entry in SAMPLED.values()] + [SIX], ids=[*SAMPLED, "six"])
def test_seeds_repeat_and_choices_differ(complete: Post, entries: list[dict[str, Any]]) -> None:
    fields = {"decoding": entries, "temperature": 1.5, "n": 3}
    first, again, other = (complete(seed=seed, **fields) for seed in (11, 11, 12))
    assert texts(first) == texts(again) != texts(other)
    assert len(set(texts(first))) > 1


@pytest.mark.parametrize("name", [*(name for name in ENTRIES if name not in ("dola", "rule_adapter", "dry")), *SAMPLED])
def test_every_token_is_that_of_a_plain_loop(complete: Post, reference: Reference, name: str) -> None:
    """The best one, or with vLLM's own noise the one that is drawn, of what plain computations make of transformers'
    logits. DoLa has tests of its own here; rules and repetitions go by token in tests/server/engine."""
    entry, draw = (ENTRIES | SAMPLED)[name], DRAWN if name in SAMPLED else {}
    ids, start = whole_text(complete(decoding=[entry], **draw))
    drawn: dict[str, Any] = {"seed": DRAWN["seed"], "temperature": DRAWN["temperature"]} if draw else {}
    one, seen = Decoding([entry], start, reference.heads, **drawn), reference.streams(ids)
    noise = list(seeded.noise("v1", DRAWN["seed"], start, NUM_TOKENS, seen["base"].shape[1]))
    for position, token in enumerate(ids[start:], start):
        others = {model: seen[model][position - 1].tolist() for model in ("expert", "anti")}
        models = Seen(seen["base"][position - 1].tolist(), others, seen["hidden"][position - 1].tolist())
        row = one.row(ids[:position], models)
        scores = torch.tensor(row, dtype=torch.float64) + (noise[position - start] if draw else 0)
        assert scores.max() - scores[token] < TOLERANCE, (position - start, token, scores.topk(3))
        one.note(row, token)


# ---- what goes together


def test_a_grammar_holds_whatever_methods_want(chat: Post, complete: Post) -> None:
    alone = [[entry] for entry in (ENTRIES | SAMPLED).values()]
    for entries in [SIX, *alone]:
        fields = {"decoding": entries, "temperature": 1, "seed": 1, "ignore_eos": False}
        (text,) = texts(chat(response_format=MOOD, max_tokens=120, **fields))
        assert json.loads(text).keys() == {"mood", "sure"}, entries
        (number,) = texts(complete(structured_outputs={"regex": "[0-9]{4}-[0-9]{2}"}, **fields))
        year, month = number.split("-")
        assert (year + month).isdigit() and (len(year), len(month)) == (4, 2), entries


def test_penalties_and_biases_come_after_the_mix_and_the_rules(complete: Post) -> None:
    for entries in (SIX[:2], [DOLA | {"relative_top": 0}], [CO_LLM]):
        free = tokens_of(complete(decoding=entries))
        assert tokens_of(complete(decoding=entries, logit_bias={"77": 1000})) == [77] * NUM_TOKENS
        assert free[0] not in tokens_of(complete(decoding=entries, logit_bias={str(free[0]): -100}))
        once = tokens_of(complete(decoding=entries, frequency_penalty=2, presence_penalty=2, repetition_penalty=5))
        assert len(set(once)) == NUM_TOKENS


def test_steering_and_decoding_are_both_done_and_said(complete: Post) -> None:
    answers = {
        name: complete(decoding=SIX, steering=steering, **DRAWN)
        for name, steering in {
            "both": BOTH["steering"],
            "decoded": None,
            "off": [{"vector": "push", "scale": 0}],
        }.items()
    }
    assert tokens_of(answers["both"]) != tokens_of(answers["decoded"]) == tokens_of(answers["off"])
    receipt = answers["both"].json()["whipstaff"]
    assert receipt["decoding"] == list(map(said, SIX)) and receipt["steering"][0]["edited_tokens"] == NUM_TOKENS


def test_greedy_is_not_truncated_unless_temperature_comes_last(complete: Post) -> None:
    """llama.cpp's order is the latter: what truncation leaves has another best token."""
    plain = tokens_of(complete())
    surely = {"method": "xtc", "probability": 1.0, "threshold": 0.001}
    for entry in (surely, SAMPLED["typical_p"] | {"p": 0.05}):
        assert tokens_of(complete(decoding=entry)) == plain
        assert tokens_of(complete(decoding=entry, temperature_last=True)) != plain
    assert tokens_of(complete(temperature_last=True)) == plain
    assert tokens_of(complete(decoding=SAMPLED["top_a"], temperature_last=True)) == plain
    for flag in (True, "true"):
        last = complete(vllm_xargs={"decoding": json.dumps(surely), "temperature_last": flag})
        assert tokens_of(last) == tokens_of(complete(decoding=surely, temperature_last=True))


# ---- explanations


def assert_seen(said: dict[str, Any], logits: Tensor, token: int) -> None:
    """How a distribution (V,) sees a token."""
    log_p = logits.log_softmax(-1)
    assert said["logprob"] == pytest.approx(log_p[token].item(), abs=TOLERANCE)
    slack = int(((log_p - log_p[token]).abs() < TOLERANCE).sum())
    assert abs(said["rank"] - 1 - int((log_p > log_p[token]).sum())) < slack
    best = [value for value in log_p.topk(TOP).values.tolist() if value > -torch.inf]
    assert [one["logprob"] for one in said["top"]] == pytest.approx(best, abs=TOLERANCE)
    assert all(one["logprob"] == pytest.approx(log_p[one["id"]].item(), abs=TOLERANCE) for one in said["top"])


@pytest.mark.parametrize("name", [None, "proxy_tuning", "dola", "co_llm"])
def test_explanations_are_what_transformers_computes(complete: Post, reference: Reference, name: str | None) -> None:
    entries = [ENTRIES[name]] if name else []
    answer = complete(decoding=entries, explain={"top": TOP}, temperature=0.7, seed=3)
    ids, start = whole_text(answer)
    records = answer.json()["choices"][0]["explain"]
    assert [record["id"] for record in records] == ids[start:]
    seen = reference.streams(ids)
    final = reference.final(name, seen)
    for position, record in enumerate(records, start - 1):
        token = ids[position + 1]
        assert_seen(record["base"], seen["base"][position], token)
        assert_seen(record["final"], final[position], token)
        log_p, log_q = final[position].log_softmax(-1), seen["base"][position].log_softmax(-1)
        kl = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0).sum()
        assert record["kl"] == pytest.approx(kl.item(), abs=TOLERANCE)
        layers = [f"layer {layer}" for layer in DOLA["layers"]]
        named = {"proxy_tuning": ["expert", "anti"], "co_llm": ["expert"], "dola": layers}.get(name or "", [])
        assert list(record["streams"]) == named
        for stream in named:
            assert_seen(record["streams"][stream], seen[stream.removeprefix("layer ")][position], token)
        facts = record["facts"]
        assert facts.keys() == {"dola": {"layer"}, "co_llm": {"defer_probability"}}.get(name or "", set())
        if name == "dola":
            assert facts["layer"] == reference.chosen(seen)[position]
        if name == "co_llm":
            assert facts["defer_probability"] == pytest.approx(reference.chances(seen)[position].item(), abs=1e-4)
    if name is None:
        assert all(record["kl"] == 0 for record in records)


@pytest.mark.parametrize("endpoint", ["complete", "chat"])
def test_explanations_stream_with_their_tokens(request: pytest.FixtureRequest, endpoint: str) -> None:
    ask = request.getfixturevalue(endpoint)
    fields = {"decoding": SIX, "explain": {"top": TOP}, "n": 2, "return_token_ids": True, **DRAWN}
    whole = [choice["explain"] for choice in ask(**fields).json()["choices"]]
    chunks = [json.loads(event) for event in data_events(ask(stream=True, **fields))[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    for index in range(2):
        mine = [choice for choice in choices if choice["index"] == index]
        assert [record for choice in mine for record in choice.get("explain", [])] == whole[index]
        for choice in mine:
            assert [record["id"] for record in choice.get("explain", [])] == (choice.get("token_ids") or [])


def test_explanations_follow_every_prompt_and_choice(complete: Post) -> None:
    answer = complete([PROMPT, "import os"], decoding=[PAIR], explain={"top": 0}, n=2, temperature=1, seed=2)
    for choice in answer.json()["choices"]:
        assert [record["id"] for record in choice["explain"]] == choice["token_ids"]
        assert all(record["final"]["top"] == [] for record in choice["explain"])


def test_nobody_pays_who_does_not_ask(complete: Post, chat: Post) -> None:
    for answer in (complete(decoding=SIX, **DRAWN), complete(), chat(decoding=[PAIR])):
        assert all("explain" not in choice for choice in answer.json()["choices"])
    explained = complete(decoding=SIX, explain={}, **DRAWN)
    assert tokens_of(explained) == tokens_of(complete(decoding=SIX, **DRAWN))
    only = complete(decoding=ENTRIES["contrastive"] | {"alpha": 1}, explain={"top": 3}).json()["choices"][0]["explain"]
    assert all(len(record["final"]["top"]) == 1 and len(record["base"]["top"]) == 3 for record in only)
    assert len(explained.json()["choices"][0]["explain"][0]["base"]["top"]) == 5


# ---- log-probabilities


@pytest.mark.parametrize("name", [None, "proxy_tuning", "dola", "co_llm"])
@pytest.mark.parametrize("source", ["final", "base"])
def test_log_probabilities_come_from_where_they_are_asked_from(
    complete: Post, reference: Reference, source: str, name: str | None
) -> None:
    """Those of the prompt too, which is what scores answers under a method."""
    entry = ENTRIES[name] | ({"relative_top": 0} if name == "dola" else {}) if name else None
    prompt = "import os, sys, re, json # of many tokens, so that they come in chunks: " * 2
    answer = complete(prompt, decoding=entry, logprobs_source=source, logprobs=1, echo=True, seed=1, temperature=0.5)
    ids, _ = whole_text(answer)
    seen = reference.streams(ids)
    final = seen["base"] if source == "base" else reference.final(name, seen, relative_top=0.0)
    said = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    expected = final.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]
    assert said[0] is None and said[1:] == pytest.approx(expected.tolist(), abs=2 * TOLERANCE)


def test_both_sources_are_the_log_probabilities_and_the_explanations(complete: Post) -> None:
    fields = {"decoding": [PAIR], "logprobs": 1}
    both, final, base = (complete(**fields, logprobs_source=source) for source in ("both", "final", "base"))
    assert tokens_of(both) == tokens_of(final) == tokens_of(base)
    said = [one.json()["choices"][0]["logprobs"]["token_logprobs"] for one in (both, final, base)]
    assert said[0] == said[1] != said[2]
    records = both.json()["choices"][0]["explain"]
    assert [record["final"]["logprob"] for record in records] == pytest.approx(said[1], abs=1e-5)
    assert [record["base"]["logprob"] for record in records] == pytest.approx(said[2], abs=1e-5)


# ---- what the server says of itself


def test_methods_are_listed_with_what_they_can_name(http: httpx.Client) -> None:
    rows = {row["name"]: row for row in http.get("/v1/steering/methods").json()["data"]}
    for name in ENTRIES | SAMPLED:
        row, method = rows[name], METHODS[name]
        assert (row["available"], row["reason"], row["kind"]) == (True, None, method.stage), name
        assert row["shorthands"] == method.shorthands and set(row["defaults"]) <= set(row["schema"]["properties"])
        for param in method.stream_fields:
            assert row["schema"]["properties"][param]["enum"] == ["expert", "anti", "short"]
    heads = {name: rows[name]["schema"]["properties"] for name in ("co_llm", "kwd", "adaptive_temperature")}
    assert heads["co_llm"]["head"]["enum"] == ["defer"] and heads["adaptive_temperature"]["head"]["enum"] == ["tempers"]
    assert heads["kwd"]["classifier"]["enum"] == ["judge", "wary"]  # not the one that knows another vocabulary


def test_validate_says_what_a_request_would_do(http: httpx.Client) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "decoding": [DOLA | {"layers": "low"}, *SIX[1:]], "explain": {"top": 2}}
    answer = post_json(http, "/v1/steering/validate", body).json()
    assert answer["valid"] and answer["plan"]["decoding"] == [said(DOLA) | {"layers": [0]}, *map(said, SIX[1:])]
    refused = post_json(http, "/v1/steering/validate", body | {"temperature": 0, "edt": {}, "decoding": SAMPLED["edt"]})
    assert_refused(refused, 400, "decoding.method")


# ---- bad input

BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "model not loaded": ({"decoding": [CO_LLM | {"assistant": "absent"}]}, 404, "decoding[0].assistant"),
    "a model of weights": (
        {"decoding": {"method": "adapter_free_ensemble", "weights": {"expert": 1, "absent": 1}}},
        404,
        "decoding.weights.absent",
    ),
    "head not loaded": ({"decoding": CO_LLM | {"head": "absent"}}, 404, "decoding.head"),
    "a vector as head": ({"decoding": CO_LLM | {"head": "push"}}, 400, "decoding.head"),
    "another head": ({"decoding": ENTRIES["kwd"] | {"classifier": "tempers"}}, 400, "decoding.classifier"),
    "another vocabulary": ({"decoding": ENTRIES["kwd"] | {"classifier": "narrow"}}, 409, "decoding.classifier"),
    "head as vector": ({"steering": [{"vector": "judge"}]}, 400, "steering[0].vector"),
    "layer out of range": ({"decoding": [DOLA | {"layers": [0, LAYERS]}]}, 400, "decoding[0].layers"),
    "layer below zero": ({"decoding": [DOLA | {"layers": [0, -1]}]}, 400, "decoding[0].layers[1]"),
    "no layers": ({"dola_layers": []}, 400, "dola_layers"),
    "layers in words": ({"dola_layers": "middle"}, 400, "dola_layers"),
    "layer by shorthand": ({"dola_layers": [LAYERS]}, 400, "dola_layers"),
    "alpha": ({"decoding": ENTRIES["contrastive"] | {"alpha": 1.5}}, 400, "decoding.alpha"),
    "beta": ({"decoding": [ENTRIES["contrastive_beta"] | {"beta": -0.1}]}, 400, "decoding[0].beta"),
    "no weight": (
        {"decoding": {"method": "adapter_free_ensemble", "weights": {"expert": 0}}},
        400,
        "decoding.weights",
    ),
    "nobody steers": ({"decoding": {"method": "dexperts"}}, 400, "decoding.expert"),
    "two mixes": ({"decoding": [PAIR, ENTRIES["contrastive"]]}, 400, "decoding[1].method"),
    "a mask beside a mix": ({"decoding": [ENTRIES["dexperts"], PAIR]}, 400, "decoding[1].method"),
    "twice": ({"decoding": [ENTRIES["dry"], PAIR, ENTRIES["dry"]]}, 400, "decoding[2]"),
    "twice, once short": ({"decoding": [ENTRIES["dry"]], "dry_multiplier": 2}, 400, "dry_multiplier"),
    "two temperatures": ({"decoding": SAMPLED["edt"], "dynatemp_range": 0.1}, 400, "dynatemp_range"),
    "greedy and a temperature": (
        {"decoding": [SAMPLED["adaptive_temperature"]], "temperature": 0},
        400,
        "decoding[0].method",
    ),
    "greedy and edt": ({"decoding": [PAIR, SAMPLED["edt"]], "temperature": 0}, 400, "decoding[1].method"),
    "explain too large": ({"explain": {"top": 21}}, 400, "explain.top"),
    "explain below zero": ({"explain": {"top": -1}}, 400, "explain.top"),
    "explain more": ({"explain": {"top": 1, "bottom": 1}}, 400, "explain.bottom"),
    "explain what": ({"explain": {"unsteered": "who"}}, 400, "explain.unsteered"),
    "explain everything": ({"explain": True}, 400, "explain"),
    "explain no JSON": ({"explain": "{"}, 400, "explain"),
    "log-probabilities from elsewhere": ({"logprobs_source": "expert"}, 400, "logprobs_source"),
    "both of a prompt": (
        {"decoding": PAIR, "logprobs_source": "both", "echo": True, "logprobs": 1},
        400,
        "logprobs_source",
    ),
    "temperature now and then": ({"temperature_last": "sometimes"}, 400, "temperature_last"),
    "unknown key": ({"decoding": [ENTRIES["dry"] | {"length": 3}]}, 400, "decoding[0].length"),
    "no number": ({"decoding": [SAMPLED["typical_p"] | {"p": math.nan}]}, 400, "decoding[0].p"),
    "no number, short": ({"xtc_probability": math.nan}, 400, "xtc_probability"),
    "nothing typical": ({"typical_p": 0}, 400, "typical_p"),
    "mirostat 1": ({"mirostat": 1}, 400, "mirostat"),
    "a method by number": ({"decoding": [{"method": 3}]}, 400, "decoding[0].method"),
    "too many": ({"decoding": [PAIR] * 9}, 400, "decoding"),
    "short in words": ({"vllm_xargs": {"dry_multiplier": "much"}}, 400, "vllm_xargs.dry_multiplier"),
}


@pytest.fixture(scope="module")
def plain_tokens(complete: Post) -> list[int]:
    return tokens_of(complete())


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_before_anything_is_scheduled(
    complete: Post, chat: Post, plain_tokens: list[int], case: str
) -> None:
    fields, status, param = BAD[case]
    fields = {"temperature": 1.0, **fields}
    assert_refused(complete(**fields), status, param)
    assert_refused(complete(stream=True, **fields), status, param)
    if "echo" not in fields:
        assert_refused(chat(**fields), status, param)
    assert tokens_of(complete()) == plain_tokens


def test_a_refusal_says_which_flag_would_help(complete: Post) -> None:
    def message(**fields: Any) -> str:
        found: str = complete(**fields).json()["error"]["message"]
        return found

    assert "--vectors" in message(decoding=CO_LLM | {"head": "absent"})
    assert "--aux" in message(decoding=CO_LLM | {"assistant": "absent"})


# ---- lm_eval, as people run it: a preset is a model of its own

QUESTIONS = [
    {
        "question": "To read a file in Python one calls",
        "choices": ["open(path)", "self.close()", "import os"],
        "answer": 0,
    },
    {"question": "for line in lines:", "choices": ["print(line)", "def main", "raise"], "answer": 0},
    {"question": "import os, sys,", "choices": ["return None", "re", "class A:"], "answer": 1},
    {"question": "try:\n    main()\nexcept", "choices": ["while", "[0]", "ValueError:"], "answer": 2},
    {"question": "if x is not None: return", "choices": ["x", "elif", "yield from"], "answer": 0},
]
TASK = {
    "task": "lines",
    "dataset_path": "json",
    "output_type": "multiple_choice",
    "test_split": "test",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
}


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_lm_eval_scores_as_transformers_does(
    server: Server, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str | None
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("OPENAI_API_KEY", API_KEY)
    from lm_eval.evaluator import evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    (tmp_path / "lines.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    data = {"data_files": {"test": str(tmp_path / "lines.jsonl")}, "cache_dir": str(tmp_path)}
    model = LocalCompletionsAPI(
        model=f"{MODEL}@{preset}" if preset else MODEL,
        base_url=f"{server.url}/v1/completions",
        tokenizer=server.models["base"],
        tokenizer_backend="huggingface",
    )
    task = TaskManager(include_defaults=False).load([TASK | {"dataset_kwargs": data}])["tasks"]
    found = evaluate(model, task, bootstrap_iters=0, log_samples=True)
    right = 0
    for sample in found["samples"]["lines"]:
        said = [response[0][0] for response in sample["resps"]]
        expected = [reference.score(context, answer, preset) for context, answer in sample["arguments"]]
        assert said == pytest.approx(expected, abs=0.02)
        right += expected.index(max(expected)) == sample["target"]
    assert found["results"]["lines"]["acc,none"] == right / len(QUESTIONS)
