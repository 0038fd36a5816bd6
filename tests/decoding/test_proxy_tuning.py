"""Proxy-tuning against the authors' own code, below the engine: the recorded logits of three models go in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from whipstaff.decoding.method import DecodingError
from whipstaff.decoding.methods.proxy_tuning import ProxyTuning, ProxyTuningParams
from whipstaff.decoding.mix import mix_rows

GOLDEN = Path(__file__).parents[1] / "golden" / "decoding"
CASES = {case["id"]: case for case in json.loads((GOLDEN / "proxy_tuning.json").read_text())["cases"]}
TENSORS = load_file(GOLDEN / "proxy_tuning.safetensors")
METHOD = ProxyTuning()


def mixed(case: dict[str, object]) -> torch.Tensor:
    params = ProxyTuningParams(expert="expert", antiexpert="antiexpert", alpha=case["alpha"])
    weights = METHOD.mix(params).weights
    base, expert, antiexpert = (TENSORS[f"{case['id']}.{name}"].float() for name in ("base", "expert", "antiexpert"))
    row = torch.tensor([weights["expert"], weights["antiexpert"]]).expand(len(base), 2)
    return mix_rows(base, [expert, antiexpert], row.contiguous())


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("warp", "reppen")])
def test_scores_are_those_of_the_official_class(name: str) -> None:
    torch.testing.assert_close(mixed(CASES[name]), TENSORS[f"{name}.dexperts"].float(), atol=1e-4, rtol=0)
    assert mixed(CASES[name]).argmax(-1).tolist() == CASES[name]["output"]


def test_alpha_zero_is_off_bit_for_bit() -> None:
    off = METHOD.mix(METHOD.off(["expert", "antiexpert"])).weights
    base, other = torch.randn(3, 50), torch.full((3, 50), torch.nan)
    assert torch.equal(mix_rows(base, [other, other], torch.tensor([list(off.values())] * 3)), base)


def test_rows_of_plain_requests_are_untouched_beside_others() -> None:
    base, other = torch.randn(4, 50), torch.randn(4, 50)
    result = mix_rows(base, [other], torch.tensor([[0.0], [2.0], [0.0], [-1.0]]))
    assert torch.equal(result[[0, 2]], base[[0, 2]])
    torch.testing.assert_close(result[[1, 3]], base[[1, 3]] + torch.tensor([[2.0], [-1.0]]) * other[[1, 3]])


def test_vocabularies_of_other_lengths() -> None:
    """A longer stream is cut; what a shorter one lacks is padding and keeps the base's value; bans stay bans."""
    base = torch.randn(2, 10)
    base[:, 3] = -torch.inf
    longer, shorter = torch.randn(2, 14), torch.randn(2, 8)
    result = mix_rows(base, [longer, shorter], torch.tensor([[1.0, -1.0]] * 2))
    torch.testing.assert_close(result[:, :8], base[:, :8] + longer[:, :8] - shorter)
    assert torch.equal(result[:, 8:], base[:, 8:])
    assert torch.isneginf(result[:, 3]).all()


def test_a_model_against_itself_is_refused() -> None:
    with pytest.raises(DecodingError, match="same model") as caught:
        METHOD.mix(ProxyTuningParams(expert="a", antiexpert="a"))
    assert caught.value.param == "antiexpert"


def test_a_batch_may_need_more_models_than_one_pass_takes() -> None:
    """Twenty auxiliary models at once: some rows use many of them, some one, some none."""
    base, others = torch.randn(3, 40), [torch.randn(3, 40) for _ in range(20)]
    weights = torch.randn(3, 20)
    weights[1] = 0.0
    weights[2, :19] = 0.0
    expected = base + sum(weights[:, [k]] * other for k, other in enumerate(others))
    result = mix_rows(base, others, weights)
    torch.testing.assert_close(result, expected)
    assert torch.equal(result[1], base[1])
