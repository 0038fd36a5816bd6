"""Proxy-tuning against the authors' own code, below the engine: the recorded logits of three models go in."""

from typing import Any

import pytest
import torch
from decodings import golden

from whipstaff.decoding.method import DecodingError
from whipstaff.decoding.methods.proxy_tuning import ProxyTuning, ProxyTuningParams
from whipstaff.decoding.mix import MixedRow, mix_rows

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


def test_a_model_against_itself_is_refused() -> None:
    with pytest.raises(DecodingError, match="same model") as caught:
        METHOD.mix(ProxyTuningParams(expert="a", antiexpert="a"))
    assert caught.value.param == "antiexpert"
