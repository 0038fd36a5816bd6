"""Entries of `decoding` become a mix and rewrites, or the error that names their path."""

import json
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from catalogues import PAIR, SHAPE, TENSORS, UNIT, at_prompt, check, compiled, refusal

from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.admission.receipt import receipt as receipt_of
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.api.method_table import method_table
from whipstaff.server.errors import BadRequest, Unavailable
from whipstaff.server.plan import PLAN_KEY, PositionedPlan, RequestPlan
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.prompt.vocabulary import Vocabulary
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorSnapshot, read_vectors
from whipstaff.steering import vector_file
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.served import AttentionAbilities
from whipstaff.steering.vector_file import Header


def test_mixes_of_one_request_add_up(caps: Capabilities) -> None:
    other = {"method": "proxy_tuning", "expert": "short", "antiexpert": "anti", "alpha": 2}
    summed = Mix.of({"expert": 1.0, "anti": -3.0, "short": 2.0})
    assert compiled(caps, decoding=[PAIR, other]).plan.decoding == DecodingPlan(summed)


BAD_DECODING: list[tuple[Any, int, str]] = [
    ([3], 400, "decoding[0]"),
    ([{}], 400, "decoding[0].method"),
    ([{"method": ["proxy_tuning"]}], 400, "decoding[0].method"),
    ([{"method": "telepathy"}], 422, "decoding[0].method"),
    ({"method": "telepathy"}, 422, "decoding.method"),
    ([{"method": "proxy_tuning", "antiexpert": "anti"}], 400, "decoding[0].expert"),
    ([PAIR, PAIR | {"expert": "absent"}], 404, "decoding[1].expert"),
    ([PAIR | {"antiexpert": "absent"}], 404, "decoding[0].antiexpert"),
    ([PAIR | {"antiexpert": "expert"}], 400, "decoding[0].antiexpert"),
    ([PAIR | {"alpha": "x"}], 400, "decoding[0].alpha"),
    ([PAIR | {"alpha": math.nan}], 400, "decoding[0].alpha"),
    ([PAIR | {"alpha": 101}], 400, "decoding[0].alpha"),
    ([PAIR | {"beta": 1}], 400, "decoding[0].beta"),
    ([PAIR] * 9, 400, "decoding"),
]


@pytest.mark.parametrize(("value", "status", "param"), BAD_DECODING)
def test_bad_decoding_is_refused_by_its_path(caps: Capabilities, value: Any, status: int, param: str) -> None:
    error = refusal(caps, decoding=value)
    assert (error.status, error.param) == (status, param), error.message


def test_an_auxiliary_models_context_bounds_the_request(caps: Capabilities) -> None:
    made = compiled(caps, decoding=PAIR | {"expert": "short"})
    assert check(made, prompt_len=4, max_tokens=50, is_explicit=False) == 6  # not said: as much as fits
    assert check(made, prompt_len=4, max_tokens=6) == 6
    for prompt_len, max_tokens, is_explicit in ((4, 7, True), (10, 1, False), (99, 1, True)):
        with pytest.raises(BadRequest, match="follows at most") as caught:
            check(made, prompt_len, max_tokens, is_explicit)
        assert caught.value.param == "decoding.expert"


@pytest.mark.parametrize(
    ("fields", "path", "said"),
    [
        ({"decoding": {"method": "DoLa"}}, "decoding.method", "did you mean dola?"),
        ({"decoding": {"method": "proxy-tuning"}}, "decoding.method", "did you mean proxy_tuning?"),
        ({"decoding": {"method": "tea leaves"}}, "decoding.method", "there are: proxy_tuning"),
        ({"steering": {"method": "PASTA!"}}, "steering.method", "did you mean pasta?"),
        ({"steering": {"method": "tea leaves"}}, "steering.method", "these need no vector: "),
    ],
)
def test_a_method_by_about_its_name_is_told(caps: Capabilities, fields: dict[str, Any], path: str, said: str) -> None:
    with pytest.raises(Unavailable, match=re.escape(said)) as caught:
        compiled(caps, **fields)
    assert caught.value.param == path


@pytest.mark.parametrize("fields", [{"decoding": {"method": "dola"}}, {"dola_layers": [1, 0]}, {"dola_layers": "low"}])
def test_what_a_method_reads_of_early_layers_is_kept(early: Capabilities, fields: dict[str, Any]) -> None:
    layers = [0, 1] if fields.get("dola_layers") == [1, 0] else [0]
    made = compiled(early, **fields)
    assert made.plan.steering == SteeringPlan((), keeps=tuple(layers))
    assert made.plan.decoding is not None and made.plan.decoding.early_layers == tuple(layers)
    assert RequestPlan.from_wire(json.loads(json.dumps({PLAN_KEY: made.plan.to_wire()}))) == made.plan
    (said,) = receipt_of(made)["decoding"]
    assert (said["method"], said["layers"], receipt_of(made)["steering"]) == ("dola", layers, [])
    assert made.label == "dola"


def test_keeping_goes_together_with_steering(early: Capabilities) -> None:
    plan = compiled(early, steering={"vector": "calm", "where": "generation"}, dola_layers=[0]).plan
    assert plan.steering is not None and len(plan.steering.edits) == 1 and plan.steering.keeps == (0,)
    placed = PositionedPlan(plan, 5)
    assert (len(placed.rows), placed.first_edited) == (2, 5)


@pytest.mark.parametrize(
    ("fields", "status", "param", "reason"),
    [
        ({"dola_layers": [4]}, 400, "dola_layers", "the model has 4 blocks, its early layers are 0 to 3"),
        ({"dola_layers": [0, -1]}, 400, "dola_layers[1]", "greater than or equal to 0"),
        ({"dola_layers": "middle"}, 400, "dola_layers", "or a list of layers"),
        ({"dola_layers": [0, 2]}, 422, "dola_layers", "reads layer 2, .* start it with --early-layers 0,1,2"),
        ({"decoding": [{"method": "dola", "layers": []}]}, 400, "decoding[0].layers", "or a list of layers"),
        ({"decoding": [{"method": "dola", "layers": "high"}]}, 422, "decoding[0].layers", "--early-layers 0,1,2"),
        (
            {"decoding": {"method": "dola", "relative_top": 1.5}},
            400,
            "decoding.relative_top",
            "less than or equal to 1",
        ),
        (
            {"decoding": {"method": "dola", "final_norm_on_candidates": True}},
            400,
            "decoding.final_norm_on_candidates",
            "does not show its final norm",
        ),
    ],
)
def test_early_layers_that_are_not_there(
    early: Capabilities, fields: dict[str, Any], status: int, param: str, reason: str
) -> None:
    error = refusal(early, **fields)
    assert (error.status, error.param) == (status, param)
    assert re.search(reason, error.message)


# ---- what is tried before it is chosen


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory, caps: Capabilities) -> Capabilities:
    """A server that looks ahead, with both kinds of KWD's classifiers and a vector."""
    folder = tmp_path_factory.mktemp("ahead")
    vector_file.write(
        folder / "prefix.safetensors", Header(method="prefix_classifier", model=SHAPE), {"weight": UNIT[:2]}
    )
    vector_file.write(folder / "token.safetensors", Header(method="token_classifier", model=SHAPE), {"weight": UNIT})
    vector_file.write(folder / "calm.safetensors", Header(method="vector", model=SHAPE), TENSORS)
    registry = VectorSnapshot(read_vectors([folder]), SHAPE)
    return replace(caps, registry=registry, words=Vocabulary([], {}, (), None), vocabulary=8, looks_ahead=True)


KWD = {"method": "kwd", "classifier": "prefix"}


def test_a_classifier_of_either_kind(ahead: Capabilities) -> None:
    found = {name: compiled(ahead, decoding=KWD | {"classifier": name}) for name in ("prefix", "token")}
    assert [one.decoding[0].ahead for one in found.values()] == ["classifier", ""]
    for one in found.values():
        one.check_logprobs(scores_prompt=False)
    found["token"].check_logprobs(scores_prompt=True)
    with pytest.raises(BadRequest, match="score an answer with the method `forced`") as error:
        found["prefix"].check_logprobs(scores_prompt=True)
    assert error.value.param == "decoding.classifier"
    compiled(ahead, decoding=KWD, logprobs_source="base").check_logprobs(scores_prompt=True)


def test_the_plan_says_how_many_tokens_are_tried(ahead: Capabilities) -> None:
    """For each of an answer's: by a classifier that looks ahead alone."""
    found = {name: compiled(ahead, decoding=KWD | {"classifier": name, "k": 7}) for name in ("prefix", "token")}
    plans = [one.plan.decoding for one in found.values()]
    assert [plan and plan.num_tried for plan in plans] == [7, 0]
    able = replace(ahead, num_hidden_states=1)
    both = compiled(able, decoding=[KWD, {"method": "contrastive_search", "k": 3}]).plan.decoding
    assert both is not None and both.num_tried == 50 + 3
    assert both == DecodingPlan.from_wire(both.to_wire())


def test_a_token_that_is_tried_has_no_entropy_yet(ahead: Capabilities) -> None:
    calm = {"vector": "calm", "schedule": {"shape": "entropy", "low": 1, "high": 2}}
    error = refusal(ahead, steering=[calm], decoding=[KWD])
    assert (error.status, error.param) == (400, "steering[0].schedule") and "decoding[0].classifier" in error.message
    compiled(ahead, steering=[calm], decoding=[KWD | {"classifier": "token"}])
    compiled(ahead, steering=[{"vector": "calm", "schedule": {"shape": "linear", "tokens": 4}}], decoding=[KWD])


def test_who_does_not_look_ahead_names_the_flag(ahead: Capabilities) -> None:
    blind = replace(ahead, looks_ahead=False)
    error = refusal(blind, decoding=KWD)
    assert (error.status, error.param) == (422, "decoding.classifier") and "--lookahead" in error.message
    skipped = compiled(blind, decoding=KWD, on_unavailable="ignore")
    assert not skipped.decoding and "--lookahead" in skipped.warnings[0]
    rows = [next(row for row in method_table(server, "base") if row["name"] == "kwd") for server in (ahead, blind)]
    assert [row["schema"]["properties"]["classifier"]["enum"] for row in rows] == [["prefix", "token"], ["token"]]
    (row,) = (
        row for row in method_table(replace(blind, registry=VectorSnapshot({}, SHAPE)), "base") if row["name"] == "kwd"
    )
    assert row["reason"] == (
        "start the server with --vectors PATH of a token_classifier or, with --lookahead, a prefix_classifier"
    )


READING: dict[str, tuple[dict[str, Any], dict[str, str]]] = {  # what a method needs of a server, and each one's flag
    "opera_lite": ({"reads_attention": True}, {"reads_attention": "--attention-rows"}),
    "contrastive_search": (
        {"looks_ahead": True, "num_hidden_states": 2},
        {"looks_ahead": "--lookahead", "num_hidden_states": "--hidden-states N"},
    ),
}


@pytest.mark.parametrize("name", READING)
def test_who_lacks_what_a_method_reads_names_the_flag(ahead: Capabilities, name: str) -> None:
    has, flags = READING[name]
    able = replace(ahead, **{"looks_ahead": False} | has)
    assert compiled(able, decoding={"method": name}).decoding[0].method.name == name
    for missing, flag in flags.items():
        lacking = replace(able, **{missing: type(has[missing])(0)})
        error = refusal(lacking, decoding=[{"method": name}])
        assert (error.status, error.param) == (422, "decoding[0].method")
        assert error.message.endswith(f"start it with {flag}")
        (row,) = (row for row in method_table(lacking, "base") if row["name"] == name)
        assert not row["available"] and flag in row["reason"]
        off = {"penalty_weight": 0} if name == "opera_lite" else {"penalty_alpha": 0}
        assert compiled(lacking, decoding={"method": name, **off}).warnings == ("decoding was left out: it is off",)
    (row,) = (row for row in method_table(able, "base") if row["name"] == name)
    assert row["available"]


@pytest.fixture
def reading(ahead: Capabilities) -> Capabilities:
    return replace(ahead, looks_ahead=True, reads_attention=True, num_hidden_states=1)


def test_contrastive_search_by_hugging_faces_names(reading: Capabilities) -> None:
    """`top_k` is vLLM's own field, which says k only where `penalty_alpha`, or an entry, asks for the method."""

    def made(top_k: int, **fields: Any) -> CompiledRequest | None:
        return compile_extras(fields, reading, shared={"top_k": top_k})

    def k_of(found: CompiledRequest | None) -> int:
        assert found is not None
        said: int = found.decoding[0].params.model_dump()["k"]
        return said

    assert k_of(made(8, penalty_alpha=0.6)) == k_of(made(8, decoding={"method": "contrastive_search"})) == 8
    assert k_of(made(8, decoding={"method": "contrastive_search", "k": 5})) == 5
    assert [k_of(made(top_k, penalty_alpha=0.6)) for top_k in (0, -1)] == [4, 4]
    with pytest.raises(BadRequest) as error:
        made(1000, penalty_alpha=0.6)
    assert error.value.param == "top_k"
    assert refusal(reading, penalty_alpha=2.0).param == "penalty_alpha"
    assert made(8) is None
    off = made(1000, penalty_alpha=0)
    assert off is not None and off.is_plain and off.warnings == ("penalty_alpha was left out: it is off",)
    plan = compiled(reading, penalty_alpha=0.6).plan.decoding
    assert plan is not None and plan.keeps_hidden
    plan = compiled(reading, decoding={"method": "top_a"}).plan.decoding
    assert plan is not None and not plan.keeps_hidden


def test_what_is_tried_scores_no_prompt(reading: Capabilities) -> None:
    with pytest.raises(BadRequest, match="score an answer with the method `forced`") as error:
        compiled(reading, decoding={"method": "contrastive_search"}).check_logprobs(scores_prompt=True)
    assert error.value.param == "decoding.method"


@pytest.mark.parametrize(("layer", "is_refused"), [(3, True), (1, False)])
def test_attention_that_is_edited_is_not_read(reading: Capabilities, layer: int, is_refused: bool) -> None:
    """In the last layer, of four."""
    able = replace(reading, attention=AttentionAbilities([0, 1, 2, 3], bias=[0, 1, 2, 3]), num_layers=4)
    pasta = {"method": "pasta", "heads": {str(layer): [0]}, "spans": [[0, 1]]}
    override = {"method": "attention_override", "edits": [{"layer": layer, "head": 0, "keys": [0]}]}
    for entry, param in ((pasta, "heads"), (override, "edits")):
        compiled(able, steering=entry, decoding={"method": "top_a"})
        if is_refused:
            error = refusal(able, steering=[entry], decoding={"method": "opera_lite"})
            assert error.status == 400 and error.param == f"steering[0].{param}" and "opera_lite" in error.message
        else:
            compiled(able, steering=[entry], decoding={"method": "opera_lite"})


def test_a_penalty_comes_before_the_temperature(reading: Capabilities) -> None:
    """Whatever the model runner: with the second one, vLLM's own temperature would come first."""
    assert compiled(reading, decoding={"method": "opera_lite"}).draws_itself
    assert compiled(reading, decoding={"method": "dry", "sequence_breakers": []}).draws_itself


def test_a_span_is_placed_in_the_prompt(reading: Capabilities) -> None:
    made = compiled(reading, decoding={"method": "opera_lite", "span": [[1, 3], [-2, None]]})
    placed = at_prompt(made, Prompt(9, list(range(9)), 64, None))
    assert placed.plan.decoding is not None
    setting = json.loads(placed.plan.decoding.rewrites[0].setting)
    assert setting["span"] == [[1, 3], [7, 9]]
    with pytest.raises(BadRequest) as error:
        at_prompt(made, Prompt(2, [0, 1], 64, None))
    assert error.value.param == "decoding.span[0]"
