"""Plans: segments of a prompt and its answer, against the row of each position."""

import json
from typing import Any

from clauses import HORIZON, PLANNED, selected, valid
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from whipstaff.steering.plan import PlannedEdit, SteeringPlan


@settings(max_examples=300, deadline=None)
@given(planned=st.lists(PLANNED, max_size=4), prompt_len=st.integers(1, 14))
def test_every_position_is_in_the_one_segment_with_its_row(planned: list[Any], prompt_len: int) -> None:
    edits = [(edit, valid(clause), clause) for edit, clause in planned]
    assume(all(where is not None for _, where, _ in edits))
    plan = SteeringPlan(tuple(PlannedEdit(edit, where) for edit, where, _ in edits if where is not None))
    segments = plan.segments(prompt_len)
    for position in range(HORIZON):
        want = [
            tuple(
                edit
                for edit, _, clause in edits
                if position in selected(clause, prompt_len, is_named)
                and position not in selected(clause.get("exclude", {}), prompt_len, is_named)
            )
            for is_named in (False, True)
        ]
        found = [one for one in segments if one.start <= position and (one.end is None or position < one.end)]
        got = [(one.row, one.row_at_tokens) for one in found]
        if not plan.token_ids:
            want[1] = want[0]
        assert got == ([tuple(want)] if any(want) else [])
    assert SteeringPlan.from_wire(json.loads(json.dumps(plan.to_wire()))) == plan
