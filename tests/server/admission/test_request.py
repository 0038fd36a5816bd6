"""Extra fields become the plan they say, or the error that names their path."""

import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from anyjson import EXTRAS
from catalogues import (
    FILES,
    MIXED,
    MOTE,
    PAIR,
    PASTA,
    SPARSE,
    WHEN,
    at_prompt,
    check,
    compiled,
    plan_of,
    receipt,
    refusal,
)
from hypothesis import given, settings
from soak import tries

from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.admission.receipt import receipt as receipt_of
from whipstaff.server.errors import (
    BadRequest,
    Unavailable,
    WhipstaffError,
)
from whipstaff.server.plan import PLAN_KEY, PlacedRequest, RequestPlan
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.fed import Fed
from whipstaff.steering.method import MAX_SCALE, HookPoint
from whipstaff.steering.served import Limit
from whipstaff.steering.where import Where


@pytest.mark.parametrize("fields", [{}, {"steering": None, "decoding": None}, {"temperature": 0.5}])
def test_a_request_without_extras_is_plain(caps: Capabilities, fields: dict[str, Any]) -> None:
    assert compile_extras(fields, caps) is None


def test_what_is_not_said_is_the_vectors_own(caps: Capabilities) -> None:
    assert receipt(caps, [{"vector": "calm"}]) == {
        "vector": "calm",
        "digest": caps.registry.entry("calm").vector.digest,
        "method": "vector",
        "scale": 3.0,
        "layers": [0, 1, 3],
        "sites": ["attn_head", "resid_post"],
        "where": [Where.of("each_last").model_dump(exclude_none=True)],
        # the head outputs of layer 0 get 3 * (0, 1, ... 7), and are 10 long
        "dose": {"relative": pytest.approx(3 * math.sqrt(140) / 10), "at": "attn_head.0"},
        "edited_tokens": 0,
    }
    generation = [Where.of("generation").model_dump(exclude_none=True)]
    assert receipt(caps, {"vector": "late"})["where"] == generation
    assert receipt(caps, {"vector": "iti"})["scale"] == 15.0  # the paper's
    assert receipt(caps, {"vector": "strange"})["method"] == FILES["strange"][0]["method"]


@pytest.mark.parametrize("name", ["scale", "strength", "coefficient"])
def test_the_three_names_of_the_scale_mean_the_same(caps: Capabilities, name: str) -> None:
    assert receipt(caps, [{"vector": "calm", name: -2}])["scale"] == -2.0


@pytest.mark.parametrize("write", [lambda entry: entry, lambda entry: [entry], json.dumps, lambda e: json.dumps([e])])
def test_one_entry_may_stand_alone_or_be_a_json_string(caps: Capabilities, write: Any) -> None:
    entry = {"vector": "calm", "scale": 2}
    assert compiled(caps, steering=write(entry)).plan == compiled(caps, steering=[entry]).plan
    assert compiled(caps, decoding=write(PAIR)).plan == compiled(caps, decoding=[PAIR]).plan


def test_layers_are_a_set_and_all_of_them_are_none_named(caps: Capabilities) -> None:
    assert receipt(caps, [{"vector": "calm", "layers": [3, 1, 3]}])["layers"] == [1, 3]
    assert plan_of(caps, {"vector": "calm", "layers": [3, 1, 0]}) == plan_of(caps, {"vector": "calm"})


def test_both_sides_compile_into_one_plan_and_one_label(caps: Capabilities) -> None:
    both = compiled(caps, steering=[{"vector": "late"}], decoding=[PAIR | {"alpha": 0.5}])
    assert both.label == "mixed"
    assert both.plan.decoding == DecodingPlan(Mix.of({"expert": 0.5, "anti": -0.5}))
    assert both.plan.steering is not None
    assert both.limits == {"expert": 64, "anti": 64}


@pytest.mark.parametrize(
    ("names", "label"),
    [
        (["late"], "caa"),
        (["late", "late"], "caa"),
        (["late", "iti"], "several"),
        (["strange"], "vector"),
        ([], "plain"),
    ],
)
def test_labels_are_few(caps: Capabilities, names: list[str], label: str) -> None:
    steering = [{"vector": name} for name in names]
    assert compiled(caps, steering=steering).label == label
    assert compiled(caps, steering=steering, decoding=PAIR).label == ("mixed" if names else "proxy_tuning")


def test_a_plan_survives_its_journey_to_the_engine(caps: Capabilities) -> None:
    plan = compiled(caps, steering=MIXED, decoding=[PAIR]).plan
    assert plan.readings_id and plan.steering is not None
    assert (len(plan.steering.edits), plan.steering.num_columns, len(plan.steering.schedules)) == (8, 3, 1)
    assert RequestPlan.from_wire(json.loads(json.dumps({PLAN_KEY: plan.to_wire()}))) == plan


TOO_MANY = [{"vector": "calm"}] * 33
LOOK = {"layer": 0, "head": 0, "keys": [0]}
BAD_STEERING: list[tuple[Any, int, str]] = [
    ("{", 400, "steering"),
    ("[" * 100_000, 400, "steering"),
    (TOO_MANY, 400, "steering"),
    ([3], 400, "steering[0]"),
    (False, 400, "steering"),
    ([{}], 400, "steering[0]"),
    ({}, 400, "steering"),
    ({"vector": "nope"}, 404, "steering.vector"),
    ({"vector": "calm", "where": {"prompt": "some"}}, 400, "steering.where.prompt"),
    ('{"vector": "nope"}', 404, "steering.vector"),
    ('[{"vector": "nope"}]', 404, "steering[0].vector"),
    ([{"vector": "nope"}], 404, "steering[0].vector"),
    ([{"vector": 7}], 400, "steering[0].vector"),
    ([{"vector": ""}], 400, "steering[0].vector"),
    ([{"vector": "wide"}], 409, "steering[0].vector"),
    ([{"vector": "calm"}, {"vector": "calm", "sclae": 1}], 400, "steering[1].sclae"),
    ([{"vector": "calm", "scale": "strong"}], 400, "steering[0].scale"),
    ([{"vector": "calm", "scale": math.nan}], 400, "steering[0].scale"),
    ([{"vector": "calm", "scale": math.inf}], 400, "steering[0].scale"),
    ([{"vector": "calm", "scale": MAX_SCALE * 1.01}], 400, "steering[0].scale"),
    ([{"vector": "calm", "scale": -MAX_SCALE * 1.01}], 400, "steering[0].scale"),
    ([{"vector": "calm", "strength": 1e9}], 400, "steering[0].strength"),
    ([{"vector": "calm", "coefficient": []}], 400, "steering[0].coefficient"),
    ([{"vector": "calm", "scale": 1, "strength": 2}], 400, "steering[0].strength"),
    ([{"vector": "calm", "layers": []}], 400, "steering[0].layers"),
    ([{"vector": "calm", "layers": 3}], 400, "steering[0].layers"),
    ([{"vector": "calm", "layers": [1, 2]}], 400, "steering[0].layers"),
    ([{"vector": "calm", "layers": [-1]}], 400, "steering[0].layers"),
    ([{"vector": "calm", "layers": [1, 99]}], 400, "steering[0].layers"),
    ([{"vector": "calm", "layers": [1, "x"]}], 400, "steering[0].layers[1]"),
    ([{"vector": "calm", "where": "everywhere"}], 400, "steering[0].where"),
    ([{"vector": "calm", "where": 5}], 400, "steering[0].where"),
    ([{"vector": "calm", "where": {"promt": "all"}}], 400, "steering[0].where.promt"),
    ([{"vector": "calm", "where": {"prompt": "some"}}], 400, "steering[0].where.prompt"),
    ([{"vector": "calm", "where": {"prompt": [[3, 3]]}}], 400, "steering[0].where"),
    ([{"vector": "calm", "where": {"prompt": [[-1, -4]]}}], 400, "steering[0].where"),
    ([{"vector": "calm", "where": {"generation": [[-1, None]]}}], 400, "steering[0].where"),
    ([{"vector": "calm", "where": {"exclude": {"prompt": "most"}}}], 400, "steering[0].where.exclude.prompt"),
    ([{"vector": "calm", "where": {"exclude": {"exclude": "all"}}}], 400, "steering[0].where.exclude.exclude"),
    ([{"vector": "calm", "where": {"prompt": [[0, 10**30]]}}], 400, "steering[0].where.prompt[0][1]"),
    ([{"vector": "calm", "where": {"tokens": [5, -1]}}], 400, "steering[0].where.tokens[1]"),
    ([{"vector": "calm", "where": {"messages": [{"rôle": "user"}]}}], 400, "steering[0].where.messages[0].rôle"),
    # methods by name, and their own parameters
    ([{"method": "levitation"}], 422, "steering[0].method"),
    ([{"method": "caa"}], 400, "steering[0].method"),
    ([{"method": 3}], 400, "steering[0].method"),
    ([{"vector": "late", "method": "caa"}], 400, "steering[0]"),
    ([{"vector": "late", "features": []}], 400, "steering[0].features"),
    ([{"vector": "sae"}], 400, "steering[0].features"),
    ([{"vector": "sae", "features": [SPARSE, {"feature": 5, "set": 1}]}], 400, "steering[0].features[1].feature"),
    ([{"vector": "sae", "features": [SPARSE, {"feature": 1, "sett": 1}]}], 400, "steering[0].features[1].sett"),
    ([{"vector": "sae", "features": [SPARSE, {"feature": 1}]}], 400, "steering[0].features[1]"),
    ([{"vector": "sae", "features": [SPARSE], "k": 2}], 400, "steering[0].k"),
    ([{"vector": "sae", "features": [SPARSE], "use_error_term": "perhaps"}], 400, "steering[0].use_error_term"),
    ([{"vector": "sae", "features": [], "use_error_term": False}], 400, "steering[0].features"),
    ([{"vector": "knob"}], 400, "steering[0].value"),
    ([{"vector": "knob", "value": [1, 2, 3]}], 400, "steering[0].value"),
    ([{"vector": "plane", "angle": 3, "scale": 1}], 400, "steering[0].scale"),
    ([{"vector": "plane"}], 400, "steering[0].angle"),
    ([{"vector": "rows", "row": 3}], 400, "steering[0].row"),
    ([{"vector": "rows", "where": "all"}], 400, "steering[0].where"),
    # conditions and schedules
    ([{"vector": "late", "when": {"probe": "nope", "above": 0}}], 404, "steering[0].when.probe"),
    ([{"vector": "late", "when": {"probe": "wide", "above": 0}}], 409, "steering[0].when.probe"),
    ([{"vector": "late", "when": {"probe": "calm", "above": 0}}], 400, "steering[0].when.probe"),
    ([{"vector": "late", "when": {"probe": "probe"}}], 400, "steering[0].when"),
    ([{"vector": "late", "when": WHEN | {"below": 1}}], 400, "steering[0].when"),
    ([{"vector": "late", "when": {"above": 1}}], 400, "steering[0].when.probe"),
    ([{"vector": "late", "when": WHEN | {"above": math.nan}}], 400, "steering[0].when.above"),
    ([{"vector": "late", "when": WHEN | {"release": 0}}], 400, "steering[0].when"),
    ([{"vector": "late", "when": WHEN | {"decide": "later"}}], 400, "steering[0].when.decide"),
    ([{"vector": "late", "when": WHEN | {"layer": 1}}], 400, "steering[0].when.layer"),
    ([{"vector": "late", "when": WHEN | {"probe": "probes"}}], 400, "steering[0].when.layer"),
    ([{"vector": "calm", "when": WHEN}], 400, "steering[0].when.probe"),  # it begins where the probe is read
    ([{"vector": "probe"}], 400, "steering[0].vector"),
    ([{"vector": "late", "schedule": "linear"}], 400, "steering[0].schedule"),
    ([{"vector": "late", "schedule": {"shape": "linear"}}], 400, "steering[0].schedule"),
    ([{"vector": "late", "schedule": {"shape": "cosine", "tokens": 0}}], 400, "steering[0].schedule.tokens"),
    ([{"vector": "late", "schedule": {"shape": "exponential"}}], 400, "steering[0].schedule"),
    ([{"vector": "late", "schedule": {"shape": "entropy", "low": 1}}], 400, "steering[0].schedule"),
    ([{"vector": "late", "schedule": {"shape": "constant", "from": 101}}], 400, "steering[0].schedule.from"),
    ([{"vector": "late", "schedule": {"shape": "step"}}], 400, "steering[0].schedule.shape"),
    ([{"vector": "late", "where": where, "when": WHEN | {"probe": "probes", "layer": num, "decide": decide}}
      for decide in ("prompt", "step") for where in ("all", "generation") for num in (0, 1)], 400, "steering[6].when"),
    ([{"vector": "late", "schedule": {"shape": "linear", "tokens": num}} for num in range(1, 6)],
     400, "steering[4].schedule"),
    # what goes only with some methods
    ([{"vector": "sae", "features": [SPARSE], "normalize": True}], 400, "steering[0].normalize"),
    ([{"vector": "calm", "normalize": True}], 400, "steering[0].normalize"),
    ([{"vector": "plane", "angle": 3, "normalize": True}], 400, "steering[0].normalize"),
    ([{"vector": "iti", "normalize": "x"}], 400, "steering[0].normalize"),
    ([{"vector": "soft", "when": WHEN}], 400, "steering[0].when"),
    ([{"vector": "soft", "scale": 2}], 400, "steering[0].scale"),
    # what this server was not started for
    ([{"vector": "angular", "angle": 30}], 422, "steering[0].vector"),
    ([{"vector": "router"}], 422, "steering[0].vector"),
    ([{"method": "mote", "experts": {"1": {"off": [0]}}}], 422, "steering[0].method"),
    ([{"method": "pasta", "heads": {"0": [0]}, "spans": [[0, 1]]}], 422, "steering[0].method"),
    ([{"vector": "prefix"}], 422, "steering[0].vector"),
]  # fmt: skip
BAD_EVERYWHERE: list[tuple[Any, int, str]] = [
    ([{"method": "mote"}], 400, "steering[0].experts"),
    ([{"method": "mote", "experts": {"9": {"off": [0]}}}], 400, "steering[0].experts.9"),
    ([{"method": "mote", "experts": {"1": {"off": [0, 7]}}}], 400, "steering[0].experts.1.off[1]"),
    ([{"method": "mote", "experts": {"0": {"off": [0]}}}], 400, "steering[0].experts"),  # no experts in that layer
    ([{"method": "mote", "experts": {"1": {"off": [0, 1, 2]}}}], 400, "steering[0].experts.1"),
    ([{"method": "mote", "experts": {"1": {"off": [num]}}} for num in range(3)], 400, "steering[2].experts.1"),
    ([MOTE | {"schedule": {"shape": "constant"}}], 400, "steering[0].schedule"),
    ([MOTE | {"where": {"tokens": [3]}}], 400, "steering[0].where"),
    ([{"method": "pasta", "heads": {"0": [0], "3": [0, 2]}, "spans": [[0, 1]]}], 400, "steering[0].heads.3[1]"),
    ([{"method": "pasta", "heads": {"2": [0]}, "spans": [[0, 1]]}], 400, "steering[0].heads.2"),
    ([{"method": "attention_override", "edits": [LOOK, LOOK | {"layer": 4}]}], 400, "steering[0].edits[1].layer"),
    ([{"method": "pasta", "spans": [[0, 1]]}], 400, "steering[0].heads"),
    ([{"vector": "prefix", "where": "all"}], 400, "steering[0].where"),
    ([{"vector": "prefix"}, {"vector": "prefix"}], 400, "steering[1].vector"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "status", "param"), BAD_STEERING)
def test_bad_steering_is_refused_by_its_path(caps: Capabilities, value: Any, status: int, param: str) -> None:
    error = refusal(caps, steering=value)
    assert (error.status, error.param) == (status, param), error.message
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("value", "status", "param"), BAD_EVERYWHERE)
def test_bad_steering_is_refused_where_everything_is_on(
    everything: Capabilities, value: Any, status: int, param: str
) -> None:
    error = refusal(everything, steering=value)
    assert (error.status, error.param) == (status, param), error.message


def test_the_same_reading_and_the_same_schedule_are_taken_by_any_number_of_entries(caps: Capabilities) -> None:
    schedule = {"shape": "linear", "tokens": 3}
    plan = plan_of(
        caps, *({"vector": "late", "when": WHEN | {"above": num}, "schedule": schedule} for num in range(30))
    )
    assert (len(plan.edits), plan.num_columns, len(plan.probes), len(plan.schedules)) == (30, 1, 1, 1)


@pytest.mark.parametrize("value", ["maybe", "", 0, False, [], {"error": 1}])
def test_on_unavailable_is_error_or_ignore(caps: Capabilities, value: Any) -> None:
    error = refusal(caps, on_unavailable=value)
    assert (error.status, error.param) == (400, "on_unavailable")


def test_a_server_with_nothing_loaded_says_what_flag_would_help(nothing: Capabilities) -> None:
    by_vector, by_method = refusal(nothing, steering={"vector": "calm"}), refusal(nothing, decoding=PAIR)
    assert (by_vector.status, by_method.status) == (404, 422)
    assert "--vectors" in by_vector.message and "--aux" in by_method.message


@pytest.mark.parametrize(
    ("entry", "dense", "sparse"),
    [
        ({"vector": "angular", "angle": 3}, "--steering-sites attn_in", "--steering-sites attn_in"),
        ({"vector": "router"}, "has no experts", "--steering-sites router"),
        (MOTE, "has no experts", "--steering-sites router"),
        (PASTA, "--steering-sites attention", "--steering-sites attention"),
        ({"vector": "prefix"}, "--steering-sites attention", "--steering-sites attention"),
    ],
)
def test_what_was_left_alone_says_which_flag_would_help(
    caps: Capabilities, everything: Capabilities, entry: dict[str, Any], dense: str, sparse: str
) -> None:
    plain_sparse = replace(caps, registry=everything.registry)
    for server, words in ((caps, dense), (plain_sparse, sparse)):
        assert words in refusal(server, steering=entry).message
    assert compiled(everything, steering=entry).steering.entries
    if entry.get("vector") == "angular":  # of its layers, those that are hooked
        elsewhere = replace(caps, hook_points=caps.hook_points | {HookPoint("attn_in", 1)})
        assert compiled(elsewhere, steering=entry).steering.entries


def test_soft_prompts_need_a_model_that_takes_rows(caps: Capabilities) -> None:
    error = refusal(replace(caps, takes_soft_prompts=False), steering={"vector": "soft"})
    assert (error.status, error.param) == (422, "steering.vector")


@pytest.mark.parametrize(
    ("entry", "is_taken"),
    [
        ({"vector": "iti"}, True),
        ({"vector": "lofit"}, True),
        ({"vector": "iti", "renorm": True}, False),
        ({"vector": "headsae", "features": [SPARSE]}, False),
        ({"vector": "headsae", "features": [SPARSE], "use_error_term": False}, False),
        ({"vector": "sae", "features": [SPARSE], "use_error_term": False}, True),
        ({"vector": "sae", "features": [SPARSE], "renorm": True}, True),  # the stream is whole on every rank
    ],
)
def test_what_reads_all_heads_at_once_is_refused_where_ranks_share_them(
    caps: Capabilities, entry: dict[str, Any], is_taken: bool
) -> None:
    shared = replace(caps, tensor_parallel=2)
    assert compiled(caps, steering=entry).steering.entries
    if is_taken:
        assert compiled(shared, steering=entry).plan == compiled(caps, steering=entry).plan
        return
    error = refusal(shared, steering=entry)
    assert (error.status, error.param) == (422, "steering.vector") and "--tensor-parallel-size 1" in error.message
    beside = compiled(shared, steering=[entry, {"vector": "late"}], on_unavailable="ignore")
    assert beside.plan.steering == plan_of(caps, {"vector": "late"})


def test_what_a_server_lacks_is_left_out_only_when_asked_and_said_so(caps: Capabilities) -> None:
    unknown_probe = {"vector": "late", "when": {"probe": "nope", "above": 0}}
    made = compiled(
        caps,
        on_unavailable="ignore",
        steering=[
            *({"vector": name} for name in ("nope", "calm", "wide")),
            {"method": "levitation"},
            unknown_probe,
            MOTE,
        ],
        decoding=[{"method": "telepathy"}, PAIR | {"expert": "absent"}],
    )
    assert [entry.path for entry in made.steering.entries] == ["steering[1]"]
    assert made.plan.steering == plan_of(caps, {"vector": "calm"})
    assert made.plan.decoding is None
    starts = [warning.split(" was left out")[0] for warning in made.warnings]
    assert starts == [
        *("steering[0].vector", "steering[2].vector", "steering[3].method", "steering[4].when.probe"),
        *("steering[5].method", "decoding[0].method", "decoding[1].expert"),
    ]


@pytest.mark.parametrize(
    "fields", [{"steering": [{"vector": "calm", "scale": "x"}]}, {"decoding": [PAIR | {"alpha": 1e9}]}]
)
def test_bad_values_are_refused_even_when_what_is_missing_may_be_left_out(
    caps: Capabilities, fields: dict[str, Any]
) -> None:
    assert refusal(caps, on_unavailable="ignore", **fields).status == 400


@pytest.mark.parametrize(
    "where",
    [
        {"prompt": [[9, 12]]},
        {"generation": [[3, 5]]},
        {"prompt": "all", "exclude": {"prompt": "all"}},
        {"tokens": [5], "exclude": {"prompt": "all", "generation": "all"}},
        {},
    ],
)
def test_a_clause_that_selects_nothing_is_refused_by_the_entry_that_has_it(
    caps: Capabilities, everything: Capabilities, where: dict[str, Any]
) -> None:
    for other in ({"vector": "late"}, PASTA):
        if other is PASTA and "tokens" in where:
            continue  # refused anyway
        with pytest.raises(BadRequest) as caught:
            check(compiled(everything, steering=[{"vector": "calm"}, other | {"where": where}]))
        assert caught.value.param == "steering[1].where"
    assert check(compiled(caps, steering={"vector": "late", "where": {"prompt": [[8, 12]]}})) == 4


@pytest.mark.parametrize(
    ("clauses", "param"),
    [
        ([{"tokens": [5, 6]}, {"tokens": [6, 5, 5], "generation": "all"}], None),
        ([{"tokens": [5]}, {"generation": "all", "exclude": {"tokens": [5]}}, "all"], None),
        ([{"tokens": [5]}, {"tokens": [5, 6]}], "steering[1].where.tokens"),
        (["all", {"tokens": [5]}, {"exclude": {"tokens": [6]}, "prompt": "all"}], "steering[2].where.exclude.tokens"),
        ([{"tokens": [5, 6], "exclude": {"tokens": [6]}}], "steering[0].where.exclude.tokens"),
    ],
)
def test_a_request_tells_one_set_of_tokens_apart(caps: Capabilities, clauses: list[Any], param: str | None) -> None:
    """The engine has one row for them: with two sets, every clause would take the tokens of both."""
    made = compiled(caps, steering=[{"vector": "late", "where": where} for where in clauses])
    if param is None:
        assert check(made) == 4
        return
    with pytest.raises(BadRequest, match="one set of tokens") as caught:
        check(made)
    assert caught.value.param == param


def test_messages_of_every_kind_of_entry_become_windows(everything: Capabilities) -> None:
    class Chat:
        def spans(self, chosen: Any) -> list[tuple[int, int]]:
            return [(2, 4)] if chosen.role == "user" else []

    where = {"messages": [{"role": "user"}]}
    entries = [entry | {"where": where} for entry in ({"vector": "late"}, PASTA, {"vector": "calm"})]
    made = compiled(everything, steering=entries)
    placed = at_prompt(made, Prompt(9, list(range(9)), 64, None, Chat()))  # type: ignore[arg-type]
    assert placed.plan.steering is not None
    wheres = [one.where for one in placed.plan.steering.edits] + [
        one.where for one in placed.plan.steering.module_edits
    ]
    assert [where.intervals(9) for where in wheres] == [[(2, 4)]] * 3
    assert [said["where"][0]["prompt"] for said in receipt_of(made, [placed])["steering"]] == [[(2, 4)]] * 3
    absent = compiled(everything, steering=[{"vector": "late"}, PASTA | {"where": {"messages": [{"role": "tool"}]}}])
    with pytest.raises(BadRequest) as caught:
        at_prompt(absent, Prompt(9, list(range(9)), 64, None, Chat()))  # type: ignore[arg-type]
    assert caught.value.param == "steering[1].where.messages"


def test_prompts_of_a_request_know_nothing_of_each_other(everything: Capabilities) -> None:
    made = compiled(everything, steering=[{"vector": "soft", "insert": 1}, {"vector": "late"}])
    before, prompts = made.plan, [Prompt(num, list(range(num)), 64, None) for num in (9, 4)]
    first, second = (at_prompt(made, prompt, num) for prompt, num in zip(prompts, (7, 5), strict=True))
    assert (first.num_tokens, first.max_tokens, second.num_tokens, second.max_tokens) == (12, 7, 7, 5)
    assert at_prompt(made, prompts[0], 7) == first != second
    assert made.plan is before and made.warnings == ()
    with pytest.raises(FrozenInstanceError):
        made.plan = first.plan  # type: ignore[misc]


def test_a_prefix_stands_before_soft_rows_and_both_before_the_prompt(everything: Capabilities) -> None:
    made = compiled(everything, steering=[{"vector": "soft"}, {"vector": "prefix"}])
    placed = at_prompt(made, Prompt(3, [7, 8, 9], 64, None))
    assert placed.ids is not None and placed.plan.steering is not None
    assert placed.ids[5:] == [7, 8, 9]
    assert [(insert.start, insert.num) for insert in placed.plan.steering.inserts] == [(0, 2), (2, 3)]
    said = receipt_of(made, [placed], [Fed(8, 10, [])])["steering"]
    assert said[0]["prompt_tokens"] == 3 and said[1]["where"] == [{"prompt": [(0, 2)], "generation": "none"}]
    error = refusal(everything, steering={"vector": "prefix"}, decoding=PAIR)
    assert (error.status, error.param) == (400, "steering.vector")


SERVERS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "limited": {"limit": Limit(0.5)},
    "clamped": {"limit": Limit(0.5, "clamp")},
    "two ranks": {"tensor_parallel": 2},
    "half precision": {"dtype": "float16"},
}


@pytest.mark.parametrize("server", SERVERS)
@settings(max_examples=tries(300), deadline=None)
@given(fields=EXTRAS)
def test_any_json_is_compiled_or_refused_with_an_answer_that_can_be_sent(
    everything: Capabilities, server: str, fields: dict[str, Any]
) -> None:
    made, placed = None, list[PlacedRequest]()
    try:
        made = compile_extras(fields, replace(everything, **SERVERS[server]))
        if made is not None:
            placed = [at_prompt(made, Prompt(9, list(range(9)), 64, None))]
    except WhipstaffError as error:
        assert 400 <= error.status < 500
        assert error.param is not None
        json.dumps(error.body(), ensure_ascii=False, allow_nan=False).encode()
    if made is not None:
        said = receipt_of(made, placed)
        json.dumps(said, ensure_ascii=False, allow_nan=False).encode()
        plan = placed[0].plan if placed else made.plan
        assert RequestPlan.from_wire(json.loads(json.dumps({PLAN_KEY: plan.to_wire()}))) == plan
        if SERVERS[server].get("limit"):
            assert all(entry["dose"]["relative"] <= 0.501 for entry in said["steering"] if entry.get("dose"))


def test_a_key_that_utf8_cannot_hold_is_refused_in_words_it_can(caps: Capabilities) -> None:
    error = refusal(caps, steering={"vector": "calm", "\ud800": 1})
    assert error.status == 400
    json.dumps(error.body(), ensure_ascii=False).encode()


def test_a_request_that_needs_more_slots_than_there_are_is_refused(caps: Capabilities) -> None:
    """It would otherwise wait for ever, and everybody steered behind it."""
    windows = [{"vector": "late", "where": {"prompt": [[start, None]]}} for start in range(4)]
    few = replace(caps, num_slots=3)
    with pytest.raises(Unavailable, match="--steering-slots") as caught:
        check(compiled(few, steering=windows))
    assert caught.value.param == "steering"
    assert check(compiled(few, steering=windows[:3])) == 4


def test_an_autoencoder_without_its_error_term_takes_room_for_all_its_features(caps: Capabilities) -> None:
    """80 lines of numbers, at eight a slot; what the entry says is in its receipt, and a neutral edit is not off."""
    entry = {"vector": "manysae", "features": [{"feature": 3, "scale": 1.0}]}
    assert receipt(caps, entry)["use_error_term"] is True
    said = receipt(caps, entry | {"use_error_term": False})
    assert said["use_error_term"] is False and said["dose"]["relative"] > 0.5
    assert compiled(caps, steering=entry).plan != compiled(caps, steering=entry | {"use_error_term": False}).plan
    few = replace(caps, num_slots=9)
    assert check(compiled(few, steering=entry)) == 4
    with pytest.raises(Unavailable, match=r"take 10 slots together.* --steering-slots") as caught:
        check(compiled(few, steering=entry | {"use_error_term": False}))
    assert caught.value.param == "steering"
    assert check(compiled(replace(caps, num_slots=10), steering=entry | {"use_error_term": False})) == 4
