"""Context-aware decoding against the authors' decode loop."""

from typing import Any

import pytest
import torch
from decodings import StubSource, golden

from whipstaff.decoding.methods.cad import Cad, CadParams
from whipstaff.decoding.mix import MixedRow, mix_rows

GOLDEN, TENSORS = golden("context_aware_decoding")
METHOD = Cad()
UNFILTERED = [case for case in GOLDEN["cases"] if case.get("filter_p") == case.get("filter_p_prior") == 1.0]


@pytest.mark.parametrize("case", UNFILTERED, ids=lambda case: case["id"])
def test_scores_are_those_of_the_authors(case: dict[str, Any]) -> None:
    """Their filter drops, at p = 1 too, the tail beyond where a float sum reaches 1; it changes no other token."""
    aware, prior, score = (TENSORS[f"{case['id']}.{name}"] for name in ("context_logits", "prior_logits", "score"))
    num, mix = len(aware), METHOD.mix(CadParams(alpha=case["alpha"], context="any"))
    scores = mix_rows(torch.cat([aware, prior]), {}, [MixedRow(r, mix, (r, num + r)) for r in range(num)])[:num]
    kept = score > -400
    assert kept.float().mean() > 0.9
    torch.testing.assert_close(scores[kept], score[kept], atol=1e-4, rtol=1e-5)
    assert scores.argmax(1).tolist() == case["output"]


def test_the_context_is_taken_out_or_the_prompt_without_it_given() -> None:
    source = StubSource("abcde")
    for own in ({"context": "bc"}, {"prompt_without": "ade"}, {"prompt_without": [0, 3, 4]}):
        (other,) = METHOD.companions(CadParams(**own), source, ())
        assert other.prompt == [0, 3, 4] and other.param in own
    assert METHOD.companions(CadParams(alpha=0.0, context="bc"), source, ()) == ()
