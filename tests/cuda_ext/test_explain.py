"""apply_temperature_, explain_rows and divergences: rows of logits as distributions."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from whipstaff import cuda_ext
from whipstaff.cuda_ext import reference

from .batches import DTYPES, PROPERTY, strided
from .tolerances import TOLERANCE

pytestmark = pytest.mark.usefixtures("library")

INF = float("inf")


@PROPERTY
@given(st.data())
def test_any_temperature_matches_the_reference(data: st.DataObject) -> None:
    num_rows, vocab = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 1200))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    logits = strided(num_rows, vocab, data.draw(st.sampled_from(DTYPES)))
    chosen = data.draw(st.lists(st.sampled_from([-1.0, 0.0, 0.3, 1.0, 2.5]), min_size=num_rows, max_size=num_rows + 2))
    want, got = logits.clone(), logits.clone()
    reference.apply_temperature_(want, torch.tensor(chosen))
    cuda_ext.apply_temperature_(got, torch.tensor(chosen))
    assert torch.equal(got, want)


def test_temperature_zero_keeps_the_first_best_token() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, -INF, 1.0], [1.0, 2.0, 3.0]])
    cuda_ext.apply_temperature_(logits, torch.tensor([0.0, 0.0, -1.0]))
    assert logits.tolist() == [[-INF, 3.0, -INF], [2.0, -INF, -INF], [1.0, 2.0, 3.0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_temperature_one_changes_nothing(dtype: torch.dtype) -> None:
    logits = strided(3, 777, dtype)
    before = logits.clone()
    cuda_ext.apply_temperature_(logits, torch.ones(5))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 64, 1111, 32000])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_an_explanation_matches_the_reference(num_rows: int, vocab: int, dtype: torch.dtype) -> None:
    final, base = strided(num_rows, vocab, dtype) * 3, strided(num_rows, vocab + 5, dtype) * 3
    want = reference.explain_rows(final.double(), base.double())
    for value, wanted in zip(cuda_ext.explain_rows(final, base), want, strict=True):
        torch.testing.assert_close(value, wanted, **TOLERANCE[torch.float32])


def test_hand_worked() -> None:
    final, base = torch.tensor([[0.5, 0.5, 0.0]]).log(), torch.tensor([[0.25, 0.25, 0.5]]).log()
    entropy, divergence = cuda_ext.explain_rows(final, base)
    assert entropy.item() == pytest.approx(math.log(2))
    assert divergence.item() == pytest.approx(math.log(2))


def test_a_token_the_base_bans_makes_the_divergence_infinite() -> None:
    assert cuda_ext.explain_rows(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -INF]])).divergence.item() == INF


def test_a_row_explains_itself_as_unchanged() -> None:
    logits = torch.randn(4, 500)
    assert cuda_ext.explain_rows(logits, logits).divergence.tolist() == [0.0] * 4


def test_without_base_only_the_entropy_is_told() -> None:
    explanation = cuda_ext.explain_rows(torch.zeros(2, 8))
    assert explanation.entropy.tolist() == pytest.approx([math.log(8)] * 2)
    assert explanation.divergence.tolist() == [0.0, 0.0]


@PROPERTY
@given(st.data())
def test_any_divergence_matches_the_reference(data: st.DataObject) -> None:
    num_rows, num_early, vocab = (data.draw(st.integers(low, high)) for low, high in ((1, 5), (0, 9), (1, 1200)))
    torch.manual_seed(data.draw(st.integers(0, 2**32)))
    scale, dtype = data.draw(st.sampled_from([0.0, 0.01, 3.0, 60.0])), data.draw(st.sampled_from(DTYPES))
    mature, early = strided(num_rows, vocab, dtype) * scale, strided(num_early, vocab + 3, dtype) * scale
    mature[torch.rand(mature.shape) < data.draw(st.sampled_from([0.0, 0.3]))] = -INF
    mature[:, 0] = 0
    owners = torch.randint(-1, num_rows + 1, (num_early + 1,))
    got = cuda_ext.divergences(mature, early, owners)
    want = reference.divergences(mature.double(), early.double(), owners[:num_early])
    torch.testing.assert_close(got, want, **TOLERANCE[torch.float32])


def test_hand_worked_divergences() -> None:
    mature = torch.tensor([[0.5, 0.5, 0.0], [0.25, 0.25, 0.5]]).log()
    early = torch.tensor([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5], [0.1, 0.2, 0.7]]).log()
    terms = [(0.5, 0.5), (0.375, 0.375**2 / 0.5 / 0.25)]  # m, and m^2 / (q p) where it is not 1
    expected = sum(m * math.log(ratio if m == 0.375 else 1) for m, ratio in terms) / 2
    assert cuda_ext.divergences(mature, early, torch.tensor([0, 1, 2])).tolist() == pytest.approx([expected, 0, 0])
    banned = cuda_ext.divergences(torch.zeros(1, 2), torch.tensor([[0.0, -INF]]), torch.tensor([0]))
    assert banned.tolist() == [INF]


FINAL = torch.zeros(2, 8)
REFUSED = {
    "final has 2 rows, base has 1": (FINAL, FINAL[1:]),
    "base has 7 columns, fewer than": (FINAL, FINAL[:, 1:]),
    "final must be float32, bfloat16 or float16, not Double": (FINAL.double(), None),
}


@pytest.mark.parametrize("message", REFUSED)
def test_a_refusal_names_the_tensor(message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.explain_rows(*REFUSED[message])


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("early has 7 columns, fewer than mature's", {"early": FINAL[:, 1:]}),
        ("owners must be Long, not Int", {"owners": torch.zeros(2, dtype=torch.int32)}),
        ("owners has 1 entries for 2 rows", {"owners": torch.zeros(1, dtype=torch.int64)}),
        ("mature must be float32, bfloat16 or float16, not Double", {"mature": FINAL.double()}),
    ],
)
def test_a_refusal_of_divergences_names_the_tensor(message: str, changes: dict[str, Any]) -> None:
    fine = {"mature": FINAL, "early": FINAL, "owners": torch.zeros(2, dtype=torch.int64)}
    with pytest.raises(RuntimeError, match=message):
        cuda_ext.divergences(**fine | changes)


def test_a_missing_temperature_is_refused() -> None:
    with pytest.raises(RuntimeError, match="temperature has 1 entries for 2 rows"):
        cuda_ext.apply_temperature_(FINAL.clone(), torch.ones(1))
