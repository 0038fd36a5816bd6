"""Proxy-tuning against the authors' own code, below the engine: the recorded logits of three models go in."""

from typing import Any

import pytest
import torch
from decodings import golden

from whipstaff.decoding.method import DecodingError
from whipstaff.decoding.methods.proxy_tuning import ProxyTuning, ProxyTuningParams
from whipstaff.decoding.mix import MixedRow, mix_rows
from whipstaff.decoding.sampler import apply_temperature, apply_top_k_top_p_min_p

SAID, TENSORS = golden("proxy_tuning")
CASES = {case["id"]: case for case in SAID["cases"]}
METHOD = ProxyTuning()


def mixed(case: dict[str, Any]) -> torch.Tensor:
    mix = METHOD.mix(ProxyTuningParams(expert="expert", antiexpert="antiexpert", alpha=case["alpha"]))
    base, expert, antiexpert = (TENSORS[f"{case['id']}.{name}"].float() for name in ("base", "expert", "antiexpert"))
    rows = [MixedRow(row, mix, [row]) for row in range(len(base))]
    return mix_rows(base, {"expert": expert, "antiexpert": antiexpert}, rows)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("warp", "reppen")])
def test_scores_are_those_of_the_official_class(name: str) -> None:
    torch.testing.assert_close(mixed(CASES[name]), TENSORS[f"{name}.dexperts"].float(), atol=1e-4, rtol=0)
    assert mixed(CASES[name]).argmax(-1).tolist() == CASES[name]["output"]


def test_temperature_and_top_p_come_after_the_mix() -> None:
    """What was recorded of `warp` is what its argmax saw."""
    case = CASES["warp"]
    scores = apply_top_k_top_p_min_p(
        apply_temperature(mixed(case), torch.full((8,), case["temperature"])), top_p=torch.full((8,), case["top_p"])
    )
    recorded = TENSORS["warp.dexperts"].float()
    assert torch.equal(torch.isneginf(scores), torch.isneginf(recorded))
    assert 0 < int(torch.isneginf(scores).sum()) < scores.numel() - len(scores)
    torch.testing.assert_close(scores, recorded, atol=1e-4, rtol=0)
    assert scores.argmax(-1).tolist() == case["output"]


def test_penalties_come_after_the_mix() -> None:
    """HF's rule, by hand, on the tokens so far."""
    case, scores = CASES["reppen"], mixed(CASES["reppen"])
    for step, row in enumerate(scores):
        seen = list({*case["prompt"], *case["output"][:step]})
        row[seen] = torch.where(row[seen] > 0, row[seen] / 1.2, row[seen] * 1.2)
    torch.testing.assert_close(scores, TENSORS["reppen.dexperts"].float(), atol=1e-4, rtol=0)
    assert scores.argmax(-1).tolist() == case["output"]


def test_a_model_against_itself_is_refused() -> None:
    with pytest.raises(DecodingError, match="same model") as caught:
        METHOD.mix(ProxyTuningParams(expert="a", antiexpert="a"))
    assert caught.value.param == "antiexpert"
