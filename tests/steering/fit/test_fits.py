"""Fits find what was planted, say how sure they are, and leave a file that can be served and nothing else."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import SHAPE, Planted
from torch import Tensor
from transformers import AutoTokenizer

from whipstaff.server import demo
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import fitting
from whipstaff.steering.fit.directions import cosine, expected_cosine, separation
from whipstaff.steering.fit.job import chosen_layers
from whipstaff.steering.fit.options import Options
from whipstaff.steering.fit.recipes import RECIPES
from whipstaff.steering.fit.render import Template
from whipstaff.steering.method import HookPoint
from whipstaff.steering.vector_file import Vector, packed, parse

GENERATOR = torch.Generator().manual_seed(1)
WORDS = (
    "the",
    "a",
    "house",
    "door",
    "field",
    "river",
    "cloud",
    "bread",
    "garden",
    "stone",
    "morning",
    "window",
    "road",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(demo.MODELS / "demo")


def unit(width: int) -> Tensor:
    found = torch.randn(width, generator=GENERATOR)
    return found / found.norm()


def sentences(num: int) -> list[str]:
    draws = np.random.RandomState(5)
    return [" ".join(draws.choice(WORDS, 6)) + f" {index}" for index in range(num)]


def written(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def pairs(folder: Path, num: int = 80) -> Path:
    rows = [{"positive": f"{text} bright", "negative": f"{text} dark"} for text in sentences(num)]
    return written(folder / "pairs.jsonl", rows)


def mark(tokenizer: Any) -> int:
    """The token that positive texts hold and others do not."""
    return min(set(tokenizer.encode("a x bright")) - set(tokenizer.encode("a x dark")))


def run(
    method: str, source: Any, data: Path, folder: Path, goes_on: bool = False, **said: Any
) -> tuple[Vector, dict[str, Any]]:
    """(the file, its provenance)."""
    job = fitting.prepared(
        method, source, [data], Options(**{"template": "none", **said}), folder / "rows", goes_on=goes_on
    )
    made = fitting.fit(method, job)
    assert not (folder / "rows").exists()
    return parse(packed(made.header, made.tensors)), made.header.provenance


@pytest.mark.parametrize("method", ["caa", "repe", "control_vector", "shift_vector"])
@pytest.mark.parametrize("aggregate", ["mean", "pca", "lat", "logistic"])
def test_a_planted_direction_is_found(method: str, aggregate: str, tokenizer: Any, tmp_path: Path) -> None:
    direction, at = unit(SHAPE.hidden_size), HookPoint("resid_post", 3)
    source = Planted(tokenizer, mark(tokenizer), {at: 6 * direction})
    vector, said = run(method, source, pairs(tmp_path), tmp_path, aggregate=aggregate, layers="2-4", read="last")
    found = vector.tensors[at]["add"]
    # what 56 rows a class allow; a component varies more than a mean does
    least = expected_cosine(6, SHAPE.hidden_size, 56) - (0.05 if aggregate == "mean" else 0.12)
    assert cosine(found.numpy(), direction.numpy()) > least
    assert abs(float(found.norm()) - 6) < 1
    assert said["score"]["at"] == "resid_post.3" and said["score"]["auc"] > 0.99


def test_the_layer_is_chosen_where_the_classes_lie_apart(tokenizer: Any, tmp_path: Path) -> None:
    source = Planted(
        tokenizer, mark(tokenizer), {HookPoint("resid_post", 2): 3 * unit(24), HookPoint("resid_post", 4): 1 * unit(24)}
    )
    vector, _ = run("caa", source, pairs(tmp_path), tmp_path)
    assert vector.layers == [2]


def test_nothing_planted_is_said_to_be_nothing(tokenizer: Any, tmp_path: Path) -> None:
    _, said = run("caa", Planted(tokenizer, mark(tokenizer), {}), pairs(tmp_path, 200), tmp_path)
    assert abs(said["score"]["auc"] - 0.5) < 0.2 and abs(said["score"]["cosine_of_halves"]) < 0.6


def test_planted_heads_are_found(tokenizer: Any, tmp_path: Path) -> None:
    numbers = {}
    for layer, head in ((1, 2), (4, 0)):
        whole = torch.zeros(4, 6)
        whole[head] = 2.5 * unit(6)
        numbers[HookPoint("attn_head", layer)] = whole.flatten()
    rows = [{"question": text, "right": ["bright"], "wrong": ["dark"]} for text in sentences(120)]
    source = Planted(tokenizer, mark(tokenizer), numbers)
    vector, said = run(
        "iti", source, written(tmp_path / "q.jsonl", rows), tmp_path, num_heads=2, template="Q: {prompt} A: {response}"
    )
    assert sorted(said["score"]["heads"]) == [[1, 2], [4, 0]]
    for layer, head in ((1, 2), (4, 0)):
        parts = vector.tensors[HookPoint("attn_head", layer)]
        planted = numbers[HookPoint("attn_head", layer)].view(4, 6)[head]
        assert cosine(parts["direction"][head].numpy(), planted.numpy()) > 0.95
        assert set(parts["sigma"].nonzero().flatten().tolist()) == {head}
    assert min(said["score"]["accuracy"]) > said["score"]["best_accuracy_with_shuffled_labels"]


def test_planted_experts_are_found(tokenizer: Any, tmp_path: Path) -> None:
    numbers = torch.zeros(8)
    numbers[5] = 4.0
    rows = [{"prompt": f"{text} {word}", "class": word} for text in sentences(60) for word in ("bright", "dark")]
    source = Planted(tokenizer, mark(tokenizer), {HookPoint("router", 2): numbers})
    vector, said = run("mote", source, written(tmp_path / "c.jsonl", rows), tmp_path, experts=1)
    assert said["score"]["experts"] == [[2, 5]]
    assert vector.tensors[HookPoint("router", 2)]["off"].nonzero().flatten().tolist() == [5]


def test_a_probe_opens_above_0(tokenizer: Any, tmp_path: Path) -> None:
    numbers = {HookPoint("resid_post", layer): 5 * unit(24) for layer in (2, 3)}
    rows = [{"prompt": f"{text} {word}", "class": word} for text in sentences(60) for word in ("bright", "dark")]
    data, source = written(tmp_path / "c.jsonl", rows), Planted(tokenizer, mark(tokenizer), numbers)
    vector, said = run("probe", source, data, tmp_path)
    assert vector.layers == [2]  # the earliest that is as good
    (parts,) = vector.tensors.values()
    for row in rows:
        ids = tuple(tokenizer(row["prompt"])["input_ids"])
        asked = Template(tokenizer, "none").render(row["prompt"]).asked("last-prompt")
        (found,) = source.read([asked], [HookPoint("resid_post", 2)])
        reading = float(found[HookPoint("resid_post", 2)][0] @ parts["direction"] + parts["bias"])
        assert asked.ids == ids and (reading > 0) == (row["class"] == "bright")
    assert said["score"]["f1"] == 1


def test_the_same_seed_gives_the_same_file_and_an_interrupt_changes_nothing(tokenizer: Any, tmp_path: Path) -> None:
    data, at = pairs(tmp_path), HookPoint("resid_post", 3)
    numbers = {at: 2 * unit(24)}
    whole, _ = run("caa", Planted(tokenizer, mark(tokenizer), numbers), data, tmp_path)
    again, _ = run("caa", Planted(tokenizer, mark(tokenizer), numbers), data, tmp_path)
    assert whole.digest == again.digest
    with pytest.raises(KeyboardInterrupt):
        run("caa", Planted(tokenizer, mark(tokenizer), numbers, fails_at=100), data, tmp_path)
    with pytest.raises(SteeringError, match="--resume"):
        run("caa", Planted(tokenizer, mark(tokenizer), numbers), data, tmp_path)
    with pytest.raises(SteeringError, match="another fit"):
        run("caa", Planted(tokenizer, mark(tokenizer), numbers), data, tmp_path, goes_on=True, seed=7)
    rest = Planted(tokenizer, mark(tokenizer), numbers)
    resumed, _ = run("caa", rest, data, tmp_path, goes_on=True)
    assert resumed.digest == whole.digest and rest.num_read < 100


def test_a_file_says_where_it_came_from(tokenizer: Any, tmp_path: Path) -> None:
    _, said = run(
        "caa", Planted(tokenizer, mark(tokenizer), {HookPoint("resid_post", 3): unit(24)}), pairs(tmp_path), tmp_path
    )
    assert said["data"]["rows"] == 80 and len(said["data"]["sha256"]) == 64
    assert said["recipe"]["seed"] == 42 and said["versions"]["torch"] and said["model"] == "planted"
    assert sum(said["splits"].values()) == 80


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"num_heads": 3}, "does not take it"),
        ({"layers": "4-9"}, "layers 0 to 5"),
        ({"layers": "x"}, "40%-90%"),
        ({"template": "Q: {prompt}"}, "ends in"),
        ({"system": "be kind"}, "chat template"),
    ],
)
def test_options_that_make_no_sense_are_named(
    said: dict[str, Any], reason: str, tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(SteeringError, match=reason):
        run("caa", Planted(tokenizer, 5, {}), pairs(tmp_path), tmp_path, **said)


def test_every_recipe_makes_files_of_a_method_that_there_is() -> None:
    from whipstaff.steering.methods import METHODS

    assert set(RECIPES) <= set(METHODS)
    assert all(recipe.takes <= set(Options.model_fields) for recipe in RECIPES.values())


def test_layers_are_read_as_they_are_written() -> None:
    assert chosen_layers("1-3,5", 6) == [1, 2, 3, 5]
    assert chosen_layers("all", 3) == [0, 1, 2]
    assert chosen_layers("40%-90%", 10) == [4, 5, 6, 7, 8]


def test_a_separation_counts_ties_as_half() -> None:
    found = separation(np.array([1.0, 2.0, 2.0, 3.0]), np.array([0, 0, 1, 1]))
    assert found.auc == (1 + 1 + 0.5 + 1) / 4
    assert math.isnan(separation(np.array([1.0]), np.array([1])).auc)
