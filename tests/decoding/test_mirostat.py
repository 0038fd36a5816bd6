"""Mirostat 2 against a float64 run, and a plain one over several tokens."""

import pytest
import torch
from decodings import golden, random_batch, run
from reference import mirostat as reference

from whipstaff.decoding.methods.mirostat import Mirostat, MirostatParams
from whipstaff.decoding.rows import Rows

SAID, TENSORS = golden("temperature_family")
CASE = SAID["cases"][-1]
METHOD = Mirostat()


def test_the_run_is_the_golden_one() -> None:
    params, state = MirostatParams(tau=CASE["tau"], eta=CASE["eta"]), torch.full((1, 1), torch.nan)
    first, end = CASE["rows"]
    for row, step, uniform in zip(TENSORS["logits"][first:end], CASE["steps"], CASE["uniforms"], strict=True):
        rows = Rows(row.float()[None], [1], [0], state=state)
        rows.logits = METHOD.rewrite(rows, [params])
        assert float(state) == pytest.approx(step["mu_before"], abs=1e-4)
        assert int((rows.logits > -torch.inf).sum()) == step["kept"]
        best_first, order = rows.logits[0].softmax(0).sort(descending=True)
        assert step["token"] == int(order[int((best_first.cumsum(0) <= uniform).sum())])
        METHOD.note(rows, [params], torch.tensor([step["token"]]))
        assert float(state) == pytest.approx(step["mu_after"], abs=1e-4)
        assert 10 * (step["mu_before"] - float(state)) + 3 == pytest.approx(step["observed_surprise"], abs=1e-2)


def test_a_plain_run() -> None:
    kinds = [MirostatParams(tau=tau, eta=eta) for tau, eta in ((0.5, 0.1), (1.5, 1.0), (5.0, 0.0))]
    mus, state = [2 * params.tau for params in kinds], torch.full((3, 1), torch.nan)
    for seed in range(6):
        batch = random_batch(METHOD, kinds, seed)
        before, batch.rows.state = batch.rows.logits.tolist(), state
        batch.rows.logits = run(METHOD, batch)
        expected = [reference.rewrite(row, mu) for row, mu in zip(before, mus, strict=True)]
        assert torch.equal(batch.rows.logits, torch.tensor(expected))
        drawn = batch.rows.logits.softmax(1).multinomial(1, generator=torch.Generator().manual_seed(seed))[:, 0]
        METHOD.note(batch.rows, kinds, drawn)
        for r, (params, token) in enumerate(zip(kinds, drawn.tolist(), strict=True)):
            mus[r] = reference.learnt(expected[r], token, mus[r], params.tau, params.eta)
        assert state[:, 0].tolist() == pytest.approx(mus, abs=1e-4)


def test_mode_0_truncates_nothing() -> None:
    batch = random_batch(METHOD, [MirostatParams(mode=0, tau=0.01)] * 3)
    before = batch.rows.logits.clone()
    assert torch.equal(run(METHOD, batch), before)
