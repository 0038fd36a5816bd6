"""What receipts say of steering: tokens, what fired, doses; and the limits on those."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogues import MIXED, PLACES, SHAPE, WHEN, compiled, receipt, refusal

from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.admission.receipt import receipt as receipt_of
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorSnapshot, read_vectors
from whipstaff.steering import vector_file
from whipstaff.steering.edits import Lengths
from whipstaff.steering.fed import Fed
from whipstaff.steering.served import Limit
from whipstaff.steering.vector_file import Header


def test_the_receipt_repeats_what_decides(caps: Capabilities) -> None:
    said = receipt_of(compiled(caps, steering=MIXED))["steering"]
    assert said[0]["when"] == WHEN
    assert said[1]["schedule"] == {"shape": "linear", "tokens": 8}
    assert said[1]["features"] == [{"feature": 2, "set": 4.0, "scale": None, "add": None, "only_if_active": False}]
    assert said[2]["renorm"] is True and said[3]["normalize"] is True
    assert len(said[4]["where"]) == 3 and said[4]["location"] == "back"  # a clause per row
    assert [entry.get("fired") for entry in said] == [
        {"tokens": 0, "of": 0}, None, {"tokens": 0, "of": 0}, {"tokens": 0, "of": 0}, None, None,
    ]  # fmt: skip


def test_the_receipt_counts_the_tokens_that_were_edited(caps: Capabilities) -> None:
    made = compiled(caps, steering=[{"vector": "calm"}, {"vector": "late", "where": {"generation": [[1, 3]]}}])
    # two sequences: 5 prompt tokens of which the last is edited, then 9 and 1 more positions fed
    said = receipt_of(made, fed=[Fed(5, 14, []), Fed(5, 6, [])])["steering"]
    assert [entry["edited_tokens"] for entry in said] == [(1 + 9) + (1 + 1), 2 + 0]


def test_the_receipt_counts_tokens_told_apart(caps: Capabilities) -> None:
    ids = [5, 7, 5, 8, 5, 9]
    for where, num in (
        ({"tokens": [5]}, 3),
        ({"tokens": [5], "generation": "all"}, 5),
        ({"tokens": [5], "exclude": {"prompt": [[0, 1]]}}, 2),
        ({"generation": "all", "exclude": {"tokens": [5, 9]}}, 1),
    ):
        assert receipt(caps, {"vector": "late", "where": where}, [Fed(3, 6, ids)])["edited_tokens"] == num


def test_the_receipt_says_what_fired_of_what_is_known(caps: Capabilities) -> None:
    late = {"vector": "late", "where": "all"}
    step = late | {"when": WHEN | {"decide": "step"}}
    read = [None, 0.1, 0.3, 0.25, 0.9]  # the first position's KV came from the cache
    assert receipt(caps, step, [Fed(3, 5, [], [read])])["fired"] == {"tokens": 2, "of": 4}
    assert receipt(caps, step, [Fed(3, 5, [], [read]), Fed(3, 5, [])])["fired"] == {"tokens": 2, "of": 4}
    latched = late | {"when": WHEN}
    fed = [Fed(3, 5, [], [[0.9]]), Fed(3, 6, [], [[0.1]])]  # decided at the last prompt token, for what follows
    assert receipt(caps, latched, fed)["fired"] == {"tokens": 3, "of": 3 + 4, "readings": [0.9, 0.1]}


def test_doses_are_beside_the_activations_and_follow_schedules(caps: Capabilities) -> None:
    late = {"vector": "late", "scale": 5}  # sqrt(8) long, and the stream is 10
    dose = math.sqrt(8) / 2
    assert receipt(caps, late)["dose"] == {"relative": pytest.approx(dose), "at": "resid_post.2"}
    growing = late | {"schedule": {"shape": "linear", "from": 0.5, "to": -3, "tokens": 9}}
    assert receipt(caps, growing)["dose"]["relative"] == pytest.approx(3 * dose)
    assert receipt(replace(caps, lengths=Lengths({})), late)["dose"] is None
    assert receipt(caps, late | {"normalize": True})["dose"]["relative"] == pytest.approx(0.5)


def test_advice_is_the_dose_at_the_files_strength_and_at_1(caps: Capabilities) -> None:
    vectors = {name: caps.registry.entry(name).vector for name in caps.registry.names}
    said = {name: vector.method.kind.doses(vector, caps) for name, vector in vectors.items()}
    unit = math.sqrt(140) / 10
    assert said["calm"] == [
        {"scale": 3.0, "relative": pytest.approx(3 * unit), "at": "attn_head.0"},
        {"scale": 1.0, "relative": pytest.approx(unit), "at": "attn_head.0"},
    ]
    assert [one["scale"] for one in said["iti"]] == [15.0, 1.0] and [one["scale"] for one in said["late"]] == [1.0]
    assert not any(said[name] for name in ("knob", "sae", "angular", "probe", "soft", "prefix", "router"))


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
def test_an_edit_beyond_the_limit_is_refused_or_weakened(caps: Capabilities, entry: dict[str, Any], param: str) -> None:
    strict = replace(caps, limit=Limit(0.5))
    lenient = replace(caps, limit=Limit(0.5, "clamp"))
    error = refusal(strict, steering=entry)
    assert (error.status, error.param) == (400, param) and "allows 0.5" in error.message
    assert compiled(strict, steering={"vector": "late"}).warnings == ()
    if "angle" in entry:  # there is no scale to lower
        assert refusal(lenient, steering=entry).param == param
        return
    made = compiled(lenient, steering=entry)
    (said,) = receipt_of(made)["steering"]
    full = receipt(caps, entry)
    assert 0.499 < said["dose"]["relative"] <= 0.5 * (1 + 1e-6) and said["dose"]["at"] == full["dose"]["at"]
    assert 0 < said["scale"] / full["scale"] < 1
    assert made.warnings == (f"steering: weakened to scale {said['scale']:.4g}, the most this server allows",)


def test_rotations_are_weakened_until_they_keep_to_the_limit(caps: Capabilities) -> None:
    """Their dose is no multiple of their strength."""
    made = compiled(replace(caps, limit=Limit(0.3, "clamp")), steering={"vector": "turn", "scale": 2.5})
    (said,) = receipt_of(made)["steering"]
    assert 0.29 < said["dose"]["relative"] <= 0.3 < receipt(caps, {"vector": "turn", "scale": 2.5})["dose"]["relative"]


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
    everything: Capabilities, names: list[str], is_noted: bool
) -> None:
    warnings = compiled(everything, steering=[{"vector": name} for name in names]).warnings
    assert [warning.split(" where")[0] for warning in warnings] == (
        ["steering[0] and steering[1] do not commute"] if is_noted else []
    )


def test_renorm_is_not_addition(caps: Capabilities) -> None:
    late = {"vector": "late"}
    assert not compiled(caps, steering=[late, late]).warnings
    assert compiled(caps, steering=[late | {"renorm": True}, late]).warnings
    (left_out,) = compiled(caps, steering=[late | {"renorm": True, "scale": 0}, {"vector": "calm"}]).warnings
    assert left_out == "steering[0] was left out: it is off"


def test_the_entry_that_takes_the_activations_too_far_is_named(tmp_path: Path) -> None:
    gains = {f"resid_post.{layer}.gain": torch.full((8,), 0.5) for layer in range(4)}
    vector_file.write(tmp_path / "loud.safetensors", Header(method="vector", model=SHAPE), gains)
    loud = Capabilities(VectorSnapshot(read_vectors([tmp_path]), SHAPE), {}, hook_points=PLACES)
    entries = [{"vector": "loud", "scale": scale} for scale in (1, 200, 200)] + [{"vector": "loud", "strength": 200}]
    assert compile_extras({"steering": entries[:2]}, loud) is not None
    error = refusal(loud, steering=entries)
    assert (error.status, error.param) == (400, "steering[2].scale")  # 1.5^4 * 101^4 = 5e8; once more is 5e16
    assert refusal(loud, steering=[entries[1], entries[3]]).param == "steering[1].strength"
    assert refusal(replace(loud, dtype="float16"), steering=entries[1]).param == "steering.scale"


@pytest.mark.parametrize("site", ["attn_head", "mlp_out", "resid_post"])
def test_edits_of_one_place_multiply_wherever_it_is(tmp_path: Path, site: str) -> None:
    gain = torch.ones(2, 4) if site == "attn_head" else torch.ones(8)
    vector_file.write(tmp_path / "gain.safetensors", Header(method="vector", model=SHAPE), {f"{site}.0.gain": gain})
    loud = Capabilities(VectorSnapshot(read_vectors([tmp_path]), SHAPE), {}, hook_points=PLACES)
    entries = [{"vector": "gain", "scale": 999}] * 6
    assert refusal(loud, steering=entries).param == "steering[5].scale"  # 1000^5 is 1e15
    assert compile_extras({"steering": entries[:5]}, loud) is not None
