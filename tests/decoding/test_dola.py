"""DoLa against the authors' own code, on the logits that it recorded, and against a plain computation."""

from typing import Any

import pytest
import torch
from decodings import golden, random_batch, run
from reference import dola as reference

from whipstaff.cuda_ext import divergences
from whipstaff.decoding.layers import choose
from whipstaff.decoding.method import DecodingError, Depth
from whipstaff.decoding.methods.dola import Dola, DolaParams, candidates
from whipstaff.decoding.rows import Rows

SAID, TENSORS = golden("dola")
CASES = {case["id"]: case for case in SAID["cases"] if case["kind"].startswith("greedy")}
METHOD = Dola()


def rows_of(name: str) -> tuple[Rows, list[DolaParams]]:
    """Every step of a recorded generation as a row."""
    case, logits = CASES[name], TENSORS[f"{name}.layer_logits"]
    layers = case.get("candidate_layers", [case.get("premature_layer")])
    num = len(logits)
    rows = Rows(logits[:, -1].clone(), [len(case["prompt"])] * num, list(range(num)))
    rows.early_exit, rows.early_layers = logits[:, :-1].flatten(0, 1), [layers] * num
    return rows, [DolaParams(layers=layers, relative_top=case["relative_top"])] * num


@pytest.mark.parametrize("name", CASES)
def test_scores_and_layers_are_those_of_the_official_code(name: str) -> None:
    rows, params = rows_of(name)
    scores = METHOD.rewrite(rows, params)
    case, penalty = CASES[name], CASES[name].get("repetition_penalty", 1.0)
    expected = TENSORS[f"{name}.scores" if f"{name}.scores" in TENSORS else f"{name}.scores_after_processors"]
    for step in range(len(scores)):
        seen = torch.tensor([*case["prompt"], *case["output"][:step]])
        penalised = scores[step, seen]
        scores[step, seen] = torch.where(penalised > 0, penalised / penalty, penalised * penalty)
    assert torch.equal(scores == -torch.inf, expected == -torch.inf)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=0)
    assert scores.argmax(1).tolist() == case["output"]
    if "chosen_layers" in case:
        assert rows.facts["layer"].tolist() == case["chosen_layers"]


@pytest.mark.parametrize("name", [name for name in CASES if "chosen_layers" in CASES[name]])
def test_divergences_are_those_of_the_official_code(name: str) -> None:
    rows, _ = rows_of(name)
    assert rows.early_exit is not None
    expected = TENSORS[f"{name}.js_mean_over_vocab"] * rows.logits.shape[1]
    found = divergences(rows.logits, rows.early_exit, torch.arange(len(expected)).repeat_interleave(expected.shape[1]))
    torch.testing.assert_close(found.view_as(expected), expected, atol=1e-6, rtol=1e-5)


def test_a_plain_computation() -> None:
    """Rows with other candidates and other thresholds side by side, some tokens banned."""
    params = [DolaParams(layers=list(range(1 + r % 4)), relative_top=(0.0, 0.1, 0.5, 1.0)[r % 4]) for r in range(12)]
    batch = random_batch(METHOD, params)
    assert batch.rows.early_exit is not None
    early, expected, chosen = iter(batch.rows.early_exit.tolist()), [], []
    for row, one in zip(batch.rows.logits.tolist(), params, strict=True):
        layers = [next(early) for _ in range(len(one.layers))]
        chosen.append(reference.choice(row, layers))
        expected.append(reference.rewrite(row, layers[chosen[-1]], one.relative_top))
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert batch.rows.facts["layer"].tolist() == chosen


def test_scores_of_prompts() -> None:
    """Beside rows that are told as log-probabilities."""
    kinds = [(0.1, True, -1000.0), (0.5, False, -7.0), (0.0, True, -1.0), (0.3, None, -5.0)]
    params = [
        DolaParams(layers=[2], relative_top=top, post_softmax=post, relative_top_value=fill)
        for top, post, fill in kinds
    ]
    batch = random_batch(METHOD, params)
    batch.rows.is_prompt = True
    assert batch.rows.early_exit is not None
    pairs = zip(batch.rows.logits.tolist(), batch.rows.early_exit.tolist(), kinds, strict=True)
    expected = [
        reference.rewrite(mature, early, top) if post is None else reference.scored(mature, early, top, post, fill)
        for mature, early, (top, post, fill) in pairs
    ]
    torch.testing.assert_close(run(METHOD, batch), torch.tensor(expected), atol=1e-4, rtol=1e-5)
    assert [METHOD.tells_scores(one) for one in params] == [True, True, True, False]


def test_far_rows_diverge_by_a_finite_amount() -> None:
    """Probabilities that vanish in float32, in one row or in both."""
    mature, early = torch.tensor([[0.0, 400.0, -400.0]]), torch.tensor([[400.0, 0.0, -400.0], [0.0, 400.0, -400.0]])
    far, same = divergences(mature, early, torch.zeros(2, dtype=torch.int64)).tolist()
    assert far == pytest.approx(reference.divergence(mature[0].tolist(), early[0].tolist()))
    assert same == pytest.approx(0.0)


def test_the_first_of_equals_is_chosen() -> None:
    assert choose(torch.tensor([1.0, 2.0, 2.0, 5.0, 3.0, 3.0]), [3, 1, 2]).tolist() == [1, 3, 4]


def test_relative_top_1_is_greedy() -> None:
    batch = random_batch(METHOD, [DolaParams(layers=[0, 3], relative_top=1.0)] * 5)
    best = batch.rows.logits.argmax(1)
    result = run(METHOD, batch)
    assert torch.equal((result > -torch.inf).nonzero()[:, 1], best)


@pytest.mark.parametrize(
    ("half", "num_layers", "is_tied", "expected"),
    [
        ("low", 32, False, list(range(0, 16, 2))),
        ("high", 32, False, list(range(16, 32, 2))),
        ("low", 80, False, list(range(0, 20, 2))),
        ("high", 80, True, list(range(60, 80, 2))),
        ("low", 32, True, list(range(2, 16, 2))),
        ("low", 4, True, [2]),
        ("low", 2, True, [1]),
        ("low", 1, True, [0]),
        ("low", 1, False, [0]),
        ("high", 3, False, [1]),
    ],
)
def test_halves_are_hugging_faces(half: Any, num_layers: int, is_tied: bool, expected: list[int]) -> None:
    assert candidates(half, Depth(num_layers, is_tied)) == expected
    assert METHOD.early_layers(DolaParams(layers=half), Depth(num_layers, is_tied)) == expected


def test_layers_are_a_set_of_early_ones() -> None:
    assert METHOD.early_layers(DolaParams(layers=[6, 2, 6]), Depth(8)) == [2, 6]
    for params, depth, field in (
        (DolaParams(layers=[2, 8]), Depth(8), "layers"),
        (DolaParams(final_norm_on_candidates=True), Depth(8, has_norm=False), "final_norm_on_candidates"),
    ):
        with pytest.raises(DecodingError) as caught:
            METHOD.early_layers(params, depth)
        assert caught.value.param == field
