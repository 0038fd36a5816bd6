"""Ensembles of adapters against a plain computation of both of the forms that the paper may mean."""

import pytest
import torch
from decodings import StubSource, golden

from whipstaff.decoding.methods.adapter_ensemble import AdapterEnsemble, AdapterEnsembleParams
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
