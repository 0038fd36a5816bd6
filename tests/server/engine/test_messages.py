"""Message requests as the chats that they stand for; without an engine."""

from typing import Any

import pytest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages

from whipstaff.server.admission.prepare import prepare
from whipstaff.server.engine.frontend.messages import MessageChat, MessageRequest, ServingMessages
from whipstaff.server.errors import BadRequest
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset

BODY = {"model": "base", "max_tokens": 9, "messages": [{"role": "user", "content": "Why?"}]}
PUSH = {"vector": "push"}


class Serving(ServingMessages, AnthropicServingMessages):
    """As an instance of vLLM's class becomes."""


def chat_of(**fields: Any) -> MessageChat:
    made: MessageChat = Serving.to_chat_completion_request(MessageRequest.model_validate(BODY | fields))
    return made


def test_a_message_request_is_a_chat_with_what_chats_take() -> None:
    fields = {"steering": PUSH, "min_p": 0.2, "seed": 3, "repeat_penalty": 1.5, "vllm_xargs": {"dola_layers": "low"}}
    made = chat_of(system="Be brief.", stop_sequences=["x"], temperature=0.5, top_k=4, stream=True, **fields)
    assert [message["content"] for message in made.messages] == ["Be brief.", "Why?"]
    assert (made.stop, made.temperature, made.top_k, made.stream) == (["x"], 0.5, 4, True)
    assert (made.steering, made.min_p, made.seed, made.repetition_penalty) == (PUSH, 0.2, 3, 1.5)
    assert made.vllm_xargs == {"dola_layers": "low"} and made.explicit_max_tokens == 9 and made.may_have_extras


def test_fields_that_such_an_answer_has_no_place_for_are_told_of(nothing: Capabilities) -> None:
    made = chat_of(n=3, logprobs=True, temprature=1, top_p=None)
    assert made.num_answers == 1 and not made.logprobs and made.unknown_names == ["temprature", "n", "logprobs"]
    compiled = prepare(made, nothing)
    assert compiled is not None and [one.partition(" ")[0] for one in compiled.warnings] == made.unknown_names
    assert "did you mean temperature?" in compiled.warnings[0]
    assert "did you mean stop_sequences?" in prepare(chat_of(stop_sequence="x"), nothing).warnings[0]  # type: ignore[union-attr]
    with pytest.raises(BadRequest) as refused:
        prepare(chat_of(logprobs=True, on_unknown="error"), nothing)
    assert refused.value.param == "logprobs"


@pytest.mark.parametrize(("fields", "param"), [({"seed": "x"}, "seed"), ({"repeat_penalty": "x"}, "repeat_penalty")])
def test_a_bad_value_is_named(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        chat_of(**fields)
    assert refused.value.param == param and refused.value.body("/v1/messages")["error"]["message"].startswith(param)


def test_a_presets_default_does_not_overrule_what_the_request_calls_otherwise() -> None:
    preset = Preset.of("calm", {"default": {"stop": ["y"], "seed": 5, "system": "Be calm."}})
    for fields, stop in (({"stop_sequences": ["x"]}, ["x"]), ({}, ["y"])):
        made = chat_of(**fields)
        assert preset.fill(made, made.sent(BODY | fields)) >= {"seed"}
        assert (made.stop, made.seed, made.messages[0]["content"]) == (stop, 5, "Be calm.")
