"""Weighted decoding against the authors' two steps, with a classifier for every token and with one that is asked once a
token is fed, and plain computations."""

from collections.abc import Callable

import pytest
import torch
from decodings import HIDDEN, golden, random_batch, run
from reference import kwd as reference
from torch import Tensor

from whipstaff.decoding.methods.kwd import Kwd, KwdParams
from whipstaff.decoding.rows import Rows

SAID, TENSORS = golden("kcts")
METHOD = Kwd()
STEPS = {case["id"]: case for case in SAID["cases"] if "step" in case["kind"]}


@pytest.mark.parametrize("name", [name for name in STEPS if name.endswith("v2")])
def test_tokens_are_those_of_the_official_step(name: str) -> None:
    case, name = STEPS[name], name.removesuffix("_v2")
    logits, class_logits = TENSORS[f"{name}.lm_logits"], TENSORS[f"{name}.v2_class_logits"]
    rows = Rows(logits.clone(), [1] * 3, [0] * 3, hidden=torch.eye(3))  # row r of the classifier's weight is g's row r
    rows.heads = {"classifier": {"weight": class_logits.T.contiguous()}}
    result = METHOD.rewrite(rows, [KwdParams(classifier="c", k=case["k"])] * 3)
    assert result.argmax(1).tolist() == case["chosen"]
    pairs = zip(logits.tolist(), class_logits.tolist(), strict=True)
    expected = torch.tensor([reference.rewrite(*pair, case["k"]) for pair in pairs])
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", [name for name in STEPS if not name.endswith("v2")])
def test_tokens_are_those_of_the_official_step_that_looks_ahead(name: str) -> None:
    case, logits, good = STEPS[name], TENSORS[f"{name}.lm_logits"], TENSORS[f"{name}.class_prob"]
    rows = Rows(logits.clone(), [1] * 3, [0] * 3, hidden=torch.zeros(3, 2))

    def ahead(tokens: Tensor) -> Tensor:
        f = good[torch.arange(3), tokens]
        return torch.stack([1 - f, f], 1).log()  # which an identity makes of f again

    rows.lookahead, rows.heads = ahead, {"classifier": {"weight": torch.eye(2)}}
    result = METHOD.rewrite(rows, [KwdParams(classifier="c", k=case["k"])] * 3)
    assert result.argmax(1).tolist() == case["chosen"]
    p = logits.softmax(1)
    kept = result > -torch.inf
    torch.testing.assert_close(result[kept].exp(), (p * good)[kept], atol=1e-5, rtol=1e-4)
    assert [row.nonzero().flatten().tolist() for row in kept] == [
        sorted(row.topk(case["k"]).indices.tolist()) for row in logits
    ]


def test_a_plain_computation() -> None:
    ks = [1, 3, 40, 256, 10]
    batch = random_batch(METHOD, [KwdParams(classifier="c", k=k) for k in ks])
    head, hidden = batch.rows.heads["classifier"], batch.rows.hidden
    assert hidden is not None
    g = (hidden @ head["weight"].T + head["bias"]).tolist()
    expected = [reference.rewrite(row, own, k) for row, own, k in zip(batch.rows.logits.tolist(), g, ks, strict=True)]
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
def test_a_plain_computation_that_looks_ahead(has_bias: bool) -> None:
    """Of rows with different k, some of whose tokens are banned."""
    ks, random = [1, 3, 40, 256, 10], torch.Generator().manual_seed(2)
    batch = random_batch(METHOD, [KwdParams(classifier="c", k=k) for k in ks])
    led_to = torch.randn(len(ks), batch.rows.logits.shape[1], HIDDEN, generator=random)  # of each row by each token
    head = {"weight": torch.randn(2, HIDDEN, generator=random), "bias": torch.tensor([0.7, -0.4])}
    if not has_bias:
        head = {"weight": head["weight"], "bias": torch.zeros(2)}
    batch.rows.heads = {"classifier": head if has_bias else {"weight": head["weight"]}}
    batch.rows.lookahead = lambda tokens: led_to[torch.arange(len(ks)), tokens]

    def judge(row: int) -> Callable[[int], float]:
        return lambda token: float((head["weight"] @ led_to[row, token] + head["bias"]).softmax(0)[1])

    before = batch.rows.logits.tolist()
    expected = [reference.rewrite_ahead(row, judge(r), k) for r, (row, k) in enumerate(zip(before, ks, strict=True))]
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    batch.rows.lookahead = None
    with pytest.raises(AssertionError):
        run(METHOD, batch)


def test_of_equal_tokens_the_first_are_judged() -> None:
    batch = random_batch(METHOD, [KwdParams(classifier="c", k=3), KwdParams(classifier="c", k=9)])
    batch.rows.logits[:] = 1.0
    batch.rows.logits[:, 5] = 2.0
    kept = (run(METHOD, batch) > -torch.inf).int()
    assert kept[0].nonzero().flatten().tolist() == [0, 1, 5]
    assert kept[1].nonzero().flatten().tolist() == list(range(9))
