"""Three methods read a prefix_classifier; models run in other types than their heads."""

import pytest
import torch

from whipstaff.decoding.methods.best_of import BestOf, BestOfParams
from whipstaff.decoding.prefix_classifier import classes
from whipstaff.decoding.rows import Rows


@pytest.mark.parametrize("has_bias", [True, False])
def test_classes_are_a_line(has_bias: bool) -> None:
    head = {"weight": torch.tensor([[1.0, 0.0], [0.0, 2.0]])} | (
        {"bias": torch.tensor([0.5, -0.5])} if has_bias else {}
    )
    found = classes(torch.tensor([[3.0, 4.0]]), head)
    assert found.tolist() == [[3.5, 7.5] if has_bias else [3.0, 8.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_candidates_are_judged_in_the_models_own_type(dtype: torch.dtype) -> None:
    hidden, weight = torch.tensor([[0.5, -1.0], [2.0, 0.25]]), torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    params = BestOfParams(classifier="it")
    rows = Rows(torch.zeros(2, 5), [1, 1], [0, 0], hidden=hidden.to(dtype), heads={"classifier": {"weight": weight}})
    assert BestOf().rewrite(rows, [params, params]) is rows.logits
    torch.testing.assert_close(rows.facts["best_of"], (hidden @ weight.T).log_softmax(1)[:, 1])
