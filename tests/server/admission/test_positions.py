"""What a request puts into its prompt needs room in it."""

import pytest

from whipstaff.server.admission.positions import SoftPrompt, steering_at_prompt
from whipstaff.server.errors import BadRequest
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.steering.inserts import InsertParams
from whipstaff.steering.plan import SteeringPlan


def test_rows_need_room() -> None:
    soft = SoftPrompt("steering[0]", "a", InsertParams(), 5)
    plan, ids = steering_at_prompt(SteeringPlan(()), [], [soft], Prompt(3, [7, 8, 9], 8, None))
    assert ids == [7] * 5 + [7, 8, 9] and plan.inserts == (("a", 0, 5),)
    for prompt, message in (
        (Prompt(3, [7, 8, 9], 7, None), "room for 4"),
        (Prompt(3, None, 99, None), "text or tokens"),
    ):
        with pytest.raises(BadRequest, match=message) as caught:
            steering_at_prompt(SteeringPlan(()), [], [soft], prompt)
        assert caught.value.param == "steering[0].vector"
