"""Requests of the Responses API: what admission and presets find in them, and by what they are drawn; without an
engine."""

import asyncio
from collections.abc import AsyncGenerator
from typing import Any, cast

import pytest
from vllm.exceptions import GenerationError

from whipstaff.server.admission.prepare import prepare
from whipstaff.server.engine.frontend import responses
from whipstaff.server.engine.frontend.launch import Bill
from whipstaff.server.engine.frontend.responses import ResponseRequest, ServingResponses
from whipstaff.server.errors import BadRequest, Unavailable, WhipstaffError, calling
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset

CALM = {"vector": "calm", "where": "all"}
SYSTEM = {"role": "system", "content": "Be calm."}
ASKED = [{"role": "user", "content": "Why?"}]
SEARCHES = {"type": "web_search_preview"}
FUNCTION = {"type": "function", "name": "look", "parameters": {}, "strict": False}


def request_of(**fields: Any) -> ResponseRequest:
    made: ResponseRequest = ResponseRequest.model_validate({"model": "base", "input": "Why?"} | fields)
    return made


class Harmony:
    """A serving of gpt-oss, or of another model."""

    def __init__(self, use_harmony: bool) -> None:
        self.use_harmony = use_harmony


def test_it_is_drawn_by_what_it_says_and_by_its_plan(caps: Capabilities) -> None:
    said = {"min_tokens": 2, "bad_words": ["x"], "allowed_token_ids": [3, 4], "ignore_eos": True}
    request = request_of(steering=CALM, temperature=3, min_p=0.1, max_output_tokens=7, **said)
    compiled = prepare(request, caps)
    assert compiled is not None and request.explicit_max_tokens == 7
    request.attach(compiled)
    request.placed.append(compiled.at_prompt(Prompt(5, list(range(5)), 50, None), lambda _: 7, True))
    params = request.to_sampling_params(9, {})
    assert {name: getattr(params, name) for name in said} == said
    assert (params.max_tokens, params.n, params.temperature) == (7, 1, 1)  # the plan has the temperature
    assert (params.extra_args or {})["whipstaff"]["steering"]
    assert request.temperature == 3


def test_the_best_of_several_are_all_drawn(early: Capabilities) -> None:
    request = request_of(best_of=4, temperature=1)
    compiled = prepare(request, early)
    assert compiled is not None
    request.attach(compiled)
    assert request.to_sampling_params(9, {}).n == 4 and request.n is None


def test_fields_that_it_has_not_are_told_of(nothing: Capabilities) -> None:
    request = request_of(max_tokens=5, use_beam_search=True, messages=ASKED, temprature=1, safety_identifier="me")
    assert request.unknown_names == ["max_tokens", "use_beam_search", "messages", "temprature"]
    compiled = prepare(request, nothing)
    assert compiled is not None and "did you mean max_output_tokens?" in compiled.warnings[0]
    assert request.explicit_max_tokens is None and not request.use_beam_search
    assert request.names == {} and request_of().names["max_tokens"] == "max_output_tokens"


@pytest.mark.parametrize(
    ("fields", "is_grammar"),
    [
        ({}, False),
        ({"text": {"format": {"type": "text"}}}, False),
        ({"text": {"format": {"type": "json_object"}}}, True),
        ({"structured_outputs": {"choice": ["a", "b"]}}, True),
    ],
)
def test_whether_a_grammar_binds_it(fields: dict[str, Any], is_grammar: bool) -> None:
    assert request_of(**fields).has_grammar == is_grammar


@pytest.mark.parametrize("asked", ["Why?", ASKED])
def test_a_preset_leads_what_it_asks(asked: Any) -> None:
    preset = Preset.of("calm", {"default": {"system": "Be calm.", "max_tokens": 5, "min_tokens": 1}})
    request = request_of(input=asked)
    assert preset.fill(request, request.sent({"input": asked})) == {"max_tokens", "min_tokens"}
    assert request.input == [SYSTEM, *ASKED] and request.instructions is None
    assert (request.max_output_tokens, request.min_tokens) == (5, 1)


def test_its_own_instructions_come_before_a_presets_default() -> None:
    preset = Preset.of("calm", {"default": {"system": "Be calm.", "max_tokens": 5}})
    fields = {"instructions": "Be loud.", "max_output_tokens": 3}
    request = request_of(**fields)
    preset.fill(request, request.sent(fields))
    assert (request.instructions, request.input, request.max_output_tokens) == ("Be loud.", ASKED, 3)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"instructions": "Be loud."}, "instructions"),
        ({"input": [{"role": "developer", "content": "Be loud."}, *ASKED]}, "input[0]"),
        ({"max_output_tokens": 9}, "max_output_tokens"),
    ],
)
def test_what_a_preset_forces_is_refused_by_the_requests_own_names(fields: dict[str, Any], param: str) -> None:
    preset = Preset.of("calm", {"forced": {"system": "Be calm.", "max_tokens": 5}})
    request = request_of(**fields)
    with pytest.raises(BadRequest) as refused, calling(request.names):
        preset.fill(request, request.sent(fields))
    assert refused.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"tools": 5}, "tools"), ({"input": [{"role": "assistant", "content": [5], "type": "message"}]}, "input")],
)
def test_what_vllms_validators_break_over_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises((BadRequest, ValueError)) as refused:
        request_of(**fields)
    named = getattr(refused.value, "param", None) or refused.value.errors()[0]["loc"][0]  # type: ignore[attr-defined]
    assert named.startswith(param)


def test_an_answer_of_several_turns_takes_nothing_of_ours(caps: Capabilities) -> None:
    steered, plain = request_of(steering=CALM, tools=[FUNCTION, SEARCHES]), request_of(tools=[SEARCHES])
    compiled = prepare(steered, caps)
    assert compiled is not None
    plain.check_one_turn(Harmony(True))
    steered.attach(compiled)
    with pytest.raises(Unavailable) as harmony:
        steered.check_one_turn(Harmony(True))
    plain.pay(lambda _: None, lambda: cast(Bill, None))
    for request, place in ((steered, 1), (plain, 0)):
        with pytest.raises(WhipstaffError) as tool:
            request.check_one_turn(Harmony(False))
        assert tool.value.param == f"tools[{place}].type"
    assert harmony.value.param == "model"


def test_what_breaks_while_it_streams_is_an_event_of_the_api() -> None:
    class Event:
        type = "response.created"

        def model_dump_json(self, **_: Any) -> str:
            return "{}"

    class Serving(ServingResponses):
        def __init__(self) -> None:
            pass

    serving = Serving()

    async def broken() -> AsyncGenerator[Any, None]:
        yield Event()
        serving._convert_generation_error_to_streaming_response(GenerationError("gone"))

    async def read() -> list[str]:
        return [event async for event in responses._as_events(broken(), serving)]

    first, last = asyncio.run(read())
    assert first.startswith("event: response.created\n")
    assert last.startswith('event: error\ndata: {"type": "error", "code": "500"') and '"sequence_number": 1' in last
