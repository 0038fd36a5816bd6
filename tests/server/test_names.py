"""Other servers' names: what they switch on, what is as good as absent, and what no preset can be got round by."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from catalogues import PAIR, compiled, refusal

from whipstaff.decoding.method import Depth, Method
from whipstaff.decoding.methods import METHODS
from whipstaff.server import names
from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.admission.receipt import receipt
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.engine.frontend.requests import ChatRequest, TextRequest
from whipstaff.server.errors import BadRequest, NotFound, WhipstaffError
from whipstaff.server.names import GATES, SHORTHANDS, near, thing, unknown_reasons
from whipstaff.server.prompt.vocabulary import Vocabulary
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset

SWITCHED = [name for name, method in METHODS.items() if method.shorthands]
ON: dict[str, Any] = {  # a value that is not off, of every parameter that a shorthand says
    "guidance_scale": 2,
    "penalty_alpha": 0.5,
    "negative_prompt": "no",
    "layers": "low",
    "multiplier": 0.7,
    "base": 1.5,
    "allowed_length": 3,
    "penalty_last_n": 64,
    "sequence_breakers": ["a"],
    "range": 0.4,
    "low": 0.5,
    "high": 1.3,
    "exponent": 2,
    "n": 1.5,
    "p": 0.5,
    "a": 0.3,
    "epsilon": 0.01,
    "probability": 0.3,
    "threshold": 0.2,
    "mode": 2,
    "tau": 4,
    "eta": 0.2,
    "num_candidates": 3,
    "num_beams": 3,
    "early_stopping": True,
    "num_beam_groups": 3,
    "diversity_penalty": 0.5,
}
PARTNERS = {  # parameters that say nothing alone
    "low": frozenset({"high"}),
    "high": frozenset({"low"}),
    "num_beam_groups": frozenset({"num_beams", "diversity_penalty"}),
    "diversity_penalty": frozenset({"num_beams", "num_beam_groups"}),
}
OFF = {  # neutral values, as other servers have them by default
    "guidance_scale": 1,
    "cfg_scale": 1,
    "penalty_alpha": 0,
    "dry_multiplier": 0,
    "dynatemp_range": 0,
    "top_n_sigma": 0,
    "nsigma": -1,
    "typical_p": 1,
    "typical": 1.0,
    "top_a": 0,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "xtc_probability": 0,
    "mirostat": 0,
    "mirostat_mode": 0,
    "best_of": 1,
    "num_beams": 1,
}
SILLY_TAVERN = {  # what its text completions send with everything off
    **{"typical_p": 1, "typical": 1, "top_a": 0, "nsigma": 0, "top_n_sigma": 0, "guidance_scale": 1},
    **{"negative_prompt": "", "mirostat_mode": 0, "mirostat_tau": 5, "mirostat_eta": 0.1, "epsilon_cutoff": 0},
    **{"eta_cutoff": 0, "dynamic_temperature": False, "dynatemp_low": 1, "dynatemp_high": 1, "dynatemp_range": 0},
    **{"dynatemp_exponent": 1, "dry_multiplier": 0, "dry_base": 1.75, "dry_allowed_length": 2},
    **{"dry_penalty_last_n": 0, "dry_sequence_breakers": '["\\n",":","\\"","*"]', "xtc_threshold": 0.1},
    "xtc_probability": 0,
}


class Letters:
    """A tokenizer of one token."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [0]


@pytest.fixture(scope="module")
def worded(caps: Capabilities) -> Capabilities:
    """A server with a tokenizer, of which all can be read that methods read."""
    depth = Depth(4, kept=frozenset(range(4)), has_norm=False)
    reads: dict[str, Any] = {"looks_ahead": True, "reads_attention": True, "num_hidden_states": 1}
    return replace(caps, words=Vocabulary(["a", "b", "ab"], {}, (), Letters()), depth=depth, vocabulary=3, **reads)


def methods_of(made: CompiledRequest) -> list[str]:
    return [entry.method.name for entry in made.decoding]


def fields_of(name: str, params: Any) -> dict[str, Any]:
    """The first shorthand of each of these parameters."""
    found = {param: field for field, param in reversed(list(METHODS[name].shorthands.items()))}
    return {found[param]: ON[param] for param in params}


def companions(method: Method[Any]) -> list[str]:
    switches = frozenset().union(*method.switches)
    return [field for field, param in method.shorthands.items() if param not in switches]


# ---- the switch decides


def test_every_shorthand_has_a_switch_and_a_value_here() -> None:
    for method in METHODS.values():
        assert bool(method.switches) == bool(method.shorthands)
        assert frozenset().union(*method.switches) <= set(method.shorthands.values()) <= ON.keys()
        assert set(method.texts) <= set(method.shorthands)
    assert len(GATES) == len(set(GATES)) and not set(GATES) & set(SHORTHANDS)


@pytest.mark.parametrize("name", SWITCHED)
def test_each_switch_alone_is_on(worded: Capabilities, name: str) -> None:
    for switch in METHODS[name].switches:
        made = compiled(worded, **fields_of(name, switch))
        assert methods_of(made) == [name] and not made.warnings and not made.is_plain


@pytest.mark.parametrize("name", SWITCHED)
def test_companions_alone_do_nothing_and_it_is_said(worded: Capabilities, name: str) -> None:
    alone = companions(METHODS[name])
    lone = [field for field in METHODS[name].shorthands if not METHODS[name].is_switched_on({SHORTHANDS[field][1]})]
    for fields in [[field] for field in lone] + ([alone] if len(alone) > 1 else []):
        made = compiled(worded, **{field: ON[SHORTHANDS[field][1]] for field in fields})
        assert made.is_plain and not made.decoding
        (said,) = made.warnings
        assert all(field in said for field in fields) and "is off without" in said
        assert any(field in said.partition("without")[2] for field in METHODS[name].shorthands)


@pytest.mark.parametrize("field", OFF)
def test_a_neutral_switch_is_off_whatever_stands_beside_it(worded: Capabilities, field: str) -> None:
    method = METHODS[SHORTHANDS[field][0]]
    beside = {name: ON[SHORTHANDS[name][1]] for name in companions(method)}
    made = compiled(worded, **{field: OFF[field], **beside})
    assert made.is_plain and receipt(made)["decoding"] == []
    assert len(made.warnings) == 1 and field in made.warnings[0] and "it is off" in made.warnings[0]


def test_other_servers_defaults_are_as_good_as_absent(worded: Capabilities) -> None:
    made = compiled(worded, **SILLY_TAVERN)
    assert made.is_plain and not receipt(made)["decoding"]
    assert all(any(field in said for said in made.warnings) for field in SILLY_TAVERN)
    on = compiled(worded, **SILLY_TAVERN | {"dynamic_temperature": True, "dynatemp_low": 0.5, "dynatemp_high": 1.5}
                  | {"dynatemp_range": 0.5})  # fmt: skip
    assert methods_of(on) == ["dynatemp"]


def test_nothing_neutral_needs_a_tokenizer(caps: Capabilities) -> None:
    assert caps.words is None and compiled(caps, **SILLY_TAVERN).is_plain
    assert compiled(caps, decoding=[{"method": "dry", "multiplier": 0}]).is_plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"xtc_threshold": "often"}, "xtc_threshold"),
        ({"dry_multiplier": 0, "dry_base": -1e9, "dry_allowed_length": -3}, "dry_allowed_length"),
        ({"dynatemp_range": 0, "dynatemp_exponent": -1}, "dynatemp_exponent"),
        ({"guidance_scale": 1, "negative_prompt": [-1]}, "negative_prompt[0]"),
        ({"dynamic_temperature": "yes"}, "dynamic_temperature"),
        ({"dry_sequence_breakers": '"a', "dry_multiplier": 0}, "dry_sequence_breakers"),
        ({"dynatemp_low": 1.5, "dynatemp_high": 0.5}, "dynatemp_high"),
    ],
)
def test_what_is_off_is_checked_all_the_same(worded: Capabilities, fields: dict[str, Any], param: str) -> None:
    error = refusal(worded, **fields)
    assert (error.status, error.param) == (400, param)


# ---- neutral is absent


def test_neutral_entries_conflict_with_nothing(worded: Capabilities) -> None:
    for fields, left in (
        ({"guidance_scale": 1, "decoding": {"method": "contrastive", "amateur": "anti"}}, ["contrastive"]),
        ({"dynatemp_range": 0, "decoding": {"method": "edt"}}, ["edt"]),
        ({"dry_multiplier": 0, "decoding": [{"method": "dry"}]}, ["dry"]),
        ({"decoding": [{"method": "dry", "multiplier": 0}, {"method": "dry"}]}, ["dry"]),
        ({"decoding": [PAIR | {"alpha": 0}, {"method": "contrastive", "amateur": "anti"}]}, ["contrastive"]),
        ({"decoding": [{"method": "xtc", "threshold": 0.6}], "xtc_probability": 0.3}, ["xtc"]),
    ):
        made = compiled(worded, **fields)
        assert methods_of(made) == left and len(made.warnings) == 1


@pytest.mark.parametrize("fields", [{"steering": []}, {"decoding": []}, {"steering": [], "decoding": "[]"}])
def test_empty_lists_are_plain(caps: Capabilities, fields: dict[str, Any]) -> None:
    assert compiled(caps, **fields).is_plain


@pytest.mark.parametrize("name", ["scale", "strength", "coefficient"])
def test_no_strength_is_no_steering(caps: Capabilities, name: str) -> None:
    made = compiled(caps, steering=[{"vector": "calm", name: 0}, {"vector": "late"}])
    assert [entry.path for entry in made.steering.entries] == ["steering[1]"]
    assert made.warnings == ("steering[0] was left out: it is off",)
    alone = compiled(caps, steering={"vector": "calm", name: 0, "when": {"probe": "probe", "above": 0}, "layers": [3]})
    assert alone.is_plain and not alone.plan.readings_id and receipt(alone)["steering"] == []
    assert refusal(caps, steering={"vector": "nope", name: 0}).status == 404
    assert refusal(caps, steering={"vector": "calm", name: 0, "layers": [2]}).param == "steering.layers"


def test_names_of_what_is_off_are_looked_up(caps: Capabilities) -> None:
    error = refusal(caps, decoding=[PAIR | {"alpha": 0, "expert": "absent"}])
    assert isinstance(error, NotFound) and error.param == "decoding[0].expert"


# ---- one thing, several names


def test_two_names_of_one_thing_agree_or_are_refused(worded: Capabilities) -> None:
    assert methods_of(compiled(worded, typical=0.5, typical_p=0.5)) == ["typical_p"]
    for fields, param in (
        ({"typical_p": 0.5, "typical": 0.6}, "typical"),
        ({"mirostat": 2, "mirostat_mode": 0}, "mirostat_mode"),
        ({"guidance_scale": 2, "cfg_scale": 3}, "cfg_scale"),
        ({"dynatemp_low": 0.5, "dynatemp_high": 1.5, "dynatemp_range": 2}, "dynatemp_range"),
    ):
        error = refusal(worded, **fields)
        assert (error.status, error.param) == (400, param) and "given twice" in error.message


@pytest.mark.parametrize("field", SHORTHANDS)
def test_every_name_of_a_parameter_says_it(worded: Capabilities, field: str) -> None:
    name, param = SHORTHANDS[field]
    switches = METHODS[name].switches
    others = next((switch for switch in switches if param in switch), switches[0])
    made = compiled(
        worded, **{**fields_of(name, (others | PARTNERS.get(param, frozenset())) - {param}), field: ON[param]}
    )
    (entry,) = made.decoding
    assert entry.path_of(param) == field and getattr(entry.params, param) == pytest.approx(ON[param])


def test_units_are_those_of_the_server(worded: Capabilities) -> None:
    for field in ("epsilon_cutoff", "eta_cutoff"):
        for value, wanted in ((3, 3e-4), (9.5, 9.5e-4), (3e-4, 3e-4), (0.2, 0.2)):
            (entry,) = compiled(worded, **{field: value}).decoding
            assert getattr(entry.params, "epsilon") == pytest.approx(wanted)  # noqa: B009
    (dry,) = compiled(worded, dry_multiplier=1, dry_base=0, dry_sequence_breakers='"\\n", ":"').decoding
    assert (dry.params.model_dump()["base"], dry.params.model_dump()["sequence_breakers"]) == (1.75, ["\n", ":"])
    assert "mirostat 1" in refusal(worded, mirostat_mode=1).message


def test_a_negative_prompt_is_a_text_and_no_json(worded: Capabilities) -> None:
    for text in ("42", "[1, 2]", "null", ""):
        (entry,) = compiled(worded, guidance_scale=2, negative_prompt=text).decoding
        assert entry.params.model_dump()["negative_prompt"] == text


# ---- presets


def fill(preset: dict[str, Any], **body: Any) -> tuple[Any, frozenset[str]]:
    request = SimpleNamespace(messages=[{"role": "user", "content": "Why?"}], **body)
    return request, Preset.of("it", preset).fill(request, vars(request))


FORCED = {"decoding": [PAIR]}


@pytest.mark.parametrize("name", SWITCHED)
@pytest.mark.parametrize("wrap", [dict, lambda fields: {"vllm_xargs": fields}])
def test_forced_decoding_cannot_be_got_round(name: str, wrap: Any) -> None:
    for switch in METHODS[name].switches:
        with pytest.raises(BadRequest, match="sets decoding; leave it out") as caught:
            fill({"forced": FORCED}, **wrap(fields_of(name, switch)))
        assert (caught.value.param or "").removeprefix("vllm_xargs.") in SHORTHANDS


@pytest.mark.parametrize("name", SWITCHED)
def test_forced_shorthands_cannot_be_got_round(worded: Capabilities, name: str) -> None:
    method = METHODS[name]
    for switch in method.switches:
        forced = fields_of(name, switch)
        for field, param in method.shorthands.items():
            with pytest.raises(BadRequest, match="leave it out"):
                fill({"forced": forced}, **{field: ON[param]}, **fields_of(name, switch - {param}))
        entry = {"method": name, **{param: ON[param] for param in switch}}
        for said in ([entry], entry, f'[{{"method": "{name}"}}]'):
            with pytest.raises(BadRequest, match="leave it out") as caught:
                fill({"forced": forced}, decoding=said)
            assert caught.value.param == "decoding"


@pytest.mark.parametrize("field", [*OFF, *GATES])
def test_neutral_values_are_not_refused_and_change_nothing_forced(worded: Capabilities, field: str) -> None:
    value = OFF.get(field, False)
    request, _ = fill({"forced": FORCED}, **{field: value})
    assert request.decoding == [PAIR]
    name = SHORTHANDS[field][0] if field in SHORTHANDS else "dynatemp"
    forced = fields_of(name, METHODS[name].switches[0])
    for body in ({field: value}, {"vllm_xargs": {field: value}}):
        request, _ = fill({"forced": forced}, **body)
        made = compiled(worded, **{key: getattr(request, key, None) for key in (*SHORTHANDS, *GATES)})
        assert methods_of(made) == [name] and not getattr(request, "vllm_xargs", None)


def test_what_is_forced_by_other_names() -> None:
    for forced, body, param in (
        ({"max_tokens": 5}, {"max_completion_tokens": 9}, "max_completion_tokens"),
        ({"repetition_penalty": 1.1}, {"repeat_penalty": 2}, "repeat_penalty"),
        ({"repeat_penalty": 1.1}, {"repetition_penalty": 2}, "repetition_penalty"),
        ({"temperature": 0.3}, {"dynatemp_range": 2}, "dynatemp_range"),
        ({"temperature": 0.3}, {"decoding": {"method": "edt"}}, "decoding"),
        ({"steering": []}, {"steering": {"vector": "calm"}}, "steering"),
        (
            {"steering": {"vector": "calm"}},
            {"decoding": {"method": "streams", "streams": [{"weight": 1, "steering": []}]}},
            "decoding",
        ),
        ({"decoding": []}, {"vllm_xargs": {"decoding": '{"method": "dry"}'}}, "vllm_xargs.decoding"),
        ({"on_unknown": "error"}, {"on_unknown": "warn"}, "on_unknown"),
    ):
        with pytest.raises(BadRequest, match="leave it out") as caught:
            fill({"forced": forced}, **body)
        assert caught.value.param == param
    fill({"forced": {"steering": {"vector": "calm"}}}, steering=[], decoding={"method": "dry"})
    fill({"forced": {"temperature": 0.3}}, decoding={"method": "dry"})


def test_companions_of_what_is_forced() -> None:
    fill({"forced": FORCED}, dry_base=1.2)  # which does nothing
    request, _ = fill({"forced": {"dry_base": 1.2}}, dry_multiplier=0.5)
    assert (request.dry_base, request.dry_multiplier) == (1.2, 0.5)
    for said in ({"dry_base": 2}, {"decoding": {"method": "dry", "base": 2}}):
        with pytest.raises(BadRequest, match="sets dry_base"):
            fill({"forced": {"dry_base": 1.2}}, **said)


def merged(worded: Capabilities, default: dict[str, Any], **body: Any) -> list[dict[str, Any]]:
    """The receipt's decoding."""
    preset = Preset.of("it", {"default": default})
    request = SimpleNamespace(messages=[], **body)
    filled = preset.fill(request, vars(request))
    made = compiled_merging(worded, preset.gives(filled, "decoding"), request)
    return list(receipt(made)["decoding"])


def compiled_merging(worded: Capabilities, merges: bool, request: Any) -> CompiledRequest:
    made = compile_extras({key: getattr(request, key, None) for key in names.FIELDS}, worded, merges)
    assert made is not None
    return made


def test_defaults_give_way_by_any_name(worded: Capabilities) -> None:
    entry = {"decoding": [{"method": "dry", "multiplier": 0.8, "base": 1.5}]}
    for default in (entry, {"dry_multiplier": 0.8, "dry_base": 1.5}):
        assert merged(worded, default)[0]["base"] == 1.5
        assert merged(worded, default, dry_multiplier=0) == []
        (said,) = merged(worded, default, dry_base=1.2)
        assert (said["multiplier"], said["base"]) == (0.8, 1.2)
        (said,) = merged(worded, default, decoding=[{"method": "dry", "multiplier": 0.2}])
        assert (said["multiplier"], said["base"]) == (0.2, 1.75)
    assert merged(worded, entry, decoding=[]) == []
    assert merged(worded, {"typical_p": 0.5}, typical=1) == []
    assert merged(worded, {"decoding": {"method": "dynatemp"}}, dynamic_temperature=False) == []


def test_errors_in_what_a_request_overrules_are_its_own(worded: Capabilities) -> None:
    with pytest.raises(WhipstaffError) as caught:
        merged(worded, {"decoding": [{"method": "dry"}]}, dry_base=1e6)
    assert caught.value.param == "dry_base"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"default": {"typical_p": 0.5}, "forced": {"typical": 0.6}}, "both default and forced"),
        ({"default": {"repeat_penalty": 1.1, "repetition_penalty": 1.2}}, "are one thing"),
        ({"default": {"max_tokens": 5}, "forced": {"max_tokens": 6}}, "both default and forced"),
    ],
)
def test_a_preset_says_a_thing_once(body: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRequest, match=reason):
        Preset.of("it", body)


# ---- names that nobody knows


def test_the_nearest_name_is_said() -> None:
    known = {*names.FIELDS, "structured_outputs", "temperature"}
    assert near("dry_multipler", known) == "; did you mean dry_multiplier?"
    assert near("guided_regex", known) == "; did you mean structured_outputs?"
    assert near("max_completion_tokens", {"max_tokens"}) == "; did you mean max_tokens?"
    assert near("smoothing_factor", known) == ""
    for name in ("top_K", "topK", "top-k"):  # neither case nor punctuation counts
        assert near(name, {"top_p", "top_k", "stop"}) == "; did you mean top_k?"
    assert list(unknown_reasons(["a", "b"], known)) == ["a", "b"]


def test_names_that_nobody_knows_are_bounded_and_can_be_sent() -> None:
    found = unknown_reasons(["\ud800", "y" * 10**6, *map(str, range(10**5))], {"temperature"})
    assert list(found)[:3] == ["\\ud800", "y" * 64, "0"] and len(found) == 32


def test_things_are_the_same_by_all_their_names() -> None:
    assert thing("typical") == thing("typical_p") == ("typical_p", "p")
    assert thing("repeat_penalty") == thing("repetition_penalty") != thing("presence_penalty")
    assert all(get_args(type(one)) == () for one in map(thing, SHORTHANDS))


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (TextRequest, "max_completion_tokens"),
        (TextRequest, "top_logprobs"),
        (TextRequest, "messages"),
        (ChatRequest, "prompt"),
        (ChatRequest, "suffix"),
    ],
)
def test_what_only_the_other_route_reads_did_nothing(model: Any, name: str) -> None:
    other = ChatRequest if model is TextRequest else TextRequest
    assert name not in model.known_names() and name in other.known_names()
    assert {"store", "metadata", "service_tier", "user", "stream"} <= model.known_names()  # which change nothing


# ---- entries of `decoding`


@pytest.mark.parametrize("field", SHORTHANDS)
def test_an_entry_takes_the_top_level_names_of_its_parameters(worded: Capabilities, field: str) -> None:
    name, param = SHORTHANDS[field]
    beside = {key: ON[key] for key in PARTNERS.get(param, ())}
    by_name, by_param = (
        compiled(worded, decoding={"method": name, key: ON[param], **beside}).decoding for key in (field, param)
    )
    assert [entry.params for entry in by_name] == [entry.params for entry in by_param] != []


def test_errors_of_such_names_are_at_their_path(caps: Capabilities) -> None:
    for entry, param, said in (
        ({"method": "dry", "dry_multiplier": -1}, "dry_multiplier", "greater than"),
        ({"method": "dry", "dry_multiplier": 1, "multiplier": 2}, "dry_multiplier", "given twice, here and as"),
        ({"method": "typical_p", "typical": 0.5, "typical_p": 0.6}, "typical", "given twice"),
        ({"method": "dry", "multiplyer": 1}, "multiplyer", "unknown key; did you mean multiplier?"),
        ({"method": "dynatemp", "dynatemp_low": 2, "dynatemp_high": 1}, "dynatemp_high", "lower than"),
    ):
        error = refusal(caps, decoding=[entry])
        assert error.param == f"decoding[0].{param}" and said in error.message


def test_such_names_are_seen_through_by_presets(worded: Capabilities) -> None:
    forced = {"forced": {"dry_multiplier": 1}}
    fill(forced, decoding={"method": "dry", "dry_multiplier": 0})
    with pytest.raises(BadRequest):
        fill(forced, decoding={"method": "dry", "dry_multiplier": 2})


def test_a_neutral_range_says_nothing_beside_low_and_high(worded: Capabilities) -> None:
    assert methods_of(compiled(worded, dynatemp_low=0.5, dynatemp_high=1.5, dynatemp_range=0)) == ["dynatemp"]


def test_what_was_left_out_is_counted(worded: Capabilities) -> None:
    (said,) = compiled(worded, dry_base=2, dry_allowed_length=3).warnings
    assert said.startswith("dry_base and dry_allowed_length were left out")
    (said,) = compiled(worded, dry_base=2).warnings
    assert said.startswith("dry_base was left out")


def test_what_is_neutral_changes_nothing_on_other_routes() -> None:
    nothing = {
        "guidance_scale": 1,
        "negative_prompt": "x",
        "steering": [],
        "decoding": {"method": "dry", "multiplier": 0},
    }
    assert names.that_change(nothing) == []
    assert names.that_change({"dynatemp_range": 1, "dynamic_temperature": False}) == []
    assert names.that_change({"cfg_scale": 2, "steering": [{"vector": "x"}], "explain": {}}) == [
        "steering",
        "explain",
        "cfg_scale",
    ]


def test_complaints_about_the_wrong_kind_of_value_say_what_is_wanted(caps: Capabilities) -> None:
    for fields, param, said in (
        ({"steering": {**PUSH, "where": []}}, "steering.where", "a JSON object is wanted here"),
        ({"explain": True}, "explain", "a JSON object is wanted here"),
        ({"negative_prompt": [], "guidance_scale": 2}, "negative_prompt", "at least 1 item"),
        ({"steering": {**PUSH, "scael": 1}}, "steering.scael", "unknown key; did you mean scale?"),
    ):
        error = refusal(caps, **fields)
        assert (error.param, said in error.message) == (param, True), error.message


PUSH = {"vector": "calm"}
