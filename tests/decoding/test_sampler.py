"""Our temperature and truncation against transformers, the goldens and a plain computation."""

import pytest
import torch
from decodings import golden
from reference import draw as reference
from torch import Tensor
from transformers.generation.logits_process import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from whipstaff.decoding.sampler import apply_temperature, apply_top_k_top_p_min_p

SAID, TENSORS = golden("temperature_family")


def rows(num: int = 24, vocab: int = 50) -> Tensor:
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(num, vocab, generator=random)
    return logits.masked_fill(torch.rand(num, vocab, generator=random) < 0.1, -torch.inf)


def test_all_three_in_vllms_order() -> None:
    logits = rows()
    top_k = torch.tensor([0, 1, 5, 50] * 6)
    top_p = torch.tensor([1.0, 0.9, 0.3, 1e-6, 1.0, 0.5] * 4)
    min_p = torch.tensor([0.0, 0.05, 0.5] * 8)
    own = zip(logits.tolist(), top_k.tolist(), top_p.tolist(), min_p.tolist(), strict=True)
    expected = torch.tensor([reference.truncate(*one) for one in own])
    assert torch.equal(apply_top_k_top_p_min_p(logits.clone(), top_k, top_p, min_p), expected)


def test_transformers_one_at_a_time() -> None:
    logits, ids = rows(), torch.zeros(24, 1)
    for value in (0.05, 0.5, 0.95):
        full = torch.full((24,), value)
        assert torch.equal(apply_top_k_top_p_min_p(logits.clone(), min_p=full), MinPLogitsWarper(value)(ids, logits))
        assert torch.equal(apply_top_k_top_p_min_p(logits.clone(), top_p=full), TopPLogitsWarper(value)(ids, logits))
    assert torch.equal(apply_top_k_top_p_min_p(logits.clone(), torch.full((24,), 7)), TopKLogitsWarper(7)(ids, logits))


@pytest.mark.parametrize("case", [c for c in SAID["cases"] if "min_p" in c["id"]], ids=lambda case: case["id"])
def test_min_p_is_the_golden_one(case: dict) -> None:  # type: ignore[type-arg]
    result = apply_top_k_top_p_min_p(TENSORS["logits"].float(), min_p=torch.full((13,), case["p"]))
    assert torch.equal(result > -torch.inf, TENSORS[case["id"]])


def test_off_changes_nothing() -> None:
    logits = rows()
    logits[:, 3] = -200.0  # has no probability in float32
    off = (torch.zeros(24, dtype=torch.int64), torch.ones(24), torch.zeros(24))
    assert torch.equal(apply_top_k_top_p_min_p(logits.clone(), *off), logits)
    assert torch.equal(apply_top_k_top_p_min_p(logits.clone()), logits)
    assert torch.equal(apply_temperature(logits.clone(), torch.ones(24)), logits)


def test_rows_do_not_see_each_other() -> None:
    logits, top_k, top_p, min_p = (
        rows(4),
        torch.tensor([0, 3, 0, 9]),
        torch.tensor([1.0, 0.5, 0.8, 1.0]),
        torch.zeros(4),
    )
    together = apply_top_k_top_p_min_p(logits.clone(), top_k, top_p, min_p)
    for r in range(4):
        alone = apply_top_k_top_p_min_p(logits[[r]].clone(), top_k[[r]], top_p[[r]], min_p[[r]])
        assert torch.equal(together[r], alone[0])


def test_temperatures() -> None:
    logits = rows(4)
    result = apply_temperature(logits.clone(), torch.tensor([0.5, 0.0, 1e-6, 3.0]))
    assert torch.equal(result[[0, 3]], logits[[0, 3]] / torch.tensor([[0.5], [3.0]]))
    for r in (1, 2):
        assert (result[r] > -torch.inf).nonzero().flatten().tolist() == [int(logits[r].argmax())]
