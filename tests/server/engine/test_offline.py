"""Requests without HTTP; without an engine."""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from vllm.exceptions import RetryableRequestError
from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams

from whipstaff.server.admission.prepare import prepare
from whipstaff.server.demo import MODELS
from whipstaff.server.engine import EngineDied, UnsupportedEngine
from whipstaff.server.engine.frontend.offline import (
    Offline,
    OfflineChat,
    OfflineText,
    conversations_of,
    engine_args,
    prompts_of,
)
from whipstaff.server.engine.frontend.requests import Notes
from whipstaff.server.errors import BadRequest
from whipstaff.server.llm import SETTINGS, InvalidRequest, _asked_of, _settings
from whipstaff.server.plan import PLAN_KEY
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Part, Preset
from whipstaff.server.settings import Settings

DEMO = str(MODELS / "demo")
# Every parameter that vLLM takes, none at its default; those that exclude one another are left out.
OTHERS: dict[str, Any] = {
    **{"n": 2, "presence_penalty": 0.5, "frequency_penalty": 0.25, "repetition_penalty": 1.5, "temperature": 0.7},
    **{"top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "stop": ["."], "stop_token_ids": [5], "ignore_eos": True},
    **{"max_tokens": 9, "min_tokens": 2, "logprobs": 3, "prompt_logprobs": 1, "flat_logprobs": True},
    **{"skip_special_tokens": False, "spaces_between_special_tokens": False, "include_stop_str_in_output": True},
    **{"stream_interval": 4, "structured_outputs": StructuredOutputsParams(choice=["a"]), "logit_bias": {4: 2.0}},
    **{"allowed_token_ids": [1, 2, 5], "extra_args": {"mine": 1}, "bad_words": ["no"], "thinking_token_budget": 5},
    **{"skip_reading_prefix_cache": True, "routed_experts_prompt_start": 1, "watermarking": False},
}


def text(params: SamplingParams | None = None, **fields: Any) -> OfflineText:
    return OfflineText.of(params or SamplingParams(), prompt="Why?", **fields)


def test_what_vllm_samples_by_is_what_was_given() -> None:
    given = SamplingParams(**OTHERS)
    made = text(given).to_sampling_params(9)
    changed = {"output_kind"}
    for name in SamplingParams.__struct_fields__:
        if name not in changed:
            assert getattr(made, name) == getattr(given, name), name
    assert made.output_kind == RequestOutputKind.FINAL_ONLY and given.output_kind != made.output_kind


def test_no_parameter_is_forgotten_here() -> None:
    """One that a later vLLM adds has to be seen to stay what it was."""
    internal = {"output_kind", "output_text_buffer_length", "skip_clone", "detokenize"}
    beside = {"logprob_token_ids", "prompt_logprob_token_ids", "prompt_logprob_start", "trace_decode_token_ids"}
    names = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    assert names == OTHERS.keys() | internal | beside | {"repetition_detection"}


def test_a_preset_can_fill_in_whatever_it_may_say() -> None:
    assert Part.model_fields.keys() - {"system", "examples", "prompt"} <= OfflineText.model_fields.keys()
    preset = Preset.of("calm", {"default": {"temperature": 0.5, "logit_bias": {"4": 1}}, "forced": {"max_tokens": 5}})
    request = text(SamplingParams(temperature=0.25))
    preset.fill(request, request.sent_fields)
    made = request.to_sampling_params(request.max_tokens or 0)
    assert (made.temperature, made.logit_bias, made.max_tokens) == (0.25, {4: 1}, 5)
    with pytest.raises(BadRequest) as refused:
        preset.fill(request := text(SamplingParams(max_tokens=9)), request.sent_fields)
    assert refused.value.param == "max_tokens"


def test_what_is_in_extra_args_is_a_field_as_over_http(caps: Capabilities) -> None:
    given = SamplingParams(extra_args={"steering": '{"vector": "calm"}', "mine": 1})
    request = text(given)
    compiled = prepare(request, caps)
    assert compiled is not None and compiled.steering.entries
    assert request.to_sampling_params(9).extra_args == {"mine": 1} and "steering" in (given.extra_args or {})


def test_the_engine_gets_the_plan(caps: Capabilities) -> None:
    request = text(SamplingParams(temperature=0), steering={"vector": "calm", "where": "all"})
    compiled = prepare(request, caps)
    assert compiled is not None
    heard: list[Any] = []
    request.attach(compiled, Notes(output=lambda index, output: heard.append((index, output))))
    assert request.to_sampling_params(9).extra_args is None  # it is not placed
    request.placed.append(compiled.at_prompt(Prompt(5, list(range(5)), 50, None), lambda _: 9, True))
    plan = (request.to_sampling_params(9).extra_args or {})[PLAN_KEY]
    plan.note("x")
    assert plan["steering"] and heard == [(0, "x")]


def test_a_search_is_ours_and_has_all_answers_in_one_request(early: Capabilities) -> None:
    request = text(SamplingParams(n=2, temperature=0.5), decoding={"method": "beam_search", "num_beams": 3})
    compiled = prepare(request, early)
    assert (
        compiled is not None
        and compiled.searches
        and compiled.warnings == ("temperature did nothing: beam_search draws no tokens",)
    )
    request.attach(compiled)
    made = request.to_sampling_params(9)
    assert (made.n, made.temperature, request.n) == (1, 0, 2)


def test_prompts_are_told_apart_as_vllm_does() -> None:
    assert [len(prompts_of(one)) for one in ("a", [1, 2], ["a", "b"], [[1], [2]], {"prompt": "a"}, [])] == [
        *(1, 1, 2, 2, 1, 0)
    ]
    said = {"role": "user", "content": "a"}
    assert [len(conversations_of(one)) for one in ([said], [[said], [said]])] == [1, 2]


# ---- arguments


def test_a_list_is_by_prompt() -> None:
    asked = _asked_of(2, preset=["x", "y"], steering=[{"vector": "a"}, [{"vector": "b"}]], explain={"top": 1})
    assert [one["steering"] for one in asked.values] == [{"vector": "a"}, [{"vector": "b"}]]
    assert [one["explain"] for one in asked.values] == [{"top": 1}] * 2
    assert asked.names(1)["steering"] == "steering[1]" and "explain" not in asked.names(1)
    assert asked.names(1)["model"] == "preset[1]" and _asked_of(2, preset="x").names(1)["model"] == "preset"


@pytest.mark.parametrize("name", ["steering", "sampling_params", "lora_request", "priority", "preset"])
def test_a_list_of_another_length_is_refused_by_name(name: str) -> None:
    with pytest.raises(InvalidRequest, match="3 values for 2 prompts") as refused:
        _asked_of(2, **{name: [None] * 3})
    assert refused.value.param == name and isinstance(refused.value, ValueError)


def test_settings_are_arguments_and_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WHIPSTAFF_ADMIN_KEY", "x")
    monkeypatch.setenv("WHIPSTAFF_MAX_DOSE", "3")
    found = _settings({"vectors": tmp_path, "presets": [str(tmp_path)], "aux": {"small": tmp_path}})
    assert (found.vectors, found.presets, found.max_dose) == ([tmp_path], [tmp_path], None)
    assert found.aux == {"small": str(tmp_path)}
    with pytest.raises(ValidationError, match="no such file"):
        _settings({"vectors": tmp_path / "none"})


def test_the_settings_that_are_left_out_are_about_serving() -> None:
    about_serving = {"admin_key", "keys", "open_metrics", "audit_log", "max_upload_bytes", "drain_timeout"}
    about_serving |= {"playground", "grafana_url", "max_downloads", "max_download_bytes", "download_seconds"}
    assert Settings.model_fields.keys() - set(SETTINGS) == about_serving


def test_engine_arguments_are_vllms() -> None:
    made = engine_args(DEMO, compilation_config=0, structured_outputs_config={"backend": "xgrammar"}, seed=3)
    assert (made.seed, made.disable_log_stats, made.structured_outputs_config.backend) == (3, True, "xgrammar")
    assert made.compilation_config.mode == 0
    for arguments in ({"data_parallel_size": 2}, {"default_mm_loras": {"image": "x"}}):
        with pytest.raises(UnsupportedEngine, match=next(iter(arguments))):
            engine_args(DEMO, **arguments)
    with pytest.raises(TypeError, match="admin_key"):
        engine_args(DEMO, admin_key="x")


def test_messages_and_prompts_are_not_mixed_up() -> None:
    chat = OfflineChat.of(SamplingParams(), messages=[{"role": "user", "content": "a"}])
    assert chat.is_chat and not hasattr(chat, "prompt") and not hasattr(text(), "messages")


class DeadEngine:
    """Ends every generation as an engine that died does."""

    model_config, renderer = SimpleNamespace(max_model_len=20, is_encoder_decoder=False), None

    async def generate(self, *_: Any, **__: Any) -> AsyncGenerator[Any, None]:
        raise RetryableRequestError("the engine died: worker VllmWorker-0 was killed by signal 9")
        yield


def test_who_waits_for_a_dead_engine_is_told_why() -> None:
    engine: Any = DeadEngine()
    prompt = {"type": "token", "prompt_token_ids": [1, 2]}
    with pytest.raises(EngineDied, match="killed by signal 9"):
        asyncio.run(Offline(engine).generate(text(), prompt, "0", None, 0))


@pytest.mark.parametrize(("wanted", "most"), [(None, 18), (5, 5), (99, 18)])
def test_no_answer_is_longer_than_the_context(wanted: int | None, most: int) -> None:
    engine: Any = DeadEngine()
    prompt = {"type": "token", "prompt_token_ids": [1, 2]}
    assert Offline(engine)._room(text(SamplingParams(max_tokens=wanted)), prompt) == most
