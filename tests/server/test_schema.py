"""Extra fields become the plan they say, or the error that names their path; vector files are what they claim."""

import json
import math
import re
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

from whipstaff.decoding.coupled import CoupledParams
from whipstaff.decoding.method import Depth, Mixing
from whipstaff.decoding.methods import METHODS
from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan
from whipstaff.server.catalogue import Catalogue, Limit
from whipstaff.server.chat import Prompt
from whipstaff.server.engine.request import KEY, PlacedPlan, RequestPlan
from whipstaff.server.errors import (
    BadRequest,
    NotFound,
    Unavailable,
    VectorUnfit,
    WhipstaffError,
    field_path,
    json_path,
)
from whipstaff.server.methods import method_table
from whipstaff.server.registry import BadVectorFile, Registry, read_vectors
from whipstaff.server.schema import Compiled, compile_extras
from whipstaff.server.steered import Fed, doses
from whipstaff.server.words import Words
from whipstaff.steering import artifacts
from whipstaff.steering.artifacts import Header, ModelShape, Vector, parse
from whipstaff.steering.edits import Lengths
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.experts import Scheme
from whipstaff.steering.method import MAX_SCALE, Place
from whipstaff.steering.methods import METHODS as STEERING
from whipstaff.steering.plan import PlannedEdit, RowEdit, SteeringPlan
from whipstaff.steering.shape import SITES
from whipstaff.steering.sites import canonical
from whipstaff.steering.where import SHORTHANDS, Region, Where

from .anyjson import EXTRAS

SHAPE = ModelShape(architecture="Test", hidden_size=8, num_layers=4, num_heads=2, head_dim=4, num_kv_heads=2)
SPARSE_SHAPE = SHAPE.model_copy(update={"num_experts": 4})
TENSORS = {
    "resid_post.1.add": torch.linspace(-1, 1, 8),
    "resid_post.3.add": torch.full((8,), 0.1),
    "resid_post.3.gain": torch.full((8,), -1.0),
    "attn_head.0.add": torch.arange(8.0).reshape(2, 4),
}
UNIT = torch.eye(8)
NTH = ("first", "second")
HEADS = torch.arange(8.0).reshape(2, 4)
CODES = {"encoder": UNIT[:5], "decoder": UNIT[:5]}
FILES: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "calm": ({"method": "vector", "scale": 3.0}, TENSORS),
    "late": ({"method": "caa", "where": "generation"}, {"resid_post.2.add": torch.ones(8)}),
    "strange": ({"method": "a method of somebody's own"}, {"resid_post.2.add": torch.ones(8)}),
    "iti": ({"method": "iti"}, {"attn_head.1.direction": HEADS, "attn_head.1.sigma": torch.tensor([0.0, 2.0])}),
    "lofit": ({"method": "lofit"}, {"attn_head.2.A": HEADS, "attn_head.2.v": HEADS}),
    "ablate": ({"method": "directional_ablation"}, {"direction": UNIT[0]}),
    "knob": ({"method": "context_knob"}, {"resid_post.2.basis": UNIT[:2]}),
    "turn": ({"method": "tarot"}, {"attn_head.1.angles": torch.full((2, 2), 1.0)}),
    "sae": ({"method": "sae"}, {f"resid_post.2.{part}": tensor for part, tensor in CODES.items()}),
    "headsae": ({"method": "sae"}, {f"attn_head.1.{part}": t.reshape(5, 2, 4) for part, t in CODES.items()}),
    "rows": ({"method": "actadd"}, {"resid_pre.1.rows": UNIT[:3]}),
    "angular": ({"method": "angular"}, {f"attn_in.1.{which}_direction": UNIT[i] for i, which in enumerate(NTH)}),
    "plane": ({"method": "angular"}, {f"mlp_in.1.{which}_direction": UNIT[i] for i, which in enumerate(NTH)}),
    "probe": ({"method": "probe"}, {"resid_post.0.direction": UNIT[0], "resid_post.0.bias": torch.tensor(0.5)}),
    "probes": ({"method": "probe"}, {f"resid_post.{layer}.direction": UNIT[layer] for layer in range(2)}),
    "soft": ({"method": "soft_prompt"}, {"rows": UNIT[:3]}),
    "prefix": (
        {"method": "prefix_kv"},
        {f"attn_head.{layer}.{part}": torch.ones(2, 2, 4) for layer in range(4) for part in ("key", "value")},
    ),
    "router": ({"method": "vector", "model": SPARSE_SHAPE}, {"router.1.add": torch.ones(4)}),
    "wide": (
        {"method": "caa", "model": SHAPE.model_copy(update={"hidden_size": 16})},
        {"resid_post.0.add": torch.ones(16)},
    ),
}
LIMITS = {"expert": 64, "anti": 64, "short": 10}
HOOKED = ("resid_pre", "resid_post", "attn_head", "attn_out", "mlp_out", "mlp_in")  # not attn_in, not router
PLACES = frozenset(canonical(Place(site, layer)) for site in SITES if site in HOOKED for layer in range(4))


def packed(tensors: dict[str, Tensor] | None = None, header: dict[str, Any] | None = None) -> bytes:
    """A vector file, right or wrong: nothing is checked."""
    said = {"method": "test", "model": SHAPE.model_dump()} | (header or {})
    return save(TENSORS if tensors is None else tensors, metadata={"whipstaff": json.dumps(said)})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    for name, (header, tensors) in FILES.items():
        artifacts.write(folder / f"{name}.safetensors", Header(**{"model": SHAPE} | header), tensors)
    return folder


@pytest.fixture(scope="module")
def have(folder: Path) -> Catalogue:
    lengths = Lengths(dict.fromkeys(PLACES, 10.0))
    return Catalogue(Registry(read_vectors([folder]), SHAPE), LIMITS, num_layers=4, places=PLACES, lengths=lengths)


@pytest.fixture(scope="module")
def everything(have: Catalogue, folder: Path) -> Catalogue:
    """A server whose model has experts, and whose operator asked for all hooks."""
    places = frozenset(canonical(Place(site, layer)) for site in SITES for layer in range(4))
    scheme = Scheme(4, 2, "softmax", True, 1, 1, None)
    return replace(
        have,
        registry=Registry(read_vectors([folder]), SPARSE_SHAPE),
        places=places,
        attention={"layers": [0, 1, 2, 3], "bias": [0, 1], "lacking": {2: "its scores are capped"}},
        routing={1: scheme, 2: scheme},
    )


@pytest.fixture(scope="module")
def nothing() -> Catalogue:
    return Catalogue(Registry({}, SHAPE), {})


def compiled(have: Catalogue, **fields: Any) -> Compiled:
    result = compile_extras(fields, have)
    assert result is not None
    return result


def refusal(have: Catalogue, **fields: Any) -> WhipstaffError:
    with pytest.raises(WhipstaffError) as caught:
        compile_extras(fields, have)
    return caught.value


def plan_of(have: Catalogue, *entries: Any) -> SteeringPlan:
    plan = compiled(have, steering=list(entries)).plan.steering
    assert plan is not None
    return plan


def receipt(have: Catalogue, entry: Any, fed: list[Fed] | None = None) -> dict[str, Any]:
    (said,) = compiled(have, steering=entry).receipt(fed or [])["steering"]
    return dict(said)


def check(made: Compiled, prompt_len: int = 9, max_tokens: int = 4) -> int:
    made.place(Prompt(prompt_len, list(range(prompt_len)), 64, None))
    return made.check(prompt_len, max_tokens, is_explicit=True)


PAIR = {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}


# ---- compiling


@pytest.mark.parametrize("fields", [{}, {"steering": None, "decoding": None}, {"temperature": 0.5}])
def test_a_request_without_extras_is_plain(have: Catalogue, fields: dict[str, Any]) -> None:
    assert compile_extras(fields, have) is None


def test_what_is_not_said_is_the_vectors_own(have: Catalogue) -> None:
    assert receipt(have, [{"vector": "calm"}]) == {
        "vector": "calm",
        "digest": have.registry.entry("calm").vector.digest,
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
    assert receipt(have, {"vector": "late"})["where"] == generation
    assert receipt(have, {"vector": "iti"})["scale"] == 15.0  # the paper's
    assert receipt(have, {"vector": "strange"})["method"] == FILES["strange"][0]["method"]


@pytest.mark.parametrize("name", ["scale", "strength", "coefficient"])
def test_the_three_names_of_the_scale_mean_the_same(have: Catalogue, name: str) -> None:
    assert receipt(have, [{"vector": "calm", name: -2}])["scale"] == -2.0


@pytest.mark.parametrize("write", [lambda entry: entry, lambda entry: [entry], json.dumps, lambda e: json.dumps([e])])
def test_one_entry_may_stand_alone_or_be_a_json_string(have: Catalogue, write: Any) -> None:
    entry = {"vector": "calm", "scale": 2}
    assert compiled(have, steering=write(entry)).plan == compiled(have, steering=[entry]).plan
    assert compiled(have, decoding=write(PAIR)).plan == compiled(have, decoding=[PAIR]).plan


def test_layers_are_a_set_and_all_of_them_are_none_named(have: Catalogue) -> None:
    assert receipt(have, [{"vector": "calm", "layers": [3, 1, 3]}])["layers"] == [1, 3]
    assert plan_of(have, {"vector": "calm", "layers": [3, 1, 0]}) == plan_of(have, {"vector": "calm"})


def test_both_sides_compile_into_one_plan_and_one_label(have: Catalogue) -> None:
    both = compiled(have, steering=[{"vector": "late"}], decoding=[PAIR | {"alpha": 0.5}])
    assert both.label == "caa+proxy_tuning"
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
def test_labels_are_few(have: Catalogue, names: list[str], label: str) -> None:
    steering = [{"vector": name} for name in names]
    assert compiled(have, steering=steering).label == label
    assert compiled(have, steering=steering, decoding=PAIR).label == "+".join(
        sorted({label, "proxy_tuning"} - {"plain"})
    )


def test_mixes_of_one_request_add_up(have: Catalogue) -> None:
    other = {"method": "proxy_tuning", "expert": "short", "antiexpert": "anti", "alpha": 2}
    summed = Mix.of({"expert": 1.0, "anti": -3.0, "short": 2.0})
    assert compiled(have, decoding=[PAIR, other]).plan.decoding == DecodingPlan(summed)


WHEN = {"probe": "probe", "above": 0.25}
MIXED: list[dict[str, Any]] = [
    {"vector": "calm", "layers": [1], "where": {"prompt": [[0, -1]], "exclude": {"prompt": [[2, 3]]}}, "when": WHEN},
    {"vector": "sae", "features": [{"feature": 2, "set": 4.0}], "schedule": {"shape": "linear", "tokens": 8}},
    {"vector": "iti", "when": {"probe": "probe", "below": 1, "release": 2, "decide": "step"}, "renorm": True},
    {"vector": "late", "schedule": {"shape": "entropy", "low": 0.5, "high": 2}, "normalize": True},
    {"vector": "rows", "location": "back"},
    {"vector": "late", "where": {"tokens": [5, 6]}},
]


def test_a_plan_survives_its_journey_to_the_engine(have: Catalogue) -> None:
    plan = compiled(have, steering=MIXED, decoding=[PAIR]).plan
    assert plan.ticket and plan.steering is not None
    assert (len(plan.steering.edits), plan.steering.num_columns, len(plan.steering.schedules)) == (8, 3, 1)
    assert RequestPlan.from_wire(json.loads(json.dumps({KEY: plan.to_wire()}))) == plan


def test_the_receipt_repeats_what_decides(have: Catalogue) -> None:
    said = compiled(have, steering=MIXED).receipt([])["steering"]
    assert said[0]["when"] == WHEN
    assert said[1]["schedule"] == {"shape": "linear", "tokens": 8}
    assert said[1]["features"] == [{"feature": 2, "set": 4.0, "scale": None, "add": None, "only_if_active": False}]
    assert said[2]["renorm"] is True and said[3]["normalize"] is True
    assert len(said[4]["where"]) == 3 and said[4]["location"] == "back"  # a clause per row
    assert [entry.get("fired") for entry in said] == [
        {"tokens": 0, "of": 0}, None, {"tokens": 0, "of": 0}, {"tokens": 0, "of": 0}, None, None,
    ]  # fmt: skip


def test_the_receipt_counts_the_tokens_that_were_edited(have: Catalogue) -> None:
    made = compiled(have, steering=[{"vector": "calm"}, {"vector": "late", "where": {"generation": [[1, 3]]}}])
    # two sequences: 5 prompt tokens of which the last is edited, then 9 and 1 more positions fed
    said = made.receipt([Fed(5, 14, []), Fed(5, 6, [])])["steering"]
    assert [entry["edited_tokens"] for entry in said] == [(1 + 9) + (1 + 1), 2 + 0]


def test_the_receipt_counts_tokens_told_apart(have: Catalogue) -> None:
    ids = [5, 7, 5, 8, 5, 9]
    for where, num in (
        ({"tokens": [5]}, 3),
        ({"tokens": [5], "generation": "all"}, 5),
        ({"tokens": [5], "exclude": {"prompt": [[0, 1]]}}, 2),
        ({"generation": "all", "exclude": {"tokens": [5, 9]}}, 1),
    ):
        assert receipt(have, {"vector": "late", "where": where}, [Fed(3, 6, ids)])["edited_tokens"] == num


def test_the_receipt_says_what_fired_of_what_is_known(have: Catalogue) -> None:
    late = {"vector": "late", "where": "all"}
    step = late | {"when": WHEN | {"decide": "step"}}
    read = [None, 0.1, 0.3, 0.25, 0.9]  # the first position's KV came from the cache
    assert receipt(have, step, [Fed(3, 5, [], [read])])["fired"] == {"tokens": 2, "of": 4}
    assert receipt(have, step, [Fed(3, 5, [], [read]), Fed(3, 5, [])])["fired"] == {"tokens": 2, "of": 4}
    latched = late | {"when": WHEN}
    fed = [Fed(3, 5, [], [[0.9]]), Fed(3, 6, [], [[0.1]])]  # decided at the last prompt token, for what follows
    assert receipt(have, latched, fed)["fired"] == {"tokens": 3, "of": 3 + 4, "readings": [0.9, 0.1]}


def test_doses_are_beside_the_activations_and_follow_schedules(have: Catalogue) -> None:
    late = {"vector": "late", "scale": 5}  # sqrt(8) long, and the stream is 10
    dose = math.sqrt(8) / 2
    assert receipt(have, late)["dose"] == {"relative": pytest.approx(dose), "at": "resid_post.2"}
    growing = late | {"schedule": {"shape": "linear", "from": 0.5, "to": -3, "tokens": 9}}
    assert receipt(have, growing)["dose"]["relative"] == pytest.approx(3 * dose)
    assert receipt(replace(have, lengths=Lengths({})), late)["dose"] is None
    assert receipt(have, late | {"normalize": True})["dose"]["relative"] == pytest.approx(0.5)


def test_advice_is_the_dose_at_the_files_strength_and_at_1(have: Catalogue) -> None:
    said = {name: doses(have.registry.entry(name).vector, have) for name in have.registry.names}
    unit = math.sqrt(140) / 10
    assert said["calm"] == [
        {"scale": 3.0, "relative": pytest.approx(3 * unit), "at": "attn_head.0"},
        {"scale": 1.0, "relative": pytest.approx(unit), "at": "attn_head.0"},
    ]
    assert [one["scale"] for one in said["iti"]] == [15.0, 1.0] and [one["scale"] for one in said["late"]] == [1.0]
    assert not any(said[name] for name in ("knob", "sae", "angular", "probe", "soft", "prefix", "router"))


# ---- refusing

TOO_MANY = [{"vector": "calm"}] * 33
SPARSE = {"feature": 0, "set": 1}
LOOK = {"layer": 0, "head": 0, "keys": [0]}
PASTA = {"method": "pasta", "heads": {"0": [0]}, "spans": [[0, 1]]}
MOTE = {"method": "mote", "experts": {"1": {"off": [0]}}}
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


@pytest.mark.parametrize(("value", "status", "param"), BAD_STEERING)
def test_bad_steering_is_refused_by_its_path(have: Catalogue, value: Any, status: int, param: str) -> None:
    error = refusal(have, steering=value)
    assert (error.status, error.param) == (status, param), error.message
    assert error.body()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("value", "status", "param"), BAD_EVERYWHERE)
def test_bad_steering_is_refused_where_everything_is_on(
    everything: Catalogue, value: Any, status: int, param: str
) -> None:
    error = refusal(everything, steering=value)
    assert (error.status, error.param) == (status, param), error.message


@pytest.mark.parametrize(("value", "status", "param"), BAD_DECODING)
def test_bad_decoding_is_refused_by_its_path(have: Catalogue, value: Any, status: int, param: str) -> None:
    error = refusal(have, decoding=value)
    assert (error.status, error.param) == (status, param), error.message


def test_the_same_reading_and_the_same_schedule_are_taken_by_any_number_of_entries(have: Catalogue) -> None:
    schedule = {"shape": "linear", "tokens": 3}
    plan = plan_of(
        have, *({"vector": "late", "when": WHEN | {"above": num}, "schedule": schedule} for num in range(30))
    )
    assert (len(plan.edits), plan.num_columns, len(plan.probes), len(plan.schedules)) == (30, 1, 1, 1)


@pytest.mark.parametrize("value", ["maybe", "", 0, False, [], {"error": 1}])
def test_on_unavailable_is_error_or_ignore(have: Catalogue, value: Any) -> None:
    error = refusal(have, on_unavailable=value)
    assert (error.status, error.param) == (400, "on_unavailable")


def test_a_server_with_nothing_loaded_says_what_flag_would_help(nothing: Catalogue) -> None:
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
    have: Catalogue, everything: Catalogue, entry: dict[str, Any], dense: str, sparse: str
) -> None:
    plain_sparse = replace(have, registry=everything.registry)
    for server, words in ((have, dense), (plain_sparse, sparse)):
        assert words in refusal(server, steering=entry).message
    assert compiled(everything, steering=entry).steering
    if entry.get("vector") == "angular":  # of its layers, those that are hooked
        elsewhere = replace(have, places=have.places | {Place("attn_in", 1)})
        assert compiled(elsewhere, steering=entry).steering


def test_soft_prompts_need_a_model_that_takes_rows(have: Catalogue) -> None:
    error = refusal(replace(have, takes_soft_prompts=False), steering={"vector": "soft"})
    assert (error.status, error.param) == (422, "steering.vector")


@pytest.mark.parametrize(
    ("entry", "is_taken"),
    [
        ({"vector": "iti"}, True),
        ({"vector": "lofit"}, True),
        ({"vector": "iti", "renorm": True}, False),
        ({"vector": "headsae", "features": [SPARSE]}, False),
        ({"vector": "sae", "features": [SPARSE], "renorm": True}, True),  # the stream is whole on every rank
    ],
)
def test_what_reads_all_heads_at_once_is_refused_where_ranks_share_them(
    have: Catalogue, entry: dict[str, Any], is_taken: bool
) -> None:
    shared = replace(have, tensor_parallel=2)
    assert compiled(have, steering=entry).steering
    if is_taken:
        assert compiled(shared, steering=entry).plan == compiled(have, steering=entry).plan
        return
    error = refusal(shared, steering=entry)
    assert (error.status, error.param) == (422, "steering.vector") and "--tensor-parallel-size 1" in error.message
    beside = compiled(shared, steering=[entry, {"vector": "late"}], on_unavailable="ignore")
    assert beside.plan.steering == plan_of(have, {"vector": "late"})


def test_what_a_server_lacks_is_left_out_only_when_asked_and_said_so(have: Catalogue) -> None:
    unknown_probe = {"vector": "late", "when": {"probe": "nope", "above": 0}}
    made = compiled(
        have,
        on_unavailable="ignore",
        steering=[
            *({"vector": name} for name in ("nope", "calm", "wide")),
            {"method": "levitation"},
            unknown_probe,
            MOTE,
        ],
        decoding=[{"method": "telepathy"}, PAIR | {"expert": "absent"}],
    )
    assert [entry.path for entry in made.steering] == ["steering[1]"]
    assert made.plan.steering == plan_of(have, {"vector": "calm"})
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
    have: Catalogue, fields: dict[str, Any]
) -> None:
    assert refusal(have, on_unavailable="ignore", **fields).status == 400


# ---- the operator's limit, and order


@pytest.mark.parametrize(
    ("entry", "param"),
    [
        ({"vector": "late", "scale": -20}, "steering.scale"),
        ({"vector": "late", "strength": 20}, "steering.strength"),
        ({"vector": "iti"}, "steering.scale"),  # the paper's strength
        ({"vector": "late", "schedule": {"shape": "linear", "from": 0, "to": 10, "tokens": 5}}, "steering.scale"),
        ({"vector": "plane", "angle": 180}, "steering"),
    ],
)
def test_an_edit_beyond_the_limit_is_refused_or_weakened(have: Catalogue, entry: dict[str, Any], param: str) -> None:
    strict = replace(have, limit=Limit(0.5))
    lenient = replace(have, limit=Limit(0.5, "clamp"))
    error = refusal(strict, steering=entry)
    assert (error.status, error.param) == (400, param) and "allows 0.5" in error.message
    assert compiled(strict, steering={"vector": "late"}).warnings == []
    if "angle" in entry:  # there is no scale to lower
        assert refusal(lenient, steering=entry).param == param
        return
    made = compiled(lenient, steering=entry)
    (said,) = made.receipt([])["steering"]
    full = receipt(have, entry)
    assert 0.499 < said["dose"]["relative"] <= 0.5 * (1 + 1e-6) and said["dose"]["at"] == full["dose"]["at"]
    assert 0 < said["scale"] / full["scale"] < 1
    assert made.warnings == [f"steering: weakened to scale {said['scale']:.4g}, the most this server allows"]


def test_rotations_are_weakened_until_they_keep_to_the_limit(have: Catalogue) -> None:
    """Their dose is no multiple of their strength."""
    made = compiled(replace(have, limit=Limit(0.3, "clamp")), steering={"vector": "turn", "scale": 2.5})
    (said,) = made.receipt([])["steering"]
    assert 0.29 < said["dose"]["relative"] <= 0.3 < receipt(have, {"vector": "turn", "scale": 2.5})["dose"]["relative"]


ORDERED = [
    (["late", "strange"], False),
    (["calm", "late"], False),  # nowhere together
    (["iti", "lofit"], False),
    (["late", "ablate"], True),
    (["late", "late"], False),
    (["ablate", "calm"], True),
    (["prefix", "iti"], False),
]


@pytest.mark.parametrize(("names", "is_noted"), ORDERED)
def test_edits_that_do_not_commute_are_said_to_be_made_in_order(
    everything: Catalogue, names: list[str], is_noted: bool
) -> None:
    warnings = compiled(everything, steering=[{"vector": name} for name in names]).warnings
    assert [warning.split(" where")[0] for warning in warnings] == (
        ["steering[0] and steering[1] do not commute"] if is_noted else []
    )


def test_renorm_is_not_addition(have: Catalogue) -> None:
    late = {"vector": "late"}
    assert not compiled(have, steering=[late, late]).warnings
    assert compiled(have, steering=[late | {"renorm": True}, late]).warnings
    assert not compiled(have, steering=[late | {"renorm": True, "scale": 0}, {"vector": "calm"}]).warnings


# ---- what needs the prompt


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
    have: Catalogue, everything: Catalogue, where: dict[str, Any]
) -> None:
    for other in ({"vector": "late"}, PASTA):
        if other is PASTA and "tokens" in where:
            continue  # refused anyway
        with pytest.raises(BadRequest) as caught:
            check(compiled(everything, steering=[{"vector": "calm"}, other | {"where": where}]))
        assert caught.value.param == "steering[1].where"
    assert check(compiled(have, steering={"vector": "late", "where": {"prompt": [[8, 12]]}})) == 4


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
def test_a_request_tells_one_set_of_tokens_apart(have: Catalogue, clauses: list[Any], param: str | None) -> None:
    """The engine has one row for them: with two sets, every clause would take the tokens of both."""
    made = compiled(have, steering=[{"vector": "late", "where": where} for where in clauses])
    if param is None:
        assert check(made) == 4
        return
    with pytest.raises(BadRequest, match="one set of tokens") as caught:
        check(made)
    assert caught.value.param == param


def test_messages_of_every_kind_of_entry_become_windows(everything: Catalogue) -> None:
    class Chat:
        def spans(self, chosen: Any) -> list[tuple[int, int]]:
            return [(2, 4)] if chosen.role == "user" else []

    where = {"messages": [{"role": "user"}]}
    entries = [entry | {"where": where} for entry in ({"vector": "late"}, PASTA, {"vector": "calm"})]
    made = compiled(everything, steering=entries)
    made.place(Prompt(9, list(range(9)), 64, None, Chat()))  # type: ignore[arg-type]
    assert made.plan.steering is not None
    placed = [*made.plan.steering.edits, *made.plan.steering.specials]
    assert [planned.where.intervals(9) for planned in placed] == [[(2, 4)]] * 3
    assert [said["where"][0]["prompt"] for said in made.receipt([])["steering"]] == [[(2, 4)]] * 3
    absent = compiled(everything, steering=[{"vector": "late"}, PASTA | {"where": {"messages": [{"role": "tool"}]}}])
    with pytest.raises(BadRequest) as caught:
        absent.place(Prompt(9, list(range(9)), 64, None, Chat()))  # type: ignore[arg-type]
    assert caught.value.param == "steering[1].where.messages"


def test_a_prefix_stands_before_soft_rows_and_both_before_the_prompt(everything: Catalogue) -> None:
    made = compiled(everything, steering=[{"vector": "soft"}, {"vector": "prefix"}])
    ids = made.place(Prompt(3, [7, 8, 9], 64, None))
    assert ids is not None and made.plan.steering is not None
    assert ids[5:] == [7, 8, 9]
    assert [(insert.start, insert.num) for insert in made.plan.steering.inserts] == [(0, 2), (2, 3)]
    said = made.receipt([Fed(8, 10, [])])["steering"]
    assert said[0]["prompt_tokens"] == 3 and said[1]["where"] == [{"prompt": [(0, 2)], "generation": "none"}]
    error = refusal(everything, steering={"vector": "prefix"}, decoding=PAIR)
    assert (error.status, error.param) == (400, "steering.vector")


def test_an_auxiliary_models_context_bounds_the_request(have: Catalogue) -> None:
    made = compiled(have, decoding=PAIR | {"expert": "short"})
    assert made.check(prompt_len=4, max_tokens=50, is_explicit=False) == 6  # not said: as much as fits
    assert made.check(prompt_len=4, max_tokens=6, is_explicit=True) == 6
    for prompt_len, max_tokens, is_explicit in ((4, 7, True), (10, 1, False), (99, 1, True)):
        with pytest.raises(BadRequest, match="follows at most") as caught:
            made.check(prompt_len, max_tokens, is_explicit)
        assert caught.value.param == "decoding.expert"


SERVERS = {
    "as it comes": {},
    "limited": {"limit": Limit(0.5)},
    "clamped": {"limit": Limit(0.5, "clamp")},
    "two ranks": {"tensor_parallel": 2},
    "half precision": {"dtype": "float16"},
}


@pytest.mark.parametrize("server", SERVERS)
@settings(max_examples=300, deadline=None)
@given(fields=EXTRAS)
def test_any_json_is_compiled_or_refused_with_an_answer_that_can_be_sent(
    everything: Catalogue, server: str, fields: dict[str, Any]
) -> None:
    made = None
    try:
        made = compile_extras(fields, replace(everything, **SERVERS[server]))
        if made is not None:
            check(made)
    except WhipstaffError as error:
        assert 400 <= error.status < 500
        assert error.param is not None
        json.dumps(error.body(), ensure_ascii=False, allow_nan=False).encode()
    if made is not None:
        said = made.receipt([])
        json.dumps(said, ensure_ascii=False, allow_nan=False).encode()
        assert RequestPlan.from_wire(json.loads(json.dumps({KEY: made.plan.to_wire()}))) == made.plan
        if SERVERS[server].get("limit"):
            assert all(entry["dose"]["relative"] <= 0.501 for entry in said["steering"] if entry.get("dose"))


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


@pytest.mark.parametrize(
    ("param", "data", "path"),
    [
        ("", {}, "p"),
        ("a", {}, "p.a"),
        ("a.1.b", {"a": [0, {"b": 3}]}, "p.a[1].b"),
        ("heads.3.1", {"heads": {"3": [0, 9]}}, "p.heads.3[1]"),
        ("where.prompt", {"where": "all"}, "p.where"),
        ("features.0", {}, "p.features"),  # the file's own: the request has none
        ("scale", {"coefficient": 1}, "p.coefficient"),
        ("scale", {"features": []}, "p.scale"),
    ],
)
def test_fields_of_steering_become_paths_of_the_request(param: str, data: Any, path: str) -> None:
    assert field_path("p", param, data) == path


# ---- early layers


@pytest.fixture(scope="module")
def early(have: Catalogue) -> Catalogue:
    """A server with a tokenizer, of which two early layers can be read."""
    words = Words([], {}, (), None)
    return replace(have, words=words, depth=Depth(4, kept=frozenset({0, 1}), has_norm=False))


@pytest.mark.parametrize("fields", [{"decoding": {"method": "dola"}}, {"dola_layers": [1, 0]}, {"dola_layers": "low"}])
def test_what_a_method_reads_of_early_layers_is_kept(early: Catalogue, fields: dict[str, Any]) -> None:
    layers = [0, 1] if fields.get("dola_layers") == [1, 0] else [0]
    made = compiled(early, **fields)
    assert made.plan.steering == SteeringPlan((), keeps=tuple(layers))
    assert made.plan.decoding is not None and made.plan.decoding.early_layers == tuple(layers)
    assert RequestPlan.from_wire(json.loads(json.dumps({KEY: made.plan.to_wire()}))) == made.plan
    (said,) = made.receipt([])["decoding"]
    assert (said["method"], said["layers"], made.receipt([])["steering"]) == ("dola", layers, [])
    assert made.label == "dola"


def test_keeping_goes_together_with_steering(early: Catalogue) -> None:
    plan = compiled(early, steering={"vector": "calm", "where": "generation"}, dola_layers=[0]).plan
    assert plan.steering is not None and len(plan.steering.edits) == 1 and plan.steering.keeps == (0,)
    placed = PlacedPlan(plan, 5)
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
    early: Catalogue, fields: dict[str, Any], status: int, param: str, reason: str
) -> None:
    error = refusal(early, **fields)
    assert (error.status, error.param) == (status, param)
    assert re.search(reason, error.message)


def test_the_table_says_which_flag_keeps_early_layers(early: Catalogue) -> None:
    rows = [
        next(row for row in method_table(server) if row["name"] == "dola")
        for server in (early, replace(early, depth=Depth(4)))
    ]
    assert [row["reason"] for row in rows] == [None, "start the server with --early-layers LAYERS"]


# ---- what is tried before it is chosen


@pytest.fixture(scope="module")
def ahead(tmp_path_factory: pytest.TempPathFactory, have: Catalogue) -> Catalogue:
    """A server that looks ahead, with both kinds of KWD's classifiers and a vector."""
    folder = tmp_path_factory.mktemp("ahead")
    artifacts.write(
        folder / "prefix.safetensors", Header(method="prefix_classifier", model=SHAPE), {"weight": UNIT[:2]}
    )
    artifacts.write(folder / "token.safetensors", Header(method="token_classifier", model=SHAPE), {"weight": UNIT})
    artifacts.write(folder / "calm.safetensors", Header(method="vector", model=SHAPE), TENSORS)
    registry = Registry(read_vectors([folder]), SHAPE)
    return replace(have, registry=registry, words=Words([], {}, (), None), vocabulary=8, looks_ahead=True)


KWD = {"method": "kwd", "classifier": "prefix"}


def test_a_classifier_of_either_kind(ahead: Catalogue) -> None:
    found = {name: compiled(ahead, decoding=KWD | {"classifier": name}) for name in ("prefix", "token")}
    assert [one.decoding[0].ahead for one in found.values()] == ["classifier", ""]
    for one in found.values():
        one.check_logprobs(scores_prompt=False)
    found["token"].check_logprobs(scores_prompt=True)
    with pytest.raises(BadRequest, match="score an answer with the method `forced`") as error:
        found["prefix"].check_logprobs(scores_prompt=True)
    assert error.value.param == "decoding.classifier"
    compiled(ahead, decoding=KWD, logprobs_source="base").check_logprobs(scores_prompt=True)


def test_a_token_that_is_tried_has_no_entropy_yet(ahead: Catalogue) -> None:
    calm = {"vector": "calm", "schedule": {"shape": "entropy", "low": 1, "high": 2}}
    error = refusal(ahead, steering=[calm], decoding=[KWD])
    assert (error.status, error.param) == (400, "steering[0].schedule") and "decoding[0].classifier" in error.message
    compiled(ahead, steering=[calm], decoding=[KWD | {"classifier": "token"}])
    compiled(ahead, steering=[{"vector": "calm", "schedule": {"shape": "linear", "tokens": 4}}], decoding=[KWD])


def test_who_does_not_look_ahead_names_the_flag(ahead: Catalogue) -> None:
    blind = replace(ahead, looks_ahead=False)
    error = refusal(blind, decoding=KWD)
    assert (error.status, error.param) == (422, "decoding.classifier") and "--lookahead" in error.message
    skipped = compiled(blind, decoding=KWD, on_unavailable="ignore")
    assert not skipped.decoding and "--lookahead" in skipped.warnings[0]
    rows = [next(row for row in method_table(server) if row["name"] == "kwd") for server in (ahead, blind)]
    assert [row["schema"]["properties"]["classifier"]["enum"] for row in rows] == [["prefix", "token"], ["token"]]
    (row,) = (row for row in method_table(replace(blind, registry=Registry({}, SHAPE))) if row["name"] == "kwd")
    assert row["reason"] == (
        "start the server with --vectors PATH of a token_classifier or, with --lookahead, a prefix_classifier"
    )


# ---- the method table


def test_the_method_table_says_what_this_server_can_do(
    have: Catalogue, everything: Catalogue, nothing: Catalogue
) -> None:
    dense, full, empty = ({row["name"]: row for row in method_table(server)} for server in (have, everything, nothing))
    edits = {name: method for name, method in STEERING.items() if method.served_by != "logits"}
    assert dense.keys() == full.keys() == empty.keys() == {*edits, *METHODS}
    assert full["proxy_tuning"]["schema"]["properties"]["expert"]["enum"] == list(LIMITS)
    assert full["proxy_tuning"]["defaults"]["alpha"] == 1.0
    assert not any(row["available"] for row in empty.values())
    assert empty["caa"]["reason"] == "no vector of this method is loaded; start the server with --vectors PATH"
    assert empty["proxy_tuning"]["reason"] == "start the server with --aux NAME=MODEL"
    assert dense["mote"]["reason"] == "the served model has no experts"
    assert dense["pasta"]["reason"] == "start the server with --steering-sites attention"
    served = {entry.vector.method.name for entry in everything.registry} | {"mote", "pasta", "attention_override"}
    mixing = {name for name, method in METHODS.items() if isinstance(method, Mixing)}  # no tokenizer, no heads here
    decoding = {name for name in mixing if not issubclass(METHODS[name].params, CoupledParams)}
    for name, row in full.items():
        assert row["paper"] and row["kind"] == (METHODS[name].stage if name in METHODS else "edit")
        assert (row["reason"] is None) is row["available"] is (name in {*served, *decoding})
    assert dense["vector"]["schema"]["properties"]["vector"]["enum"] == ["calm", "router", "strange"]
    for name in edits:
        schema = full[name]["schema"]
        assert schema["additionalProperties"] is False
        assert ("vector" in schema["required"]) is ("method" not in schema["properties"]) is STEERING[name].needs_file
    assert full["caa"]["schema"]["properties"].keys() >= {"scale", "layers", "where", "when", "schedule", "renorm"}
    assert full["mote"]["schema"]["properties"].keys() == {"vector", "method", "where", "mode", "experts"}
    assert full["soft_prompt"]["schema"]["properties"].keys() == {"vector", "insert", "tokens"}


# ---- the registry


def test_names_are_file_names_and_unfit_vectors_are_known_but_not_usable(have: Catalogue) -> None:
    registry = have.registry
    assert registry.names == sorted(FILES.keys() - {"wide"})
    assert [entry.name for entry in registry] == sorted(FILES)
    with pytest.raises(VectorUnfit, match=r"hidden 16.*hidden 8"):
        registry.usable("wide", "p")
    with pytest.raises(NotFound, match=r"'ablate', .*'wide'"):
        registry.entry("clam")


def test_a_folder_and_single_files_load_alike(folder: Path) -> None:
    files = read_vectors([folder / "late.safetensors", folder / "calm.safetensors"])
    assert list(files) == ["late", "calm"]
    assert files["calm"].vector.digest == read_vectors([folder])["calm"].vector.digest


def test_a_bad_file_stops_the_start_and_is_named(folder: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"nothing of the kind")
    for paths, words in (
        ([tmp_path / "absent"], "no such file or folder"),
        ([folder, folder / "calm.safetensors"], "two vectors are called 'calm'"),
        ([tmp_path], "broken.safetensors: not a sound safetensors file"),
    ):
        with pytest.raises(BadVectorFile, match=words):
            read_vectors(paths)


# ---- where clauses, against sets of positions

PROMPT_WINDOW = st.tuples(st.integers(-12, 12), st.none() | st.integers(-12, 12))
GENERATION_WINDOW = st.tuples(st.integers(0, 12), st.none() | st.integers(0, 14))
HORIZON = 40


def windows(window: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.sampled_from(["all", "none"]) | st.lists(window, max_size=4)


REGION = st.fixed_dictionaries(
    {},
    optional={
        "prompt": windows(PROMPT_WINDOW),
        "generation": windows(GENERATION_WINDOW),
        "tokens": st.just([3, 4]),
    },
)
CLAUSE = st.builds(
    lambda region, hole: region | ({} if hole is None else {"exclude": hole}), REGION, st.none() | REGION
)


def selected(region: dict[str, Any], prompt_len: int, is_named: bool = False) -> set[int]:
    """The positions below HORIZON that a region names: slices of the prompt's and of the generation's positions; all
    of them, should their tokens be the named ones and the region name them."""
    found: set[int] = set(range(HORIZON)) if is_named and "tokens" in region else set()
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
    is_idle = not any(
        fed & (selected(clause, prompt_len, is_named) - selected(clause.get("exclude", {}), prompt_len, is_named))
        for is_named in (False, True)
    )
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

PLANNED = st.builds(
    lambda digest, scale, clause: (RowEdit(digest, json.dumps({"scale": scale}), None), clause),
    st.sampled_from("abc"),
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
        want = [
            tuple(
                edit
                for edit, _, clause in edits
                if position in selected(clause, prompt_len, is_named)
                and position not in selected(clause.get("exclude", {}), prompt_len, is_named)
            )
            for is_named in (False, True)
        ]
        found = [one for one in segments if one.start <= position and (one.end is None or position < one.end)]
        got = [(one.row, one.row_at_tokens) for one in found]
        if not plan.token_ids:
            want[1] = want[0]
        assert got == ([tuple(want)] if any(want) else [])
    assert SteeringPlan.from_wire(json.loads(json.dumps(plan.to_wire()))) == plan
    placed = PlacedPlan(RequestPlan(plan if plan.edits else None), prompt_len)
    assert placed.rows == {row for one in segments for row in (one.row, one.row_at_tokens) if row}
    assert placed.first_edited == min((one.start for one in segments), default=None)


# ---- edits that would overflow


def test_the_entry_that_takes_the_activations_too_far_is_named(tmp_path: Path) -> None:
    gains = {f"resid_post.{layer}.gain": torch.full((8,), 0.5) for layer in range(4)}
    artifacts.write(tmp_path / "loud.safetensors", Header(method="vector", model=SHAPE), gains)
    loud = Catalogue(Registry(read_vectors([tmp_path]), SHAPE), {}, places=PLACES)
    entries = [{"vector": "loud", "scale": scale} for scale in (1, 200, 200)] + [{"vector": "loud", "strength": 200}]
    assert compile_extras({"steering": entries[:2]}, loud) is not None
    error = refusal(loud, steering=entries)
    assert (error.status, error.param) == (400, "steering[2].scale")  # 1.5^4 * 101^4 = 5e8; once more is 5e16
    assert refusal(loud, steering=[entries[1], entries[3]]).param == "steering[1].strength"
    assert refusal(replace(loud, dtype="float16"), steering=entries[1]).param == "steering.scale"


@pytest.mark.parametrize("site", ["attn_head", "mlp_out", "resid_post"])
def test_edits_of_one_place_multiply_wherever_it_is(tmp_path: Path, site: str) -> None:
    gain = torch.ones(2, 4) if site == "attn_head" else torch.ones(8)
    artifacts.write(tmp_path / "gain.safetensors", Header(method="vector", model=SHAPE), {f"{site}.0.gain": gain})
    loud = Catalogue(Registry(read_vectors([tmp_path]), SHAPE), {}, places=PLACES)
    entries = [{"vector": "gain", "scale": 999}] * 6
    assert refusal(loud, steering=entries).param == "steering[5].scale"  # 1000^5 is 1e15
    assert compile_extras({"steering": entries[:5]}, loud) is not None


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
    given_ = torch.tensor(numbers, dtype=torch.float32).reshape(2, 4)
    got = parse(packed({"attn_head.2.gain": given_})).tensors["attn_head", 2]["gain"]
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
    "header length absurd": (b"\xff" * 8 + b"{}", 'no "whipstaff" metadata'),
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
    windows = [{"vector": "late", "where": {"prompt": [[start, None]]}} for start in range(4)]
    few = replace(have, num_slots=3)
    with pytest.raises(Unavailable, match="--steering-slots") as caught:
        compiled(few, steering=windows).check(prompt_len=9, max_tokens=4, is_explicit=True)
    assert caught.value.param == "steering"
    assert compiled(few, steering=windows[:3]).check(prompt_len=9, max_tokens=4, is_explicit=True) == 4
