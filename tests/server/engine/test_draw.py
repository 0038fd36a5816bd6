"""Our temperature and truncation are what vLLM's sampler does, function by function."""

from types import SimpleNamespace

import torch
from torch import Tensor
from vllm.v1.sample.logits_processor.builtin import MinPLogitsProcessor
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p_pytorch
from vllm.v1.sample.sampler import Sampler

from whipstaff.decoding.sampler import apply_temperature, apply_top_k_top_p_min_p

ROWS, VOCAB = 24, 50


def rows() -> Tensor:
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, VOCAB, generator=random)
    return logits.masked_fill(torch.rand(ROWS, VOCAB, generator=random) < 0.1, -torch.inf)


def test_top_k_and_top_p() -> None:
    top_k = torch.tensor([VOCAB, 1, 5, 20] * 6)
    top_p = torch.tensor([0.99, 0.9, 0.3, 1e-6, 0.7, 0.5] * 4)
    for k, p in ((top_k, top_p), (top_k, None), (None, top_p)):
        assert torch.equal(apply_top_k_top_p_min_p(rows(), k, p), apply_top_k_top_p_pytorch(rows(), k, p))


def test_min_p() -> None:
    min_p = torch.tensor([0.0, 0.05, 0.5] * 8)
    config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_seqs=ROWS))
    theirs = MinPLogitsProcessor(config, torch.device("cpu"), False)
    theirs.min_p, theirs.min_p_count = min_p[:, None], 1
    assert torch.equal(apply_top_k_top_p_min_p(rows(), min_p=min_p), theirs.apply(rows()))


def test_temperature() -> None:
    temperature = torch.tensor([0.3, 1.0, 2.5] * 8)
    assert torch.equal(apply_temperature(rows(), temperature), Sampler.apply_temperature(rows(), temperature, True))


def test_greedy_rows_are_those_below_vllms_limit() -> None:
    temperature = torch.tensor([0.0, 9e-6, 1.1e-5] * 8)
    greedy = torch.isneginf(apply_temperature(rows(), temperature)).sum(1) == VOCAB - 1
    assert greedy.tolist() == (temperature < 1e-5).tolist()
