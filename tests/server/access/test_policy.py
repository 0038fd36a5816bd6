"""What a key may do: a view in which what is not allowed is not there."""

from dataclasses import replace

import pytest

from whipstaff.server.access.policy import Policy, View
from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.errors import Forbidden, NotFound
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset
from whipstaff.steering.served import Limit

TERSE = Preset.of("terse", {"default": {"steering": {"vector": "push"}}})
OTHER = Preset.of("other", {"default": {"temperature": 0.5}})


@pytest.fixture
def stocked(caps: Capabilities) -> Capabilities:
    return replace(caps, presets={"terse": TERSE, "other": OTHER})


def view(**said: object) -> View:
    return View(Policy.model_validate(said))


def test_vectors_that_are_not_allowed_are_not_there(stocked: Capabilities) -> None:
    first, second = stocked.registry.names[:2]
    seen = view(vectors=[first]).of(stocked)
    assert seen.registry.names == [first] and stocked.registry.names != [first]
    assert compile_extras({"steering": {"vector": first}}, seen) is not None
    with pytest.raises(NotFound) as refused:
        compile_extras({"steering": {"vector": second}}, seen)
    with pytest.raises(NotFound) as missing:
        compile_extras({"steering": {"vector": "nothing-like-it"}}, seen)
    assert refused.value.message.replace(second, "") == missing.value.message.replace("nothing-like-it", "")


def test_presets_bring_what_they_name(stocked: Capabilities) -> None:
    first = stocked.registry.names[0]
    preset = Preset.of("mine", {"default": {"steering": {"vector": first}}})
    policy = view(vectors=[], presets=["mine"])
    caps = replace(stocked, presets=dict(stocked.presets) | {"mine": preset})
    assert list(policy.of(caps).presets) == ["mine"] and policy.of(caps).registry.names == []
    assert policy.with_preset(caps, preset).registry.names == [first]
    with pytest.raises(NotFound):
        policy.of(caps).preset("terse")
    assert list(view(forced_preset="mine").of(caps).presets) == ["mine"]


@pytest.mark.parametrize(
    ("server", "own", "most"),
    [
        (None, None, None),
        (None, 2.0, Limit(2.0)),
        (Limit(1.0, "clamp"), None, Limit(1.0, "clamp")),
        (Limit(1.0, "clamp"), 2.0, Limit(1.0, "clamp")),
        (Limit(1.0, "clamp"), 0.5, Limit(0.5, "clamp")),
    ],
)
def test_the_tighter_dose_counts(
    stocked: Capabilities, server: Limit | None, own: float | None, most: Limit | None
) -> None:
    assert view(max_dose=own).of(replace(stocked, limit=server)).limit == most


def test_a_view_is_made_once_for_each_state_of_the_registry(stocked: Capabilities) -> None:
    one = view(vectors=[], presets=["terse"])
    assert one.of(stocked) is one.of(stocked)
    assert one.with_preset(stocked, TERSE) is one.with_preset(stocked, TERSE)
    changed = replace(stocked, presets={})
    assert one.of(changed).presets == {} and one.of(stocked).presets.keys() == {"terse"}


def test_methods_and_counts_are_bounded_with_the_field(stocked: Capabilities) -> None:
    policy = Policy.model_validate({"methods": ["cfg"], "n": 2, "prompts": 1, "max_tokens": 100})
    policy.check_methods({"decoding[0].method": "cfg"})
    with pytest.raises(Forbidden, match="may not use dola") as refused:
        policy.check_methods({"decoding[0].method": "cfg", "dola_layers": "dola"})
    assert refused.value.param == "dola_layers"
    policy.check_counts(2, 1, 100)
    policy.check_counts(1, 1, None)
    for counts, param in (((3, 1, None), "n"), ((1, 2, None), "prompt"), ((1, 1, 101), "max_tokens")):
        with pytest.raises(Forbidden) as refused:
            policy.check_counts(*counts)
        assert refused.value.param == param
