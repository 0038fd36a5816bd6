"""Forced decoding: the answer is said token by token, and nothing is forced after it."""

import pytest
import torch
from decodings import StubVocabulary

from whipstaff.decoding.method import DecodingError
from whipstaff.decoding.methods.forced import Forced, ForcedParams
from whipstaff.decoding.rows import Rows

METHOD = Forced()


def test_each_row_says_its_own_answer_and_is_free_after_it() -> None:
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(0))
    logits[0, 9] = -torch.inf  # banned, and said all the same
    settings = [
        METHOD.resolve(ForcedParams(ids=[9]), StubVocabulary()),
        METHOD.resolve(ForcedParams(text="bd"), StubVocabulary()),
    ]
    rows = Rows(logits.clone(), [5, 5, 5], [0, 1, 2])
    result = METHOD.rewrite(rows, [*settings, settings[1]])
    assert (result > -torch.inf).sum(1).tolist() == [1, 1, 40]
    assert result.argmax(1)[:2].tolist() == [9, 3] and torch.equal(result[2], logits[2])


@pytest.mark.parametrize(
    ("own", "param"),
    [({}, "text"), ({"text": "a", "ids": [1]}, "text"), ({"ids": [3, 40]}, "ids"), ({"ids": [-1]}, "ids")],
)
def test_what_cannot_be_said_names_its_field(own: dict[str, object], param: str) -> None:
    with pytest.raises(DecodingError) as caught:
        METHOD.resolve(ForcedParams.model_validate(own), StubVocabulary())
    assert caught.value.param == param
