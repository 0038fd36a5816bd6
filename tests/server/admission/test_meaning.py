"""What fields of requests mean, without an engine: who is to blame, what is given twice, what a bias does to masks."""

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from catalogues import check, compiled, refusal
from serving import make_tokenizer
from torch import Tensor
from vllm.entrypoints.openai.completion.protocol import CompletionResponseStreamChoice
from vllm.logprobs import Logprob

from whipstaff.server.admission.fields import check_characters, fields_of
from whipstaff.server.admission.prepare import compile_request
from whipstaff.server.admission.receipt import receipt as receipt_of
from whipstaff.server.engine.frontend.openai import ServingCompletion
from whipstaff.server.engine.frontend.requests import ChatRequest, TextRequest, check_something_is_left
from whipstaff.server.engine.worker.logits.metadata import Biased
from whipstaff.server.engine.worker.logits.pipeline import _lift
from whipstaff.server.errors import BadRequest, NotFound, naming_prompt
from whipstaff.server.registry.capabilities import Capabilities

CALM = {"vector": "calm"}
OUT = -torch.inf

SAID: dict[str, tuple[dict[str, Any], str, str]] = {
    "a name": ({"steering": "calm"}, "steering", 'write {"vector": "calm"}'),
    "a name in a list": ({"steering": [CALM, "calm"]}, "steering[1]", 'write {"vector": "calm"}'),
    "a name in JSON": ({"steering": '"calm"'}, "steering", 'write {"vector": "calm"}'),
    "a number": ({"steering": 3}, "steering", 'write {"vector": "NAME"}'),
    "a method": ({"decoding": "dola"}, "decoding", 'write {"method": "dola"}'),
    "methods": ({"decoding": ["dola"]}, "decoding[0]", 'write {"method": "dola"}'),
    "half of JSON": ({"steering": '{"vector": '}, "steering", "not JSON"),
    "where": ({"steering": {**CALM, "where": "here"}}, "steering.where", "generation, middle, messages, tokens, excl"),
    "scale twice": ({"steering": {**CALM, "scale": 1, "coefficient": 2}}, "steering.coefficient", "as 'scale'"),
    "strength twice": ({"steering": {**CALM, "scale": 1, "strength": 1}}, "steering.strength", "as 'scale'"),
    "two others": ({"steering": [{**CALM, "coefficient": 1, "strength": 1}]}, "steering[0].coefficient", "'strength'"),
    "from twice": ({"decoding": {"method": "cfg", "from": 1, "start": 1}}, "decoding.from", "as 'start'"),
    "a token": ({"steering": {**CALM, "where": {"tokens": [3, 512]}}}, "steering.where.tokens[1]", "512"),
    "excluded": (
        {"steering": {**CALM, "where": {"prompt": "all", "exclude": {"tokens": [900]}}}},
        "steering.where.exclude.tokens[0]",
        "900",
    ),
    "half a character": ({"steering": '{"vector": "\\ud83d"}'}, "steering.vector", "surrogate"),
}  # fmt: skip


@pytest.mark.parametrize("name", SAID)
def test_errors_say_what_to_write_and_where(caps: Capabilities, name: str) -> None:
    fields, param, said = SAID[name]
    error = refusal(caps, **fields)
    assert (error.status, error.param) == (400, param), error.message
    assert said in error.message


def test_one_name_is_enough(caps: Capabilities) -> None:
    for name in ("scale", "strength", "coefficient"):
        assert receipt_of(compiled(caps, steering={**CALM, name: 2}))["steering"][0]["scale"] == 2


def test_scoring_alone_feeds_every_token_of_the_prompt(caps: Capabilities) -> None:
    """The one token that vLLM generates all the same is not fed."""
    for where in ("all", "last_prompt", "each_last"):
        assert check(compiled(caps, steering={**CALM, "where": where}), 1, max_tokens=1) == 1
    with pytest.raises(BadRequest, match="selects no token"):
        check(compiled(caps, steering={**CALM, "where": "generation"}), 1, max_tokens=1)


def test_errors_of_a_batch_name_the_prompt() -> None:
    for number, told in ((1, "no"), (3, "prompt[2]: no")):
        with pytest.raises(NotFound) as caught, naming_prompt(2, number):
            raise NotFound("no", "steering.vector")
        assert (caught.value.message, caught.value.param) == (told, "steering.vector")


# ---- both protocols

CHAT = {"messages": [{"role": "user", "content": "Why?"}]}
TEXT = {"prompt": "Why?"}
SCORES = [  # protocol, its fields, whether the prompt's log-probabilities are asked for
    (TextRequest, {**TEXT, "echo": True}, False),
    (TextRequest, {**TEXT, "echo": True, "logprobs": 0}, True),
    (TextRequest, {**TEXT, "logprobs": 1}, False),
    (TextRequest, {**TEXT, "prompt_logprobs": 0}, True),
    (ChatRequest, {**CHAT, "echo": True}, False),
    (ChatRequest, {**CHAT, "echo": True, "logprobs": False}, False),
    (ChatRequest, {**CHAT, "echo": True, "logprobs": None}, False),
    (ChatRequest, {**CHAT, "echo": True, "logprobs": True, "top_logprobs": 2}, False),
    (ChatRequest, {**CHAT, "prompt_logprobs": 0}, True),
]


@pytest.mark.parametrize(("model", "fields", "is_scored"), SCORES)
def test_what_asks_for_scores_of_a_prompt(
    caps: Capabilities, model: Any, fields: dict[str, Any], is_scored: bool
) -> None:
    request = model.model_validate({"model": "m", **fields, "guidance_scale": 2})
    assert request.scores_prompt == is_scored
    if is_scored:
        with pytest.raises(BadRequest, match="forced"):
            compile_request(request, caps, fields_of(request))
        return
    made = compile_request(request, caps, fields_of(request))
    assert made is not None and not made.scores_prompts
    request.attach(made)
    assert request.to_sampling_params(4, {}).prompt_logprobs is None
    is_told = model is ChatRequest and request.logprobs
    assert bool(made.warnings) == bool(is_told)


@pytest.mark.parametrize(("model", "fields"), [(TextRequest, TEXT), (ChatRequest, CHAT)])
def test_a_grammar_is_one_on_both_protocols(caps: Capabilities, model: Any, fields: dict[str, Any]) -> None:
    made = compiled(caps, steering=CALM)
    request = model.model_validate({"model": "m", **fields, "structured_outputs": {"choice": ["a"]}})
    request.attach(made)
    assert request.to_sampling_params(4, {}).structured_outputs is not None


# ---- what is left to say


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"allowed_token_ids": [5], "words": [[5]]}, "bad_words"),
        ({"allowed_token_ids": [5, 6], "words": [[5], [6]]}, "bad_words"),
        ({"allowed_token_ids": [1], "min_tokens": 1}, "min_tokens"),
        ({"allowed_token_ids": [1, 5], "words": [[5]], "min_tokens": 1}, "min_tokens"),
        ({"allowed_token_ids": [5], "words": [[5, 5]]}, None),  # it may be said once
        ({"allowed_token_ids": [5, 6], "words": [[5]]}, None),
        ({"allowed_token_ids": [1]}, None),
        ({"words": [[5]]}, None),
    ],
)
def test_bans_leave_something(fields: dict[str, Any], param: str | None) -> None:
    words = fields.pop("words", None)
    params = TextRequest.model_validate({"model": "m", **TEXT, "max_tokens": 4, **fields}).to_sampling_params(4, {})
    params._bad_words_token_ids = words
    params._all_stop_token_ids = {1}
    if param is None:
        check_something_is_left(params)
        return
    with pytest.raises(BadRequest) as caught:
        check_something_is_left(params)
    assert caught.value.param == param


def lifted(kept: list[float], own: list[float], bias: dict[int, float]) -> Tensor:
    decoded, logits = torch.tensor([[9.0] * len(own), kept]), torch.tensor([[1.0] * len(own), own])
    which, tokens, values = (
        torch.zeros(len(bias), dtype=torch.int64),
        torch.tensor(list(bias)),
        list(map(float, bias.values())),
    )
    _lift(decoded, logits, Biased(torch.tensor([1]), which, tokens, torch.tensor(values)))
    assert (decoded[0] == 9).all()
    return decoded[1]


def test_a_bias_bans_what_a_mask_leaves() -> None:
    """What comes instead has the model's own order, and its distances."""
    found = lifted([4.0, OUT, OUT, OUT], [3.0, 2.0, 1.5, OUT], {0: -100})
    assert torch.equal(found, torch.tensor([4.0, 3.0, 2.5, OUT]))
    some = lifted([4.0, 1.0, OUT, OUT], [3.0, 2.0, 1.5, OUT], {0: -100})
    assert torch.equal(some, torch.tensor([4.0, 1.0, OUT, OUT]))  # another is left


def test_a_bias_forces_what_a_mask_excludes() -> None:
    found = lifted([4.0, OUT, OUT], [3.0, 2.0, -60.0], {2: 100})
    assert torch.equal(found, torch.tensor([4.0, OUT, -59.0])) and found[2] + 100 > found[0]
    assert torch.equal(lifted([4.0, OUT, OUT], [3.0, 2.0, 1.0], {2: 1.5}), torch.tensor([4.0, OUT, OUT]))
    assert torch.equal(lifted([4.0, OUT, OUT], [3.0, 2.0, 1.0], {2: 100, 1: 100}), torch.tensor([4.0, 3.0, 2.0]))


def test_a_bias_of_others_lifts_nothing() -> None:
    """Not even what the model likes best, where a mask goes by another model."""
    kept = [OUT, 4.0, OUT]
    assert torch.equal(lifted(kept, [3.0, 2.0, 1.0], {2: 0.5}), torch.tensor(kept))
    assert torch.equal(lifted(kept, [3.0, 2.0, 1.0], {1: 5.0}), torch.tensor(kept))


# ---- text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"stop": ["a", "\ud83d"]}, "stop[1]"),
        ({"messages": [{"content": "\udc00"}]}, "messages[0].content"),
        ({"a": {"b\ud800": 1}}, "a"),
        ({"\ud800": 1}, None),
        ("\ud800", None),
    ],
)
def test_half_a_character_is_found(body: Any, param: str | None) -> None:
    with pytest.raises(BadRequest) as caught:
        check_characters(body)
    assert caught.value.param == param


def test_whole_characters_pass() -> None:
    check_characters({"a": ["\U0001f600", "\ud7ff\ue000", {"b": None}], "c": 1.5})


def test_text_offsets_are_those_of_the_text_from_chunk_to_chunk() -> None:
    """However tokens are told: vLLM goes on from the length of the last one's name."""
    tokenizer = make_tokenizer()
    ids = tokenizer.encode("import os, sys and more")
    texts = [tokenizer.decode(token) for token in ids]
    serving: Any = ServingCompletion.__new__(ServingCompletion)
    serving.return_tokens_as_token_ids, serving.renderer = False, SimpleNamespace(tokenizer=tokenizer)
    offset = 0
    told: list[Any] = []
    found: list[Any] = []
    for first in range(0, len(ids), 2):
        chunk, names = ids[first : first + 2], texts[first : first + 2]
        scores = [{token: Logprob(-1.0, 1, text)} if first else None for token, text in zip(chunk, names, strict=True)]
        said = serving._create_completion_logprobs(
            token_ids=chunk,
            top_logprobs=scores,
            num_output_top_logprobs=0,
            tokenizer=tokenizer,
            initial_text_offset=offset,
            return_as_token_id=True,
        )
        offset = said.text_offset[-1] + len(said.tokens[-1])
        choice = CompletionResponseStreamChoice(index=0, text="", logprobs=said)
        sent = json.loads(choice.model_dump_json())["logprobs"]
        assert sent == choice.model_dump()["logprobs"]
        told, found = told + sent["tokens"], found + sent["text_offset"]
    assert told == [f"token_id:{token}" for token in ids]
    assert found == [len("".join(texts[:index])) for index in range(len(ids))]
