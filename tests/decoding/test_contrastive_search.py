"""Contrastive search against the paper's formula, row by row."""

import pytest
import torch
from decodings import random_batch, run
from reference import contrastive_search as reference
from torch import Tensor

from whipstaff.decoding.methods.contrastive_search import ContrastiveSearch, ContrastiveSearchParams

METHOD = ContrastiveSearch()


def test_a_plain_computation() -> None:
    """Of rows with different k and alpha, some of whose tokens are banned."""
    settings = [
        ContrastiveSearchParams(k=k, penalty_alpha=alpha)
        for k, alpha in ((1, 0.9), (4, 0.6), (8, 1.0), (3, 0.05), (256, 0.7), (5, 0.6))
    ]
    differing = 0
    for seed in range(5):
        batch = random_batch(METHOD, settings, seed)
        before, history, led_to = batch.rows.logits.clone(), batch.rows.history, batch.led_to
        assert history is not None and led_to is not None
        result = run(METHOD, batch)
        for row, params in enumerate(settings):

            def feed(token: int, own: Tensor = led_to[row]) -> list[float]:
                found: list[float] = own[token].tolist()
                return found

            wanted, scores = reference.choose(
                before[row].tolist(), history[row].tolist(), feed, params.k, params.penalty_alpha
            )
            kept = (result[row] > -torch.inf).nonzero().flatten().tolist()
            assert kept == [wanted], (seed, row, scores)
            assert result[row, wanted] == before[row, wanted]
            p = float(before[row].softmax(0)[wanted])
            likeness = ((1 - params.penalty_alpha) * p - scores[wanted]) / params.penalty_alpha
            assert float(batch.rows.facts["likeness"][row]) == pytest.approx(likeness, abs=1e-4)
            differing += wanted != int(before[row].argmax())
    assert differing > 5


def test_the_context_matters() -> None:
    batch = random_batch(METHOD, [ContrastiveSearchParams(k=6, penalty_alpha=0.9)] * 8)
    first = run(METHOD, batch.take(range(8))).argmax(1)
    assert batch.rows.history is not None
    batch.rows.history = [states[:1] for states in batch.rows.history]
    assert not torch.equal(run(METHOD, batch).argmax(1), first)
