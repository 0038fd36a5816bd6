"""Best of several: what ranks an answer, and that logits stay as they are."""

import pytest
import torch
from decodings import HIDDEN, random_batch
from pydantic import ValidationError

from whipstaff.decoding.method import Candidate
from whipstaff.decoding.methods.best_of import BestOf, BestOfParams

METHOD = BestOf()


def test_a_likelihood_is_divided_by_a_power_of_the_length() -> None:
    answer = Candidate(4, -6.0, [])
    for penalty, wanted in ((1.0, -1.5), (0.0, -6.0), (0.5, -3.0), (-1.0, -24.0)):
        assert METHOD.score(BestOfParams(length_penalty=penalty), answer) == pytest.approx(wanted)


def test_another_models_likelihood() -> None:
    said = [{"streams": {"judge": {"logprob": by}, "other": {"logprob": -9.0}}} for by in (-1.0, -0.5, -3.0)]
    assert METHOD.score(BestOfParams(model="judge"), Candidate(3, -6.0, said)) == pytest.approx(-1.5)


def test_a_classifier_says_what_it_makes_of_each_row() -> None:
    batch = random_batch(METHOD, [BestOfParams(classifier="head")] * 3)
    before, head = batch.rows.logits.clone(), batch.rows.heads["classifier"]
    assert METHOD.rewrite(batch.rows, batch.settings) is batch.rows.logits and torch.equal(batch.rows.logits, before)
    assert batch.rows.hidden is not None and batch.rows.hidden.shape == (3, HIDDEN)
    for row in range(3):
        classes = head["weight"].double() @ batch.rows.hidden[row].double() + head["bias"].double()
        assert batch.rows.facts["best_of"][row] == pytest.approx(float(classes.log_softmax(0)[1]), abs=1e-5)
    del batch.rows.heads["classifier"], batch.rows.facts["best_of"]
    METHOD.rewrite(batch.rows, batch.settings)
    assert batch.rows.facts == {}


def test_a_classifier_judges_by_the_last_row() -> None:
    said = [{"facts": {"best_of": by}} for by in (-0.1, -2.0)]
    assert METHOD.score(BestOfParams(classifier="head"), Candidate(2, -6.0, said)) == -2.0


def test_one_of_them_ranks() -> None:
    with pytest.raises(ValidationError, match="name one of them"):
        BestOfParams(model="a", classifier="b")
