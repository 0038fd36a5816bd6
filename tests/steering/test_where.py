"""Where clauses, against sets of positions."""

from typing import Any

import pytest
from clauses import CLAUSE, HORIZON, selected, valid
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from soak import tries

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.where import SHORTHANDS, Region, Where


@settings(max_examples=tries(500), deadline=None)
@given(clause=CLAUSE, prompt_len=st.integers(1, 14))
def test_a_clause_selects_what_slices_of_the_positions_would(clause: dict[str, Any], prompt_len: int) -> None:
    where = valid(clause)
    assume(where is not None)
    assert where is not None
    intervals = where.intervals(prompt_len)
    want = selected(clause, prompt_len) - selected(clause.get("exclude", {}), prompt_len)
    got = [position for start, end in intervals for position in range(start, HORIZON if end is None else end)]
    assert set(got) & set(range(HORIZON)) == want
    assert len(got) == len(set(got)) and got == sorted(got)  # disjoint, in order
    assert all(end is None or start < end for start, end in intervals)


@settings(max_examples=tries(300), deadline=None)
@given(clause=CLAUSE, prompt_len=st.integers(1, 14), max_tokens=st.integers(1, 16))
def test_a_clause_is_refused_exactly_when_no_position_fed_is_selected(
    clause: dict[str, Any], prompt_len: int, max_tokens: int
) -> None:
    where = valid(clause)
    assume(where is not None)
    assert where is not None
    fed = set(range(prompt_len + max_tokens - 1))
    is_idle = not any(
        fed & (selected(clause, prompt_len, is_named) - selected(clause.get("exclude", {}), prompt_len, is_named))
        for is_named in (False, True)
    )
    try:
        where.check(prompt_len, max_tokens)
    except SteeringError as error:
        assert is_idle and error.param == "where"
    else:
        assert not is_idle


@pytest.mark.parametrize("name", SHORTHANDS)
def test_shorthands_select_what_they_say(name: Any) -> None:
    everything, prompt = set(range(9)), set(range(5))
    want = {
        "all": everything,
        "prompt": prompt,
        "generation": everything - prompt,
        "last_prompt": {4},
        "each_last": everything - set(range(4)),
    }[name]
    got = {p for p in range(9) if any(a <= p and (b is None or p < b) for a, b in Where.of(name).intervals(5))}
    assert got == want


@pytest.mark.parametrize("window", [[2, 2], [3, 1], [-1, -3], [0, 0]])
def test_windows_that_are_empty_for_every_prompt_are_refused(window: list[int]) -> None:
    with pytest.raises(ValidationError, match="half-open"):
        Region.model_validate({"prompt": [window]})
