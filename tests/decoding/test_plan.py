"""A request's decoding as it travels to the engine."""

import json

from whipstaff.decoding.mix import Mix
from whipstaff.decoding.plan import DecodingPlan, Rewrite, SamplerSettings


def test_a_plan_travels() -> None:
    rewrites = (Rewrite("co_llm", "{}", ("a",), ("digest",)), Rewrite("edt", '{"t0":1.0}'))
    plan = DecodingPlan(Mix.of({"b": 0.5}), rewrites, SamplerSettings(0.7, 5, 0.9, 0.1, True), seed=3)
    assert DecodingPlan.from_wire(json.loads(json.dumps(plan.to_wire()))) == plan
    assert plan.models == ["a", "b"]
    assert DecodingPlan.from_wire(json.loads(json.dumps(DecodingPlan().to_wire()))) == DecodingPlan()
