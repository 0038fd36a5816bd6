"""Extra fields become the plan they say, or the error that names their path; vector files are what they claim."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save
from torch import Tensor

from whipstaff.decoding.methods import METHODS
from whipstaff.server.engine.request import KEY, PlacedPlan, RequestPlan
from whipstaff.server.errors import BadRequest, NotFound, Unavailable, VectorUnfit, WhipstaffError, json_path
from whipstaff.server.registry import BadVectorFile, Registry
from whipstaff.server.schema import NOT_BUILT, Catalogue, Compiled, compile_extras, method_table
from whipstaff.steering import artifacts
from whipstaff.steering.artifacts import Header, ModelShape, Vector, parse
from whipstaff.steering.edits import compose, growth
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.plan import MAX_SCALE, PlannedEdit, RowEdit, SteeringPlan
from whipstaff.steering.where import SHORTHANDS, Region, Where

from .anyjson import EXTRAS

SHAPE = ModelShape(architecture="Test", hidden_size=8, num_layers=4, num_heads=2, head_dim=4)
TENSORS = {
    "resid_post.1.add": torch.linspace(-1, 1, 8),
    "resid_post.3.add": torch.full((8,), 0.1),
    "resid_post.3.gain": torch.full((8,), -1.0),
    "attn_head.0.add": torch.arange(8.0).reshape(2, 4),
}
LIMITS = {"expert": 64, "anti": 64, "short": 10}


def packed(tensors: dict[str, Tensor] | None = None, header: dict[str, Any] | None = None) -> bytes:
    """A vector file, right or wrong: nothing is checked."""
    said = {"method": "test", "model": SHAPE.model_dump()} | (header or {})
    return save(TENSORS if tensors is None else tensors, metadata={"whipstaff": json.dumps(said)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    artifacts.write(folder / "calm.safetensors", Header(method="caa", model=SHAPE, scale=3.0), TENSORS)
    single = {"resid_post.2.add": torch.ones(8)}
    artifacts.write(folder / "late.safetensors", Header(method="caa", model=SHAPE, where="generation"), single)
    wide = SHAPE.model_copy(update={"hidden_size": 16})
    artifacts.write(folder / "wide.safetensors", Header(method="caa", model=wide), {"resid_post.0.add": torch.ones(16)})
    return folder


@pytest.fixture(scope="module")
def have(folder: Path) -> Catalogue:
    return Catalogue(Registry([folder], SHAPE), LIMITS)


@pytest.fixture(scope="module")
def nothing() -> Catalogue:
    return Catalogue(Registry([], SHAPE), {})


def compiled(have: Catalogue, **fields: Any) -> Compiled:
    result = compile_extras(fields, have)
    assert result is not None
    return result


def refusal(have: Catalogue, **fields: Any) -> WhipstaffError:
    with pytest.raises(WhipstaffError) as caught:
        compile_extras(fields, have)
    return caught.value


PAIR = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}


# ---- compiling


@pytest.mark.parametrize("fields", [{}, {"steering": None, "decoding": None}, {"temperature": 0.5}])
def test_a_request_without_extras_is_plain(have: Catalogue, fields: dict[str, Any]) -> None:
    assert compile_extras(fields, have) is None


def test_what_is_not_said_is_the_vectors_own(have: Catalogue) -> None:
    entry = compiled(have, steering=[{"vector": "calm"}]).receipt([])["steering"][0]
    assert entry == {
        "vector": "calm",
        "digest": have.registry.entry("calm").vector.digest,
        "method": "caa",
        "scale": 3.0,
        "layers": [0, 1, 3],
        "sites": ["attn_head", "resid_post"],
        "where": Where.of("each_last").model_dump(),
        "edited_tokens": 0,
    }
    assert compiled(have, steering=[{"vector": "late"}]).steering[0]["where"] == Where.of("generation").model_dump()


@pytest.mark.parametrize("name", ["scale", "strength", "coefficient"])
def test_the_three_names_of_the_scale_mean_the_same(have: Catalogue, name: str) -> None:
    plan = compiled(have, steering=[{"vector": "calm", name: -2}]).plan.steering
    assert plan is not None
    assert plan.edits[0].edit.scale == -2.0


@pytest.mark.parametrize("write", [lambda entry: entry, lambda entry: [entry], json.dumps, lambda e: json.dumps([e])])
def test_one_entry_may_stand_alone_or_be_a_json_string(have: Catalogue, write: Any) -> None:
    entry = {"vector": "calm", "scale": 2}
    assert compiled(have, steering=write(entry)).plan == compiled(have, steering=[entry]).plan
    assert compiled(have, decoding=write(PAIR)).plan == compiled(have, decoding=[PAIR]).plan


def test_layers_are_a_set_and_all_of_them_are_none_named(have: Catalogue) -> None:
    some = compiled(have, steering=[{"vector": "calm", "layers": [3, 1, 3]}])
    everything = compiled(have, steering=[{"vector": "calm", "layers": [3, 1, 0]}])
    assert some.steering[0]["layers"] == [1, 3]
    assert everything.plan == compiled(have, steering=[{"vector": "calm"}]).plan


def test_both_sides_compile_into_one_plan_and_one_label(have: Catalogue) -> None:
    both = compiled(have, steering=[{"vector": "late"}], decoding=[PAIR | {"alpha": 0.5}])
    assert both.label == "proxy_tuning+vector"
    assert both.plan.mix is not None and both.plan.steering is not None
    assert both.plan.mix.weights == {"expert": 0.5, "anti": -0.5}
    assert both.limits == {"expert": 64, "anti": 64}


def test_mixes_of_one_request_add_up(have: Catalogue) -> None:
    other = {"method": "proxy_tuning", "expert": "short", "antiexpert": "anti", "alpha": 2}
    mix = compiled(have, decoding=[PAIR, other]).plan.mix
    assert mix is not None
    assert mix.weights == {"expert": 1.0, "anti": -3.0, "short": 2.0}


def test_a_plan_survives_its_journey_to_the_engine(have: Catalogue) -> None:
    plan = compiled(
        have,
        steering=[{"vector": "calm", "layers": [1], "where": {"prompt": [[0, -1]], "exclude": {"prompt": [[2, 3]]}}}],
        decoding=[PAIR],
    ).plan
    assert RequestPlan.from_wire(json.loads(json.dumps({KEY: plan.to_wire()}))) == plan


def test_the_receipt_counts_the_tokens_that_were_edited(have: Catalogue) -> None:
    made = compiled(have, steering=[{"vector": "calm"}, {"vector": "late", "where": {"generation": [[1, 3]]}}])
    # two sequences: 5 prompt tokens of which the last is edited, then 9 and 1 more positions fed
    counts = [entry["edited_tokens"] for entry in made.receipt([(5, 14), (5, 6)])["steering"]]
    assert counts == [(1 + 9) + (1 + 1), 2 + 0]


# ---- refusing

TOO_MANY = [{"vector": "calm"}] * 33
BAD_STEERING: list[tuple[Any, int, str]] = [
    ("{", 400, "steering"),
    ("[" * 100_000, 400, "steering"),
    (TOO_MANY, 400, "steering"),
    ([3], 400, "steering[0]"),
    (False, 400, "steering[0]"),
    ([{}], 400, "steering[0].vector"),
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
    ([{"vector": "calm", "when": {"probe": "x"}}], 400, "steering[0].when"),
]  # fmt: skip
BAD_DECODING: list[tuple[Any, int, str]] = [
    ([3], 400, "decoding[0]"),
    ([{}], 400, "decoding[0].method"),
    ([{"method": ["proxy_tuning"]}], 400, "decoding[0].method"),
    ([{"method": "telepathy"}], 422, "decoding[0].method"),
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


@pytest.mark.parametrize(("value", "status", "param"), BAD_STEERING)
def test_bad_steering_is_refused_by_its_path(have: Catalogue, value: Any, status: int, param: str) -> None:
    error = refusal(have, steering=value)
    assert (error.status, error.param) == (status, param), error.message
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("value", "status", "param"), BAD_DECODING)
def test_bad_decoding_is_refused_by_its_path(have: Catalogue, value: Any, status: int, param: str) -> None:
    error = refusal(have, decoding=value)
    assert (error.status, error.param) == (status, param), error.message


@pytest.mark.parametrize("value", ["maybe", "", 0, False, [], {"error": 1}])
def test_on_unavailable_is_error_or_ignore(have: Catalogue, value: Any) -> None:
    error = refusal(have, on_unavailable=value)
    assert (error.status, error.param) == (400, "on_unavailable")


@pytest.mark.parametrize("name", NOT_BUILT)
def test_names_that_others_know_are_not_silently_ignored(have: Catalogue, name: str) -> None:
    error = refusal(have, **{name: 1.5})
    assert (error.status, error.param) == (422, name)


def test_a_server_with_nothing_loaded_says_what_flag_would_help(nothing: Catalogue) -> None:
    by_vector, by_method = refusal(nothing, steering={"vector": "calm"}), refusal(nothing, decoding=PAIR)
    assert (by_vector.status, by_method.status) == (404, 422)
    assert "--vectors" in by_vector.message and "--aux" in by_method.message


def test_what_a_server_lacks_is_left_out_only_when_asked_and_said_so(have: Catalogue) -> None:
    made = compiled(
        have,
        on_unavailable="ignore",
        steering=[{"vector": "nope"}, {"vector": "calm"}, {"vector": "wide"}],
        decoding=[{"method": "telepathy"}, PAIR | {"expert": "absent"}],
    )
    assert [entry["vector"] for entry in made.steering] == ["calm"]
    assert made.edit_paths == ["steering[1]"]
    assert made.plan.mix is None
    starts = [warning.split(" was left out")[0] for warning in made.warnings]
    assert starts == ["steering[0].vector", "steering[2].vector", "decoding[0].method", "decoding[1].expert"]


@pytest.mark.parametrize(
    "fields", [{"steering": [{"vector": "calm", "scale": "x"}]}, {"decoding": [PAIR | {"alpha": 1e9}]}]
)
def test_bad_values_are_refused_even_when_what_is_missing_may_be_left_out(
    have: Catalogue, fields: dict[str, Any]
) -> None:
    assert refusal(have, on_unavailable="ignore", **fields).status == 400


def test_the_second_edit_is_the_one_named_when_it_selects_nothing(have: Catalogue) -> None:
    made = compiled(have, steering=[{"vector": "calm"}, {"vector": "late", "where": {"prompt": [[5, 9]]}}])
    with pytest.raises(BadRequest) as caught:
        made.check(prompt_len=5, max_tokens=4, is_explicit=True)
    assert caught.value.param == "steering[1].where"
    assert made.check(prompt_len=6, max_tokens=4, is_explicit=True) == 4


def test_an_auxiliary_models_context_bounds_the_request(have: Catalogue) -> None:
    made = compiled(have, decoding=PAIR | {"expert": "short"})
    assert made.check(prompt_len=4, max_tokens=50, is_explicit=False) == 6  # not said: as much as fits
    assert made.check(prompt_len=4, max_tokens=6, is_explicit=True) == 6
    for prompt_len, max_tokens, is_explicit in ((4, 7, True), (10, 1, False), (99, 1, True)):
        with pytest.raises(BadRequest, match="follows at most") as caught:
            made.check(prompt_len, max_tokens, is_explicit)
        assert caught.value.param == "decoding[0].expert"


@settings(max_examples=400, deadline=None)
@given(fields=EXTRAS)
def test_any_json_is_compiled_or_refused_with_an_answer_that_can_be_sent(
    have: Catalogue, fields: dict[str, Any]
) -> None:
    try:
        made = compile_extras(fields, have)
    except WhipstaffError as error:
        assert 400 <= error.status < 500
        assert error.param is not None
        json.dumps(error.body(), ensure_ascii=False, allow_nan=False).encode()
    else:
        if made is not None:
            json.dumps(made.receipt([]), ensure_ascii=False, allow_nan=False).encode()


def test_a_key_that_utf8_cannot_hold_is_refused_in_words_it_can(have: Catalogue) -> None:
    error = refusal(have, steering={"vector": "calm", "\ud800": 1})
    assert error.status == 400
    json.dumps(error.body(), ensure_ascii=False).encode()


@pytest.mark.parametrize(
    ("loc", "data", "path"),
    [
        ((), {}, ""),
        (("a",), {"a": 1}, ".a"),
        (("a",), {}, ".a"),  # a missing field is named too
        (("a", 1, "b"), {"a": [0, {"b": 3}]}, ".a[1].b"),
        (("where", "Where", "prompt", "list[tuple]", 0, 1), {"where": {"prompt": [[0, "x"]]}}, ".where.prompt[0][1]"),
        (("where", "literal['all','none']"), {"where": 3}, ".where"),
        (("a", 5), {"a": [1]}, ".a"),  # no such step: the path ends where the data does
    ],
)
def test_paths_hold_the_steps_that_are_in_the_data(loc: tuple[int | str, ...], data: Any, path: str) -> None:
    assert json_path(loc, data) == path


# ---- the method table


def test_the_method_table_says_what_this_server_can_do(have: Catalogue, nothing: Catalogue) -> None:
    full = {row["name"]: row for row in method_table(have)}
    empty = {row["name"]: row for row in method_table(nothing)}
    assert full.keys() == empty.keys() == {"vector", *METHODS}
    assert all(row["available"] and row["reason"] is None for row in full.values())
    assert [(row["available"], row["reason"]) for row in empty.values()] == [
        (False, "start the server with --vectors PATH"),
        (False, "start the server with --aux NAME=MODEL"),
    ]
    assert full["vector"]["schema"]["properties"]["vector"]["enum"] == ["calm", "late"]
    assert full["proxy_tuning"]["schema"]["properties"]["expert"]["enum"] == list(LIMITS)
    assert full["proxy_tuning"]["defaults"]["alpha"] == 1.0
    assert all(row["paper"] and row["kind"] in ("edit", "mix") for row in full.values())


# ---- the registry


def test_names_are_file_names_and_unfit_vectors_are_known_but_not_usable(have: Catalogue) -> None:
    registry = have.registry
    assert registry.names == ["calm", "late"]
    assert [entry.name for entry in registry] == ["calm", "late", "wide"]
    with pytest.raises(VectorUnfit, match=r"hidden 16.*hidden 8"):
        registry.usable("wide", "p")
    with pytest.raises(NotFound, match="'calm', 'late', 'wide'"):
        registry.entry("clam")


def test_a_folder_and_single_files_load_alike(folder: Path) -> None:
    registry = Registry([folder / "late.safetensors", folder / "calm.safetensors"], SHAPE)
    assert registry.names == ["late", "calm"]
    assert registry.usable("calm", "p").digest == Registry([folder], SHAPE).usable("calm", "p").digest


def test_a_bad_file_stops_the_start_and_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    for paths, words in (
        ([tmp_path / "absent"], "no such file or folder"),
        ([folder, folder / "calm.safetensors"], "two vectors are called 'calm'"),
        ([tmp_path], "broken.safetensors: not a sound safetensors file"),
    ):
        with pytest.raises(BadVectorFile, match=words):
            Registry(paths, SHAPE)


# ---- where clauses, against sets of positions

PROMPT_WINDOW = st.tuples(st.integers(-12, 12), st.none() | st.integers(-12, 12))
GENERATION_WINDOW = st.tuples(st.integers(0, 12), st.none() | st.integers(0, 14))
HORIZON = 40


def windows(window: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(["all", "none"]) | st.lists(window, max_size=4)


REGION = st.fixed_dictionaries(
    {}, optional={"prompt": windows(PROMPT_WINDOW), "generation": windows(GENERATION_WINDOW)}
)
CLAUSE = st.builds(
    lambda region, hole: region | ({} if hole is None else {"exclude": hole}), REGION, st.none() | REGION
)


def selected(region: dict[str, Any], prompt_len: int) -> set[int]:
    """The positions below HORIZON that a region names: slices of the prompt's and of the generation's positions."""
    found: set[int] = set()
    parts = {"prompt": range(prompt_len), "generation": range(prompt_len, HORIZON)}
    for name, positions in parts.items():
        chosen = region.get(name, "none")
        for start, end in [(0, None)] if chosen == "all" else [] if chosen == "none" else chosen:
            found |= set(positions[start:end])
    return found


def valid(clause: dict[str, Any]) -> Where | None:
    try:
        return Where.model_validate(clause)
    except ValidationError:
        return None


@settings(max_examples=500, deadline=None)
@given(clause=CLAUSE, prompt_len=st.integers(1, 14))
def test_a_clause_selects_what_slices_of_the_positions_would(clause: dict[str, Any], prompt_len: int) -> None:
    where = valid(clause)
    assume(where is not None)
    assert where is not None
    intervals = where.intervals(prompt_len)
    want = selected(clause, prompt_len) - selected(clause.get("exclude", {}), prompt_len)
    got = [position for start, end in intervals for position in range(start, HORIZON if end is None else end)]
    assert set(got) & set(range(HORIZON)) == want
    assert len(got) == len(set(got)) and got == sorted(got)  # disjoint, in order
    assert all(end is None or start < end for start, end in intervals)


@settings(max_examples=300, deadline=None)
@given(clause=CLAUSE, prompt_len=st.integers(1, 14), max_tokens=st.integers(1, 16))
def test_a_clause_is_refused_exactly_when_no_position_fed_is_selected(
    clause: dict[str, Any], prompt_len: int, max_tokens: int
) -> None:
    where = valid(clause)
    assume(where is not None)
    assert where is not None
    fed = set(range(prompt_len + max_tokens - 1))
    is_idle = not fed & (selected(clause, prompt_len) - selected(clause.get("exclude", {}), prompt_len))
    try:
        where.check(prompt_len, max_tokens)
    except SteeringError as error:
        assert is_idle and error.param == "where"
    else:
        assert not is_idle


@pytest.mark.parametrize("name", SHORTHANDS)
def test_shorthands_select_what_they_say(name: Any) -> None:
    everything, prompt = set(range(9)), set(range(5))
    want = {
        "all": everything,
        "prompt": prompt,
        "generation": everything - prompt,
        "last_prompt": {4},
        "each_last": everything - set(range(4)),
    }[name]
    got = {p for p in range(9) if any(a <= p and (b is None or p < b) for a, b in Where.of(name).intervals(5))}
    assert got == want


@pytest.mark.parametrize("window", [[2, 2], [3, 1], [-1, -3], [0, 0]])
def test_windows_that_are_empty_for_every_prompt_are_refused(window: list[int]) -> None:
    with pytest.raises(ValidationError, match="half-open"):
        Region.model_validate({"prompt": [window]})


# ---- plans: segments against each position's own row

DIGESTS = "abc"
PLANNED = st.builds(
    lambda digest, scale, clause: (RowEdit(digest, scale, None), clause),
    st.sampled_from(DIGESTS),
    st.sampled_from([1.0, -2.0]),
    CLAUSE,
)


@settings(max_examples=300, deadline=None)
@given(planned=st.lists(PLANNED, max_size=4), prompt_len=st.integers(1, 14))
def test_every_position_is_in_the_one_segment_with_its_row(planned: list[Any], prompt_len: int) -> None:
    edits = [(edit, valid(clause), clause) for edit, clause in planned]
    assume(all(where is not None for _, where, _ in edits))
    plan = SteeringPlan(tuple(PlannedEdit(edit, where) for edit, where, _ in edits if where is not None))
    segments = plan.segments(prompt_len)
    for position in range(HORIZON):
        want = tuple(
            edit
            for edit, _, clause in edits
            if position in selected(clause, prompt_len) - selected(clause.get("exclude", {}), prompt_len)
        )
        got = [row for start, end, row in segments if start <= position and (end is None or position < end)]
        assert got == ([want] if want else [])
    assert SteeringPlan.from_wire(json.loads(json.dumps(plan.to_wire()))) == plan
    placed = PlacedPlan(RequestPlan(plan if plan.edits else None), prompt_len)
    assert placed.rows == {row for _, _, row in segments}
    assert placed.first_edited == min((start for start, _, _ in segments), default=None)


# ---- edits that would overflow

SCALES = st.sampled_from([0.0, 0.5, -3.0, 200.0, -1e4])


@settings(max_examples=100, deadline=None)
@given(scales=st.lists(SCALES, max_size=6), seed=st.integers(0, 99))
def test_growth_is_an_upper_bound_of_what_the_edits_do(scales: list[float], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    names = [f"resid_post.{layer}.{part}" for layer in range(4) for part in ("add", "gain")]
    vector = parse(packed({name: torch.randn(8, generator=generator) for name in names}))
    edits = [(vector, scale, None if index % 2 else (0, 3)) for index, scale in enumerate(scales)]
    x = torch.rand(8, generator=generator, dtype=torch.float64) * 2 - 1
    for layer in range(4):
        pair = compose(edits, "resid_post", [layer], 8)
        x = x if pair is None else x * pair[0].double() + pair[1].double()
    assert float(x.abs().max()) <= growth(edits) * (1 + 1e-5)
    assert growth([(vector, 0.0, None)] * 32) == 1.0


def test_the_entry_that_takes_the_activations_too_far_is_named(tmp_path: Path) -> None:
    gains = {f"resid_post.{layer}.gain": torch.full((8,), 0.5) for layer in range(4)}
    artifacts.write(tmp_path / "loud.safetensors", Header(method="lofit", model=SHAPE), gains)
    loud = Catalogue(Registry([tmp_path], SHAPE), {})
    entries = [{"vector": "loud", "scale": scale} for scale in (1, 200, 200, 200, 200)]
    assert compile_extras({"steering": entries[:2]}, loud) is not None
    error = refusal(loud, steering=entries)
    assert (error.status, error.param) == (400, "steering[2].scale")  # 1.5^4 * 101^4 = 5e8; once more is 5e16


# ---- vector files


def test_a_vector_file_keeps_every_bit(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    odd = {"resid_post.0.add": torch.tensor([1e-45, -0.0, 3.4e38 / 64, 1 / 3, 2**-126, -1.0, 0.1, 7.0])}
    header = Header(method="caa", model=SHAPE, scale=0.1, where=Where(prompt=[(-3, None)]), provenance={"seed": 1})
    artifacts.write(path, header, odd)
    vector = artifacts.read(path)
    want = odd["resid_post.0.add"].view(torch.int32)  # bits: -0.0 is not 0.0 here
    assert torch.equal(vector.tensors["resid_post", 0]["add"].view(torch.int32), want)
    assert vector.header == header
    artifacts.write(path, header, {"resid_post.0.add": vector.tensors["resid_post", 0]["add"]})
    assert artifacts.read(path).digest == vector.digest


@settings(max_examples=50, deadline=None)
@given(numbers=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=8, max_size=8))
def test_any_finite_numbers_come_back_as_they_went(numbers: list[float]) -> None:
    given_ = torch.tensor(numbers, dtype=torch.float32)
    got = parse(packed({"attn_head.2.gain": given_.reshape(2, 4)})).tensors["attn_head", 2]["gain"]
    assert torch.equal(got.view(torch.int32), given_.view(torch.int32))


def test_half_precision_files_are_read_exactly() -> None:
    numbers = torch.randn(8, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        got: Vector = parse(packed({"resid_post.0.add": numbers.to(dtype)}))
        assert torch.equal(got.tensors["resid_post", 0]["add"], numbers.to(dtype).to(torch.float32))


def test_norms_and_layers_describe_the_file() -> None:
    vector = parse(packed())
    assert vector.layers == [0, 1, 3] and vector.sites == ["attn_head", "resid_post"]
    assert vector.norms() == {name: pytest.approx(float(tensor.norm())) for name, tensor in TENSORS.items()}


def with_number(number: float) -> dict[str, Tensor]:
    tensor = torch.zeros(8)
    tensor[3] = number
    return {"resid_post.0.add": tensor}


LYING: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a sound safetensors file"),
    "text": (b"a vector, honestly" * 9, "not a sound safetensors file"),
    "pickle": (b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins", "not a sound safetensors file"),
    "truncated": (packed()[:-4], "not a sound safetensors file"),
    "header cut": (packed()[:40], "not a sound safetensors file"),
    "header not an object": ((2).to_bytes(8, "little") + b"[]", "not a sound safetensors file"),
    "header too deep": ((40_000).to_bytes(8, "little") + b"[" * 40_000, "not a sound safetensors file"),
    "header length absurd": (b"\xff" * 8 + b"{}", "not a sound safetensors file"),
    "more bytes": (packed() + b"more", "not a sound safetensors file"),
    "no metadata": (save(TENSORS), 'no "whipstaff" metadata'),
    "metadata not JSON": (save(TENSORS, metadata={"whipstaff": "{"}), "header field"),
    "no tensors": (packed({}), "no tensors"),
    "unknown header field": (packed(header={"colour": "red"}), "header field colour"),
    "another format": (packed(header={"format": 2}), "header field format"),
    "no model": (packed(header={"model": None}), "header field model"),
    "absurd model": (packed(header={"model": SHAPE.model_dump() | {"num_heads": 0}}), "header field model.num_heads"),
    "scale NaN": (packed(header={"scale": math.nan}), "header field scale"),
    "bad clause": (packed(header={"where": "sometimes"}), "header field where"),
    "unknown site": (packed({"mlp.0.add": torch.ones(8)}), "names are"),
    "layer 01": (packed({"resid_post.01.add": torch.ones(8)}), "names are"),
    "layer beyond": (packed({"resid_post.4.add": torch.ones(8)}), "layers 0 to 3"),
    "short row": (packed({"resid_post.0.add": torch.ones(7)}), r"shape \[7\].*\[8\]"),
    "extra dimension": (packed({"resid_post.0.add": torch.ones(1, 8)}), r"shape \[1, 8\]"),
    "heads flattened": (packed({"attn_head.0.add": torch.ones(8)}), r"shape \[8\].*\[2, 4\]"),
    "integers": (packed({"resid_post.0.add": torch.ones(8, dtype=torch.int64)}), "dtype torch.int64"),
    "NaN": (packed(with_number(math.nan)), "not finite"),
    "infinity": (packed(with_number(-math.inf)), "not finite"),
    "beyond float32": (packed({"resid_post.0.add": torch.full((8,), 1e300, dtype=torch.float64)}), "not finite"),
}


@pytest.mark.parametrize("case", LYING)
def test_a_file_that_is_not_what_it_says_is_refused(case: str, tmp_path: Path) -> None:
    data, words = LYING[case]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(data)
    with pytest.raises(SteeringError, match=words):
        artifacts.read(path)


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_refused_or_still_a_sound_vector(data: st.DataObject) -> None:
    original = bytearray(packed())
    index = data.draw(st.integers(0, len(original) - 1))
    original[index] ^= data.draw(st.integers(1, 255))
    try:
        vector = parse(bytes(original))
    except SteeringError:
        return
    assert vector.digest != parse(packed()).digest
    assert all(tensor.isfinite().all() for parts in vector.tensors.values() for tensor in parts.values())


def test_write_refuses_what_read_would_not_take(tmp_path: Path) -> None:
    path = tmp_path / "v.safetensors"
    with pytest.raises(SteeringError, match="not finite"):
        artifacts.write(path, Header(method="caa", model=SHAPE), with_number(math.nan))
    assert not path.exists()


def test_a_file_larger_than_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.truncate(artifacts.MAX_BYTES + 1)  # sparse
    with pytest.raises(SteeringError, match="at most"):
        artifacts.read(path)


def test_a_request_that_needs_more_slots_than_there_are_is_refused(have: Catalogue) -> None:
    """It would otherwise wait for ever, and everybody steered behind it."""
    windows = [{"vector": "calm", "where": {"prompt": [[start, None]]}} for start in range(4)]
    few = replace(have, num_slots=3)
    with pytest.raises(Unavailable, match="--steering-slots") as caught:
        compiled(few, steering=windows).check(prompt_len=9, max_tokens=4, is_explicit=True)
    assert caught.value.param == "steering"
    assert compiled(few, steering=windows[:3]).check(prompt_len=9, max_tokens=4, is_explicit=True) == 4
