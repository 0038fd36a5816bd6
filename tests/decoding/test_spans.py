"""Spans of a prompt: texts, messages and windows as positions, and the errors of those that are not there."""

from typing import Any

import pytest
from decodings import StubPrompt
from pydantic import TypeAdapter, ValidationError

from whipstaff.decoding.method import DecodingError
from whipstaff.decoding.spans import Span, span_at

SPAN: TypeAdapter[Any] = TypeAdapter(Span)


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        ("bcd", ((1, 4),)),
        ({"role": "user"}, ((2, 4),)),
        ({}, ((0, 1), (2, 4))),
        ({"index": -1}, ((2, 4),)),
        ({"image": "all"}, ((1, 3), (4, 5))),
        ({"image": 0}, ((1, 2),)),
        ({"image": -1}, ((2, 3), (4, 5))),
        ([[1, None]], ((1, 5),)),
        ([[-2, -1], [0, 2]], ((0, 2), (3, 4))),
        ([[0, 2], [1, 4], [4, 5]], ((0, 5),)),
    ],
)
def test_what_a_span_means(said: Any, wanted: Any) -> None:
    assert span_at(SPAN.validate_python(said), StubPrompt()) == wanted


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ("xyz", "span"),
        ({"role": "tool"}, "span"),
        ({"image": 2}, "span"),
        ([[0, 1], [3, 6]], "span[1]"),
        ([[-6, None]], "span[0]"),
        ([[5, None]], "span[0]"),
        ([[3, 3]], "span[0]"),
        ([[-1, 2]], "span[0]"),
    ],
)
def test_spans_outside_the_prompt_are_refused(said: Any, param: str) -> None:
    with pytest.raises(DecodingError) as caught:
        span_at(SPAN.validate_python(said), StubPrompt())
    assert caught.value.param == param and str(caught.value)


@pytest.mark.parametrize(
    "said",
    ["", [], 3, {"who": "user"}, {"image": "first"}, {"image": 0, "role": "user"}, [[0, 1, 2]], [[0.5, 1]], None],
)
def test_what_is_no_span(said: Any) -> None:
    with pytest.raises(ValidationError):
        SPAN.validate_python(said)
