"""Fitting procedures give what the releases' code gave (tests/golden/steering/fit)."""

import json
from typing import Any

import goldens
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from whipstaff.steering.fit import directions, heads, planes
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.refusal import survivors
from whipstaff.steering.fit.source import Asked
from whipstaff.steering.method import HookPoint


def golden(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what was done, the arrays that it was done to and gave)."""
    folder = goldens.ROOT / "fit" / name
    arrays = {key: value.numpy() for key, value in load_file(folder / "data.safetensors").items()}
    return json.loads((folder / "fit.json").read_text()), arrays


def near(a: Any, b: Any, tolerance: float = 1e-5) -> bool:
    return bool(np.abs(np.asarray(a, dtype=np.float64) - b).max() <= tolerance)


@pytest.fixture(scope="module")
def llama() -> LocalModel:
    folder = goldens.ROOT / "models" / "llama_a"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    return LocalModel(model, None, batch_size=5)


def test_mean_differences_of_a_models_states(llama: LocalModel) -> None:
    said, arrays = golden("mean_difference")
    ids = {label: arrays[f"ids_{side}"].tolist() for label, side in ((1, "A"), (0, "B"))}
    labels = np.array([label for label, rows in ids.items() for _ in rows])
    positions = [len(ids[1][0]) + position for position in said["positions"]]
    points = [HookPoint("resid_pre", layer) for layer in range(4)]
    asked = [Asked(tuple(row), tuple(positions)) for rows in ids.values() for row in rows]
    found = list(llama.read(asked, points))
    for layer, point in enumerate(points):
        rows = np.stack([each[point].numpy() for each in found])  # (texts, positions, width)
        for position in range(len(positions)):
            difference = directions.mean_difference(rows[:, position], labels)
            assert near(difference, arrays["mean_diff"][position, layer])
    last = list(llama.read([Asked(each.ids, (len(each.ids) - 2,)) for each in asked], points[1:]))
    for layer, point in enumerate(points[1:]):  # what leaves a block enters the next
        rows = np.stack([each[point][0].numpy() for each in last])
        assert near(directions.mean_difference(rows, labels), arrays["caa_layers"][layer])


def test_the_refusal_direction_is_the_survivor_of_lowest_score() -> None:
    said, arrays = golden("mean_difference")
    found = survivors(arrays["refusal_score"], arrays["steering_score"], arrays["kl_score"])
    position, layer = found[0]
    assert len(found) == said["n_survivors"]
    assert {"position": said["positions"][position], "layer": layer} == said["selected"]


def test_repes_reader() -> None:
    said, arrays = golden("repe")
    first_is_positive = np.array(said["labels"])[:, 0] == 1
    hidden = arrays["hidden"]
    found, sign = directions.lat(hidden[::2], hidden[1::2], first_is_positive)
    wanted = arrays["pca_directions"][0] * arrays["pca_signs"][0]
    assert near(found * sign, wanted)
    labels = np.array(said["labels"]).flatten()
    assert near(directions.mean_difference(hidden, labels), arrays["cluster_mean_direction"][0])


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_repengs_pca_center(layer: int) -> None:
    _, arrays = golden("repeng")
    hidden = arrays[f"hidden_layer{layer}"]
    found = directions.pair_centred(hidden[::2], hidden[1::2])
    assert near(found, arrays[f"pca_center_layer{layer}"])
    is_positive = (np.arange(len(hidden)) % 2 == 0).astype(int)
    assert near(directions.mean_difference(hidden, is_positive), arrays[f"mean_diff_layer{layer}"])


@pytest.mark.parametrize("number", [0, 1])
def test_itis_folds_probes_heads_and_deviations(number: int) -> None:
    said, arrays = golden("iti")
    lengths = arrays["question_lengths"]
    question_of = np.repeat(np.arange(len(lengths)), lengths)
    fold = heads.folds(len(lengths), said["folds"], said["val_ratio"], said["seed"])[number]
    assert (fold.train == arrays[f"fold{number}_train"]).all() and (fold.val == arrays[f"fold{number}_val"]).all()
    rows = arrays["activations"]
    found = heads.probe(lambda layer: rows[:, layer], 4, arrays["labels"], question_of, fold)
    assert near(found.accuracy, arrays[f"fold{number}_val_acc"], 0)
    assert near(found.difference, arrays[f"fold{number}_com_directions"])
    assert near(found.weight, arrays[f"fold{number}_probe_coef"], 1e-3)
    chosen = heads.best(found.accuracy, said["K"])
    assert set(chosen) == {tuple(each) for each in arrays[f"fold{number}_top_heads"].tolist()}
    for layer, head in chosen:
        sigma = heads.deviation(arrays["tuning_activations"][:, layer, head], found.difference[layer, head])
        assert near(sigma, arrays[f"fold{number}_com_sigma_ddof0"][layer, head])


def test_lofits_heads() -> None:
    said, arrays = golden("lofit_heads")
    lengths = heads.by_length(arrays["A"])
    assert near(lengths, arrays["norms"])
    assert heads.best(lengths, said["K"]) == [tuple(each) for each in arrays["top_heads"].tolist()]


def test_angular_steerings_plane() -> None:
    said, arrays = golden("angular_plane")
    rows = np.concatenate([arrays["acts_a"], arrays["acts_b"]], axis=2)  # (layers, 2, texts, width)
    labels = np.repeat([1, 0], arrays["acts_a"].shape[2])
    made = np.array([[planes.candidate(side, labels) for side in layer] for layer in rows])
    assert near(made, arrays["directions"], 1e-9)
    found = planes.plane(made.reshape(-1, made.shape[-1]))
    assert near(found.mean_cosine, arrays["mean_cosine"], 1e-9)
    assert [found.chosen // 2, found.chosen % 2] == said["max_sim"]
    assert abs(directions.cosine(found.second, arrays["pca0"])) > 1 - 1e-9


def test_motes_experts() -> None:
    _, arrays = golden("expert_scores")
    found = heads.expert_scores(arrays["counts"], arrays["classes"] == 1)
    assert near(found, arrays["score"], 1e-12)
    assert heads.best(found, 10) == [tuple(each) for each in arrays["top10"].tolist()]


def test_a_function_vector_is_what_its_heads_write(llama: LocalModel) -> None:
    said, arrays = golden("function_vector")
    mean = torch.tensor(arrays["mean_activations"][:, :, -1])  # (layers, heads, head_dim), the last token's slot
    top = heads.best(arrays["indirect_effect"].mean(0), said["n_top_heads"])
    assert top == [tuple(each) for each in arrays["top_heads"].tolist()]
    total = torch.zeros(128, dtype=torch.float64)
    for layer, head in top:
        alone = torch.zeros(4, 32)
        alone[head] = mean[layer, head]
        total += llama.projected(layer, alone).double()
    assert near(total, arrays["function_vector"])
