"""An ensemble of experts against a float64 computation, in both forms in which the base may enter."""

import torch
from decodings import golden, random_batch, run
from reference import adapter_free_ensemble as reference
from torch import Tensor

from whipstaff.decoding.methods.adapter_free_ensemble import AdapterFreeEnsemble, AdapterFreeEnsembleParams
from whipstaff.decoding.mix import MixedRow, mix_rows

_, TENSORS = golden("adapter_ensemble")
METHOD = AdapterFreeEnsemble()


def mixed(base_weight: float) -> Tensor:
    base, *experts = TENSORS["logits_base_then_experts"].float()
    names = [f"expert{c}" for c in range(len(experts))]
    rows = []
    for row, weight in enumerate(TENSORS["weight"].tolist()):
        params = AdapterFreeEnsembleParams(weights=dict(zip(names, weight, strict=True)), base_weight=base_weight)
        rows.append(MixedRow(row, METHOD.mix(params), [row]))
    return mix_rows(base, dict(zip(names, experts, strict=True)), rows)


def test_mixes_are_the_golden_ones() -> None:
    for base_weight, name in ((0.5, "mean_of_base_and_experts"), (0.0, "experts_only")):
        torch.testing.assert_close(mixed(base_weight), TENSORS[name].float(), atol=1e-4, rtol=0)


def test_the_sum_is_the_mean_at_half_the_temperature() -> None:
    torch.testing.assert_close(mixed(0.5) / 0.5, TENSORS["base_plus_experts"].float(), atol=1e-4, rtol=0)


def test_weights_are_divided_by_their_sum() -> None:
    params = AdapterFreeEnsembleParams(weights={"first": 2.0, "second": 6.0}, base_weight=0.25)
    batch = random_batch(METHOD, [params] * 3)
    rows = zip(batch.rows.logits.tolist(), *(stream.tolist() for stream in batch.rows.streams.values()), strict=True)
    expected = [reference.rewrite(base, experts, [2.0, 6.0], 0.25) for base, *experts in rows]
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected))
