"""Ensembles of adapters against a plain computation of both of the forms that the paper may mean."""

from typing import Any

import numpy as np
import pytest
import torch
from decodings import StubSource, golden
from reference import nearness as reference

from whipstaff.decoding.method import DecodingError, HeadFile
from whipstaff.decoding.methods.adapter_ensemble import AdapterEnsemble, AdapterEnsembleParams, nearness
from whipstaff.decoding.mix import MixedRow, mix_rows

GOLDEN, TENSORS = golden("adapter_ensemble")
METHOD = AdapterEnsemble()
FORMS = {"mean_of_base_and_experts": (0.5, 1.0), "base_plus_experts": (0.5, 2.0), "experts_only": (0.0, 1.0)}


@pytest.mark.parametrize(("form", "base_weight", "times"), [(form, *how) for form, how in FORMS.items()])
def test_logits_are_those_of_the_plain_computation(form: str, base_weight: float, times: float) -> None:
    """Base plus experts is twice their mean: the same choice at half of the temperature."""
    logits, weights = TENSORS["logits_base_then_experts"], TENSORS["weight"]  # (1 + C, B, V) and (B, C)
    num_streams, num_queries, _ = logits.shape
    rows = []
    for query in range(num_queries):
        named = {f"expert{index}": weight for index, weight in enumerate(weights[query].tolist())}
        mix = METHOD.mix(AdapterEnsembleParams(weights=named, base_weight=base_weight))
        rows.append(MixedRow(query, mix, range(query, num_streams * num_queries, num_queries)))
    result = mix_rows(logits.flatten(0, 1).float(), {}, rows)[:num_queries]
    torch.testing.assert_close(times * result, TENSORS[form].float(), atol=1e-5, rtol=1e-5)


def test_each_adapter_reads_the_prompt() -> None:
    params, source = AdapterEnsembleParams(weights={"a": 1.0, "b": 0.0}), StubSource()
    made = METHOD.companions(params, source, ())
    assert [(one.prompt, one.adapter) for one in made] == [(source.ids, (n, f"weights.{n}")) for n in ("a", "b")]
    assert METHOD.companions(AdapterEnsembleParams(weights={"a": 1.0}, base_weight=1.0), source, ()) == []
    params = METHOD.with_heads(
        AdapterEnsembleParams(centres="c", feature=[1.0, 0.0], base_weight=0.0), {"centres": FILE}
    )
    made = METHOD.companions(params, source, ())
    assert [(one.prompt, one.adapter) for one in made] == [(source.ids, (n, "centres")) for n in ("a", "b", "c")]


def test_weights_are_those_of_the_plain_computation() -> None:
    features, centres = TENSORS["query_feature"], TENSORS["cluster_center"]
    for query, feature in enumerate(features):
        torch.testing.assert_close(nearness(feature, centres), TENSORS["weight"][query], rtol=1e-12, atol=1e-12)
        head = HeadFile({"centres": centres.float()}, {"adapters": list("abcd")})
        params = AdapterEnsembleParams(centres="c", feature=feature.tolist())
        found = METHOD.with_heads(params, {"centres": head})
        assert found.weights is not None and found.feature is None and list(found.weights) == list("abcd")
        torch.testing.assert_close(
            torch.tensor(list(found.weights.values())).double(), TENSORS["weight"][query], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("top_m", [None, 1, 3, 6])
def test_nearest_centres_against_numpy(top_m: int | None) -> None:
    random = np.random.default_rng(5)
    for exponent in (-300, 0, 300):  # the length of a feature says nothing, and overflows nowhere
        feature, centres = 10.0**exponent * random.normal(size=17), 1e-3 * random.normal(size=(6, 17))
        expected = reference.shares(feature / 10.0**exponent, centres, top_m)
        found = nearness(torch.tensor(feature), torch.tensor(centres), top_m).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)
        assert (found > 0).sum() == (top_m or 6)


def test_centres_that_are_equally_near_share_alike() -> None:
    centres = torch.tensor([[1.0, 2.0, -1.0]]) * torch.tensor([[1.0], [3.0], [0.7]])
    feature = torch.tensor([0.3, 0.1, 0.9], dtype=torch.float64)
    torch.testing.assert_close(nearness(feature, centres.double()), torch.full((3,), 1 / 3).double())
    assert nearness(feature, centres[:1].double()).tolist() == [1.0]
    assert nearness(feature, centres.double(), 2).tolist() == [0.5, 0.5, 0.0]


FILE = HeadFile({"centres": torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])}, {"adapters": ["a", "b", "c"]})
BAD: list[tuple[dict[str, Any], str]] = [
    ({"weights": {"a": 1.0}, "centres": "c", "feature": [1.0, 2.0]}, "centres"),
    ({"centres": "c"}, "feature"),
    ({"centres": "c", "feature": [1.0]}, "feature"),
    ({"centres": "c", "feature": [0.0, 0.0]}, "feature"),
    ({"centres": "c", "feature": [1.0, 2.0], "top_m": 4}, "top_m"),
    ({"weights": {"a": 1.0}, "feature": [1.0, 2.0]}, "feature"),
    ({"weights": {"a": 1.0}, "top_m": 1}, "top_m"),
    ({}, "weights"),
    ({"weights": {"a": 0.0}}, "weights"),
]


@pytest.mark.parametrize(("said", "field"), BAD)
def test_what_does_not_make_weights_is_named(said: dict[str, Any], field: str) -> None:
    params = AdapterEnsembleParams(**said)
    with pytest.raises(DecodingError) as caught:
        METHOD.mix(METHOD.with_heads(params, {"centres": FILE} if params.centres else {}))
    assert caught.value.param == field
