"""Contrastive decoding against the authors' sampling, another release's greedy loop and a plain computation."""

from typing import Any

import pytest
import torch
from decodings import golden, random_batch, run
from reference import contrastive as reference
from torch import Tensor

from whipstaff.decoding.methods.contrastive import Contrastive, ContrastiveParams
from whipstaff.decoding.mix import MixedRow, mix_rows

OFFICIAL, OFFICIAL_TENSORS = golden("contrastive_decoding_official")
VOIDISM, VOIDISM_TENSORS = golden("contrastive_decoding_voidism")
METHOD = Contrastive()


def mixed(expert: Tensor, amateur: Tensor, **own: Any) -> Tensor:
    mix = METHOD.mix(ContrastiveParams(amateur="first", **own))
    return mix_rows(expert, {"first": amateur}, [MixedRow(row, mix, [row]) for row in range(len(expert))])


def official(case: dict[str, Any], alpha: float) -> tuple[Tensor, dict[str, Tensor]]:
    tensors = {
        name: OFFICIAL_TENSORS[f"{case['id']}.{name}"].flatten(0, -2).clone()
        for name in ("expert", "amateur", "probs")
        if f"{case['id']}.{name}" in OFFICIAL_TENSORS
    }
    tensors["expert"][:, 1] = -torch.inf  # the end of the text is banned below the minimum length
    own = {"beta": case["st_coef"], "amateur_temperature": case["student_temperature"], "alpha": alpha}
    return mixed(tensors["expert"], tensors["amateur"], **own), tensors


def of_mode(mode: str) -> Any:
    cases = [case for case in OFFICIAL["cases"] if case["mode"] == mode]
    return pytest.mark.parametrize("case", cases, ids=lambda case: case["id"])


@of_mode("sample")
def test_probabilities_are_those_of_the_official_sampling(case: dict[str, Any]) -> None:
    scores, tensors = official(case, case["relative_top"])
    torch.testing.assert_close(scores.softmax(1), tensors["probs"], atol=1e-5, rtol=0)
    assert torch.equal(torch.isneginf(scores), tensors["probs"] == 0)


@of_mode("greedy")
def test_the_official_greedy_mode_is_ours_without_a_mask(case: dict[str, Any]) -> None:
    assert official(case, alpha=0.0)[0].argmax(1).tolist() == case["output"]


@of_mode("beam")
def test_our_scores_make_the_official_beam_search_say_what_was_recorded(case: dict[str, Any]) -> None:
    """There the amateur's log-softmax is divided by its temperature and not normalised again, so that scores differ
    from ours by a number per beam, which is given back here. Of all beams the best 2 K tokens by the expert alone go
    on to be compared by scores (in the first step, when one beam is alive, by both)."""
    streams = [OFFICIAL_TENSORS[f"{case['id']}.{name}"] for name in ("expert", "amateur")]
    num_beams, vocab = streams[0].shape[1:]
    total = torch.tensor([0.0] + [-1e9] * (num_beams - 1))
    texts: list[list[int]] = [[] for _ in range(num_beams)]
    for step, (expert, amateur) in enumerate(zip(*streams, strict=True)):
        scores, plausible = beams(case, expert, amateur)
        candidates = (plausible + total[:, None] if step == 0 else plausible).flatten().topk(2 * num_beams).indices
        sums = (scores + total[:, None]).flatten()[candidates]
        total, order = sums.topk(num_beams)
        texts = [[*texts[place // vocab], place % vocab] for place in candidates[order].tolist()]
    assert texts[0] == case["output"]


def beams(case: dict[str, Any], expert: Tensor, amateur: Tensor) -> tuple[Tensor, Tensor]:
    """(K, V) the official scores by way of ours, and (K, V) the expert's log-probabilities where ours are finite."""
    beta, temperature = case["st_coef"], case["student_temperature"]
    expert = expert.index_fill(1, torch.tensor([1]), -torch.inf)
    scores = mixed(expert.clone(), amateur, beta=beta, amateur_temperature=temperature, alpha=case["relative_top"])
    gap = beta * ((amateur / temperature).logsumexp(1) - amateur.logsumexp(1) / temperature)
    return scores - gap[:, None], expert.log_softmax(1).masked_fill(torch.isneginf(scores), -torch.inf)


@pytest.mark.parametrize("case", VOIDISM["cases"], ids=lambda case: case["id"])
def test_scores_are_those_of_the_other_release(case: dict[str, Any]) -> None:
    expert, amateur, scores = (VOIDISM_TENSORS[f"{case['id']}.{name}"] for name in ("expert", "amateur", "scores"))
    result = mixed(expert, amateur, alpha=case["relative_top"])
    assert torch.equal(torch.isneginf(result), torch.isneginf(scores))
    torch.testing.assert_close(result, scores, atol=1e-4, rtol=0)
    assert result.argmax(1).tolist() == case["output"]


@pytest.mark.parametrize("own", [(0.1, 1.0, 1.0), (0.0, 0.5, 0.5), (0.5, 0.0, 2.0)])
def test_a_plain_computation(own: tuple[float, float, float]) -> None:
    alpha, beta, temperature = own
    params = ContrastiveParams(amateur="first", alpha=alpha, beta=beta, amateur_temperature=temperature)
    batch = random_batch(METHOD, [params] * 5)
    pairs = zip(batch.rows.logits.tolist(), batch.rows.streams["first"].tolist(), strict=True)
    expected = torch.tensor([reference.rewrite(*pair, *own) for pair in pairs])
    torch.testing.assert_close(run(METHOD, batch), expected, atol=1e-4, rtol=1e-5)
