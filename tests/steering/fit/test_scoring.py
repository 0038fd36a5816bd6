"""Scores are what their definitions say, and a difference that is noise is called that."""

import math

import numpy as np
import pytest

from whipstaff.steering.fit.scoring import Likelihoods, difference, generated, least_kl, multiple_choice


def test_multiple_choice_by_hand() -> None:
    found = multiple_choice(Likelihoods((-4.0, -1.0, -2.0), (8, 1, 4), (0, 1), 0))
    assert found["mc1"] == 0 and found["acc"] == 1 and found["acc_norm"] == 1
    p = [math.exp(-4), math.exp(-1), math.exp(-2)]
    assert found["mc2"] == pytest.approx((p[0] + p[1]) / sum(p))
    long = multiple_choice(Likelihoods((-4000.0, -4001.0), (1, 1), (0,), 0))  # no 0 / 0
    assert long["mc2"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_generated_answers_by_hand() -> None:
    found = generated(" The Green door. ", "a green door", "gr..n")
    assert found["exact_match"] == found["f1"] == found["contains"] == 1 and found["match"] == 0
    found = generated("it is green", "green door")
    assert found["f1"] == pytest.approx(2 * 1 / 5) and found["contains"] == 0 and found["rep_3"] == 0
    assert generated("one two three one two three one two three", "x")["rep_3"] == pytest.approx(1 - 3 / 7)


def test_kl_is_never_more_than_it_is() -> None:
    draws = np.random.RandomState(0)
    for _ in range(20):
        p, q = (draws.dirichlet(np.ones(30)) for _ in range(2))
        whole = float((p * np.log(p / q)).sum())
        tops = [{str(i): math.log(side[i]) for i in np.argsort(-side)[:10]} for side in (p, q)]
        assert 0 <= least_kl(*tops) <= whole + 1e-9
        assert least_kl(*[{str(i): math.log(each) for i, each in enumerate(side)} for side in (p, q)]) == pytest.approx(
            whole
        )


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    draws, hits = np.random.RandomState(1), 0
    for trial in range(200):
        plain, other = draws.rand(60), draws.rand(60) + 0.2
        found = difference(plain.tolist(), other.tolist(), list(map(str, range(60))), trial, 400)
        hits += found.low <= 0.2 <= found.high
    assert 175 <= hits <= 200


def test_rows_of_one_group_are_one() -> None:
    plain, other = [0.0] * 40, [1.0, 0.0] * 20
    alone = difference(plain, other, list(map(str, range(40))))
    grouped = difference(plain, other, [str(index % 2) for index in range(40)])  # two groups: all of it, or nothing
    assert not alone.is_noise and grouped.is_noise
