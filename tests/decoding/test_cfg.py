"""Classifier-free guidance against transformers: guided log-probabilities, and penalties after guidance."""

from typing import Any

import pytest
import torch
from decodings import StubSource, golden
from torch import Tensor

from whipstaff.decoding.methods.cad import Cad, CadParams
from whipstaff.decoding.methods.cfg import Cfg, CfgParams
from whipstaff.decoding.mix import Mix, MixedRow, mix_rows

GOLDEN, TENSORS = golden("classifier_free_guidance")
METHOD = Cfg()
each_case = pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["id"])


def mixed(mix: Mix, *rows: Tensor) -> Tensor:
    """(T, V) of one row of each per step: the request's own, then its further sequences'."""
    num = len(rows[0])
    return mix_rows(torch.cat(rows), {}, [MixedRow(r, mix, range(r, len(rows) * num, num)) for r in range(num)])[:num]


def penalised(scores: Tensor, case: dict[str, Any]) -> Tensor:
    """Transformers' repetition penalty, over the plain prompt and what was said."""
    result = scores.clone()
    for step in range(len(scores)):
        seen = torch.tensor(sorted({*case["prompt"], *case["output"][:step]}))
        old = scores[step, seen]
        result[step, seen] = torch.where(old < 0, old * case["repetition_penalty"], old / case["repetition_penalty"])
    return result


@each_case
def test_scores_are_those_of_transformers(case: dict[str, Any]) -> None:
    cond, uncond, after = (TENSORS[f"{case['id']}.{name}"] for name in ("cond", "uncond", "scores_after_processors"))
    mix = METHOD.mix(CfgParams(guidance_scale=case["guidance_scale"]))
    scores = penalised(mixed(mix, cond, uncond), case)
    torch.testing.assert_close(scores, after, atol=1e-4, rtol=1e-5)
    assert scores.argmax(1).tolist() == case["output"]


def test_it_is_context_aware_decoding_of_the_prompt_without_context() -> None:
    cond, uncond = 3 * torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    guided = mixed(METHOD.mix(CfgParams(guidance_scale=1.7)), cond, uncond)
    aware = mixed(Cad().mix(CadParams(alpha=0.7, context="any")), cond, uncond)
    torch.testing.assert_close(guided.softmax(1), aware.softmax(1))


def test_away_from_the_last_token_unless_another_prompt_is_given() -> None:
    source = StubSource("abc")
    for negative, prompt in ((None, [2]), ("b", [1]), ([7, 8], [7, 8])):
        (other,) = METHOD.companions(CfgParams(negative_prompt=negative), source, ())
        assert other.prompt == prompt
    assert METHOD.companions(CfgParams(guidance_scale=1.0), source, ()) == ()
