"""Context-aware decoding against the authors' decode loop."""

from typing import Any

import pytest
import torch
from decodings import StubSource, golden
from torch import Tensor

from whipstaff.decoding.methods.cad import Cad, CadParams
from whipstaff.decoding.mix import MixedRow, mix_rows

GOLDEN, TENSORS = golden("context_aware_decoding")
METHOD = Cad()
CASES = [case for case in GOLDEN["cases"] if "filter_p" in case]
OUT = 1000.0  # the authors' score of a token that a nucleus excludes, instead of infinity


def mixed(params: CadParams, aware: Tensor, prior: Tensor) -> Tensor:
    num, mix = len(aware), METHOD.mix(params)
    return mix_rows(torch.cat([aware, prior]), {}, [MixedRow(r, mix, (r, num + r)) for r in range(num)])[:num]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["id"])
def test_scores_are_those_of_the_authors(case: dict[str, Any]) -> None:
    aware, prior, score = (TENSORS[f"{case['id']}.{name}"] for name in ("context_logits", "prior_logits", "score"))
    nuclei = {"top_p": case["filter_p"], "top_p_without": case["filter_p_prior"]}
    scores = mixed(CadParams(alpha=case["alpha"], context="any", **nuclei), aware, prior)
    kept = score > -0.4 * OUT
    assert torch.equal(scores > -torch.inf, kept)
    torch.testing.assert_close(scores[kept], score[kept], atol=1e-4, rtol=1e-5)
    assert scores.argmax(1).tolist() == case["output"]


def test_nuclei_without_a_common_token_choose_as_the_authors_scores_do() -> None:
    chance = torch.Generator().manual_seed(4)
    aware, prior = 4 * torch.randn(2, 200, 12, generator=chance)
    params = CadParams(alpha=0.5, context="any", top_p=0.4, top_p_without=0.3)
    insides = []
    for row, p in ((aware, 0.4), (prior, 0.3)):
        best_first, order = row.softmax(1).sort(dim=1, descending=True)
        insides.append(torch.zeros_like(row).bool().scatter(1, order, best_first.cumsum(1) - best_first <= p))
    score = 1.5 * torch.where(insides[0], aware, -OUT) - 0.5 * torch.where(insides[1], prior, OUT)
    assert 10 < (insides[0] & insides[1]).any(1).sum() < 190
    assert torch.equal(mixed(params, aware, prior).argmax(1), score.argmax(1))


def test_a_nucleus_of_the_prompt_alone() -> None:
    """alpha 0 leaves the other prompt out, with its nucleus."""
    params = CadParams(alpha=0.0, context="any", top_p=0.5, top_p_without=0.1)
    assert METHOD.mix(params).num_companions == 0
    row = torch.tensor([[3.0, 2.99, 0.0, -1.0]])
    assert mixed(params, row, -row).tolist() == [[3.0, pytest.approx(2.99), -torch.inf, -torch.inf]]


@pytest.mark.parametrize("p", [0.0, 0.5, 0.9, 1.0])
def test_a_nucleus_keeps_what_the_authors_filter_keeps(p: float) -> None:
    logits = TENSORS["nucleus.logits"].float()
    scores = mixed(CadParams(alpha=0.0, context="any", top_p=max(p, 1e-9)), logits, logits)
    assert torch.equal(scores > -torch.inf, TENSORS[f"nucleus.keep_p{p}"])


def test_the_context_is_taken_out_or_the_prompt_without_it_given() -> None:
    source = StubSource("abcde")
    for own in ({"context": "bc"}, {"prompt_without": "ade"}, {"prompt_without": [0, 3, 4]}):
        (other,) = METHOD.companions(CadParams(**own), source, ())
        assert other.prompt == [0, 3, 4] and other.param in own
    assert METHOD.companions(CadParams(alpha=0.0, context="bc"), source, ()) == ()
