"""Several chats in one request; without an engine."""

from typing import Any

import pytest

from whipstaff.server.admission.fields import AskedRequest
from whipstaff.server.admission.prepare import prepare
from whipstaff.server.engine.frontend.batch import BatchRequest
from whipstaff.server.engine.frontend.messages import MessageChat
from whipstaff.server.engine.frontend.offline import OfflineChat, OfflineText
from whipstaff.server.engine.frontend.requests import ChatRequest, Notes, TextRequest
from whipstaff.server.engine.frontend.responses import ResponseRequest
from whipstaff.server.errors import BadRequest
from whipstaff.server.plan import PLAN_KEY
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset

ASKED = [[{"role": "user", "content": "Why?"}], [{"role": "user", "content": "Where?"}]]


def batch(**fields: Any) -> BatchRequest:
    return BatchRequest.model_validate({"model": "base", "messages": ASKED} | fields)


APIS = [TextRequest, ChatRequest, MessageChat, BatchRequest, ResponseRequest, OfflineText, OfflineChat]


@pytest.mark.parametrize("api", APIS)
def test_every_api_says_what_admission_asks(api: Any) -> None:
    """vLLM's classes are beyond what types are checked of, so a field that one of them lacks shows here."""
    is_text = issubclass(api, TextRequest | OfflineText)
    body = {"prompt": "Why?"} if is_text else {"messages": ASKED if api is BatchRequest else ASKED[0], "input": "Why?"}
    assert isinstance(api.model_validate({"model": "base", **body}), AskedRequest)


def test_each_chat_is_asked_with_the_plan_of_its_prompt(caps: Capabilities) -> None:
    request = batch(steering={"vector": "calm", "where": "all"}, temperature=3, min_p=0.1, ignore_eos=True)
    compiled = prepare(request, caps)
    assert compiled is not None
    heard: list[tuple[int, Any]] = []
    request.attach(compiled, Notes(output=lambda index, output: heard.append((index, output))))
    chats = [request.to_chat_completion_request(messages) for messages in request.messages]
    for num in (5, 9):
        request.placed.append(compiled.at_prompt(Prompt(num, list(range(num)), 50, None), lambda _: 9, True))
    made = [chat.to_sampling_params(9, {}) for chat in chats]
    plans = [(params.extra_args or {})[PLAN_KEY] for params in made]
    for name, plan in zip("ab", plans, strict=True):
        plan.note(name)
    assert heard == [(0, "a"), (1, "b")] and plans[0]["steering"]
    assert [(params.ignore_eos, params.temperature) for params in made] == [(True, 1)] * 2  # the plan has its own
    assert [chat.messages for chat in chats] == ASKED and request.temperature == 3


def test_what_its_answer_has_no_place_for_is_told_of(nothing: Capabilities) -> None:
    made = batch(stream=True, prompt_logprobs=1, temprature=1, bad_words=["x"], seed=3)
    assert made.unknown_names == ["stream", "prompt_logprobs", "temprature"] and made.num_prompts == 2
    assert made.to_chat_completion_request(ASKED[0]).prompt_logprobs is None
    with pytest.raises(BadRequest) as refused:
        prepare(batch(stream=True, on_unknown="error"), nothing)
    assert refused.value.param == "stream"


def test_a_preset_leads_every_conversation() -> None:
    made, forced = batch(), Preset.of("calm", {"forced": {"system": "Be calm."}})
    forced.fill(made, {"messages": ASKED})
    assert [one[0]["content"] for one in made.messages] == ["Be calm."] * 2
    assert [one[1:] for one in made.messages] == ASKED
    with pytest.raises(BadRequest) as refused:
        forced.fill(made, {"messages": made.messages})
    assert refused.value.param == "messages[0][0]"
