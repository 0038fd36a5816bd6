"""A server that looks ahead, over HTTP: what its classifier chooses is what plain transformers computes by feeding all
candidates; and what it cannot do is refused by the field's name."""

import json
from functools import partial
from typing import Any

import httpx
import pytest
import torch
from asking import PAIR, Post, assert_refused, data_events, streamed_text, texts
from asking import tokens as tokens_of
from reference import kwd as reference
from serving import LAYERS, Server
from transformers import LlamaForCausalLM

from whipstaff.steering import vector_file

from .test_decoding_http import whole_text

pytestmark = pytest.mark.engine

NUM_TOKENS, K = 16, 6
KWD = {"method": "kwd", "classifier": "wary", "k": K}


@pytest.fixture(scope="module")
def complete(complete: Post) -> Post:
    return partial(complete, ignore_eos=True, max_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def chat(chat: Post) -> Post:
    return partial(chat, ignore_eos=True, max_tokens=NUM_TOKENS)


@torch.inference_mode()
def test_tokens_and_their_log_probabilities_are_those_of_a_loop(server: Server, complete: Post) -> None:
    model = LlamaForCausalLM.from_pretrained(server.models["base"], dtype=torch.float32).eval()
    head = vector_file.read(server.log.parent / "heads" / "wary.safetensors").shared_parts
    answer = complete(decoding=KWD, logprobs=1, explain={"top": 0})
    ids, start = whole_text(answer)
    assert ids[start:] != tokens_of(complete())
    said = answer.json()["choices"][0]["logprobs"]["token_logprobs"]
    for position in range(start, len(ids)):

        def judge(token: int, before: int = position) -> float:
            hidden = model.model(torch.tensor([[*ids[:before], token]])).last_hidden_state[0, -1]
            return float((head["weight"] @ hidden + head["bias"]).softmax(-1)[1])

        row = model(torch.tensor([ids[:position]])).logits[0, -1].tolist()
        scores = torch.tensor(reference.rewrite_ahead(row, judge, K))
        assert ids[position] == int(scores.argmax())
        worth = answer.json()["choices"][0]["explain"][position - start]["facts"]["classifier"]
        assert worth == pytest.approx(judge(ids[position]), abs=1e-4)
        assert said[position - start] == pytest.approx(float(scores.log_softmax(-1)[ids[position]]), abs=1e-3)
    assert answer.json()["whipstaff"]["decoding"] == [KWD]


def test_it_goes_together_with_the_rest(complete: Post, chat: Post) -> None:
    """Seeds, several answers, streams, steering, conditions, mixes, further prompts, grammars; and others beside it."""
    fields = {"decoding": [KWD], "n": 2, "temperature": 1.0, "seed": 5}
    for ask in (complete, chat):
        many = ask(**fields)
        chunks = [json.loads(event) for event in data_events(ask(stream=True, **fields))[:-1]]
        assert [streamed_text(chunks, index) for index in range(2)] == texts(many)
    alone = tokens_of(complete(decoding=KWD))
    push = {"vector": "push", "scale": 0.5, "where": "all"}
    when = {"probe": "probe", "above": 0.0, "decide": "step"}
    others: list[dict[str, Any]] = [
        {"steering": push},
        {"steering": push | {"when": when, "layers": [1, 2]}},
        {"steering": push | {"schedule": {"shape": "linear", "tokens": 4}}},
        {"decoding": [PAIR, KWD]},
        {"decoding": [{"method": "cfg", "guidance_scale": 2.0, "negative_prompt": "import"}, KWD]},
        {"decoding": [{"method": "dola", "layers": [0, LAYERS - 1]}, KWD]},
        {"logprobs_source": "base", "echo": True, "logprobs": 1},
    ]
    found = [tokens_of(complete(**{"decoding": KWD} | fields)) for fields in others]
    assert [tokens == alone for tokens in found] == [False] * (len(others) - 1) + [True]
    (number,) = texts(complete(decoding=KWD, structured_outputs={"regex": "[0-9]{4}"}, ignore_eos=False))
    assert number.isdigit() and len(number) == 4
    assert tokens_of(complete(decoding=KWD)) == alone


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"decoding": [KWD], "echo": True, "logprobs": 1}, "decoding[0].classifier"),
        ({"decoding": KWD, "prompt_logprobs": 1}, "decoding.classifier"),
        (
            {"decoding": KWD, "steering": {"vector": "push", "schedule": {"shape": "entropy", "low": 1, "high": 2}}},
            "steering.schedule",
        ),
        ({"decoding": KWD | {"classifier": "tempers"}}, "decoding.classifier"),
        ({"decoding": KWD | {"k": 0}}, "decoding.k"),
        ({"steering": {"vector": "wary"}}, "steering.vector"),
    ],
)
def test_what_cannot_be_done_is_refused(complete: Post, fields: dict[str, Any], param: str) -> None:
    assert_refused(complete(**fields), 400, param)


def test_both_kinds_of_classifiers_are_listed(http: httpx.Client) -> None:
    (row,) = (one for one in http.get("/v1/steering/methods").json()["data"] if one["name"] == "kwd")
    assert row["available"] and row["schema"]["properties"]["classifier"]["enum"] == ["judge", "wary"]
