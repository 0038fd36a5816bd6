"""Presets as data: what they may say, what they fill in, whom errors blame, and those that come with the package."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from whipstaff.server import demo
from whipstaff.server.errors import BadRequest, FieldOrigins, NotFound
from whipstaff.server.registry.presets import BadPreset, Preset, preset_files, read_preset, stamp_of_files

USER = {"role": "user", "content": "Why?"}
EXAMPLES = [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": "It is."}]


def filled(preset: dict[str, Any], body: dict[str, Any]) -> tuple[Any, frozenset[str]]:
    request = SimpleNamespace(**body)
    return request, Preset.of("it", preset).fill(request, body)


def test_defaults_give_way_and_what_is_forced_does_not() -> None:
    preset = {"default": {"temperature": 0.5, "steering": {"vector": "x"}}, "forced": {"seed": 3}}
    request, mine = filled(preset, {"messages": [USER], "temperature": 0.9, "steering": None})
    assert (request.temperature, request.steering, request.seed) == (0.9, {"vector": "x"}, 3)
    assert mine == {"steering", "seed"}
    for body, path in (({"seed": 4}, "seed"), ({"vllm_xargs": {"seed": 4}}, "vllm_xargs.seed")):
        with pytest.raises(BadRequest) as refused:
            filled(preset, {"messages": [USER], **body})
        assert refused.value.param == path and "'it' sets seed" in refused.value.message


def test_zero_and_false_are_said_too() -> None:
    request, mine = filled({"default": {"temperature": 0, "ignore_eos": False}}, {"messages": [USER]})
    assert (request.temperature, request.ignore_eos, mine) == (0, False, frozenset({"temperature", "ignore_eos"}))
    request, mine = filled({"default": {"temperature": 0.5}}, {"messages": [USER], "temperature": 0})
    assert (request.temperature, mine) == (0, frozenset())


def test_messages_come_before_the_users() -> None:
    preset = {"default": {"system": "Be brief.", "examples": EXAMPLES}}
    request, mine = filled(preset, {"messages": [USER]})
    assert request.messages == [{"role": "system", "content": "Be brief."}, *EXAMPLES, USER] and not mine
    own = {"role": "developer", "content": "Be long."}
    request, _ = filled(preset, {"messages": [own, USER]})
    assert request.messages == [own, *EXAMPLES, USER]
    with pytest.raises(BadRequest, match=r"it is for /v1/chat/completions"):
        filled(preset, {"prompt": "x"})


def test_a_prompt_is_written_around_every_text() -> None:
    preset = {"default": {"prompt": "Q: {prompt}\nA:"}}
    assert filled(preset, {"prompt": "{x}"})[0].prompt == "Q: {x}\nA:"
    assert filled(preset, {"prompt": ["a", "b"]})[0].prompt == ["Q: a\nA:", "Q: b\nA:"]
    for prompt in ([1, 2], [[1], [2]], None, []):
        with pytest.raises(BadRequest, match="send text"):
            filled(preset, {"prompt": prompt})
    with pytest.raises(BadRequest, match=r"it is for /v1/completions"):
        filled(preset, {"messages": [USER]})


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"nose": 1}, "nose"),
        ({"default": 1}, "default"),
        ({"default": {"temperature": "hot"}}, "default.temperature"),
        ({"forced": {"stop": 3}}, "forced.stop"),
        ({"default": {"examples": [{"role": "user"}]}}, "default.examples[0].content"),
        ({"default": {"prompt": "{prompt}{prompt}"}}, "default.prompt"),
        ([], None),
    ],
)
def test_what_is_no_preset_is_refused_by_field(body: Any, param: str | None) -> None:
    with pytest.raises(BadRequest) as refused:
        Preset.of("it", body)
    assert refused.value.param == param


def test_the_digest_is_of_what_it_says() -> None:
    one = Preset.of("one", {"default": {"seed": 1, "top_p": 0.5}})
    assert one.digest == Preset.of("two", {"default": {"top_p": 0.5, "seed": 1}}).digest
    assert one.digest != Preset.of("one", {"forced": {"seed": 1, "top_p": 0.5}}).digest
    assert Preset.of("one", json.loads(json.dumps(one.wire))).digest == one.digest


def test_errors_in_what_a_preset_says_name_the_preset() -> None:
    preset = Preset.of("it", {"default": {"steering": []}})
    with pytest.raises(NotFound) as refused, FieldOrigins(preset.name, frozenset(["steering"])).named():
        raise NotFound("there is no vector 'x'", "steering[0].vector")
    assert (refused.value.param, refused.value.message) == (
        "model",
        "preset 'it', steering[0].vector: there is no vector 'x'",
    )
    for origins in (FieldOrigins(preset.name, frozenset(["seed"])), FieldOrigins()):
        with pytest.raises(NotFound) as refused, origins.named():
            raise NotFound("there is no vector 'x'", "steering[0].vector")
        assert refused.value.param == "steering[0].vector"


def test_files_are_read_by_name_and_their_changes_seen(tmp_path: Path) -> None:
    path = tmp_path / "calm.json"
    path.write_text('{"default": {"seed": 1}}')
    assert [read_preset(file).name for file in preset_files([tmp_path])] == ["calm"]
    before = stamp_of_files([tmp_path])
    path.write_text('{"default": {"seed": 12}}')
    assert stamp_of_files([tmp_path]) != before
    for text, reason in (
        ("{", "calm.json: Expecting"),
        ('{"x": 1}', "calm.json: x: unknown key"),
        ("3", "calm.json: "),
    ):
        path.write_text(text)
        with pytest.raises(BadPreset, match=reason):
            read_preset(path)


def test_the_presets_that_come_with_the_package_are_sound() -> None:
    assert sorted(read_preset(path).name for path in preset_files([demo.PRESETS])) == ["gloomy", "helpful"]
    urial = read_preset(demo.PRESETS.parent / "urial.json")
    assert urial.is_for_text and not urial.is_for_chat and "arXiv" in urial.body.description
