"""Conditions and schedules: what users may say, what the planner makes of it, and how often an edit was open."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import save
from soak import tries
from torch import Tensor

from whipstaff.cuda_ext import run_edits_
from whipstaff.steering.conditions import MAX_CONDITIONS, MAX_SCHEDULES, Schedule, When, fired
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.ops import Diagonal
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.planner import Planner, SteeringParams
from whipstaff.steering.programs import OPEN, Gate, Step, assemble
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, Vector, parse
from whipstaff.steering.where import Region, Where

SHAPE = ModelShape(architecture="Test", hidden_size=8, num_layers=6, num_heads=2, head_dim=4)


def vector(method: str = "vector", /, seed: int = 0, **tensors: Tensor) -> Vector:
    """Tensors named as in a file, with `__` for dots."""
    generator = torch.Generator().manual_seed(seed)
    header = Header(method=method, model=SHAPE, description=str(torch.rand((), generator=generator)))
    named = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return parse(save(named, metadata={"whipstaff": header.model_dump_json()}))


def adds(*layers: int, site: str = "resid_post") -> Vector:
    return vector(seed=0, **{f"{site}__{layer}__add": torch.ones(8) for layer in layers})


def probe(*layers: int, seed: int = 0) -> Vector:
    return vector("probe", seed=seed, **{f"resid_post__{layer}__direction": torch.ones(8) for layer in layers})


# -- what users may say


@pytest.mark.parametrize(
    "said, message",
    [
        ({}, "one of above and below"),
        ({"above": 1.0, "below": 2.0}, "one of above and below"),
        ({"above": 1.0, "release": 0.5}, 'release needs "decide": "step"'),
        ({"above": 1.0, "release": 1.5, "decide": "step"}, "other side of the threshold"),
        ({"below": 1.0, "release": 0.5, "decide": "step"}, "other side of the threshold"),
        ({"above": math.nan}, "finite"),
        ({"below": math.inf}, "finite"),
        ({"above": 1.0, "layer": -1}, "greater than or equal to 0"),
        ({"above": 1.0, "decide": "always"}, "'prompt' or 'step'"),
        ({"above": 1.0, "threshold": 2.0}, "Extra inputs"),
        ({"above": 1.0, "probe": ""}, "at least 1 character"),
    ],
)
def test_what_is_wrong_with_a_condition_is_said(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        When.model_validate({"probe": "p", **said})


def test_a_condition_needs_a_probe() -> None:
    with pytest.raises(ValidationError, match="probe"):
        When.model_validate({"above": 1.0})


@given(threshold=st.floats(-1e6, 1e6), slack=st.floats(0, 1e6), reading=st.floats(-1e7, 1e7))
def test_thresholds_by_their_definition(threshold: float, slack: float, reading: float) -> None:
    above = When(probe="p", above=threshold, release=threshold - slack, decide="step")
    below = When(probe="p", below=threshold, release=threshold + slack, decide="step")
    assert (above.sign * reading > above.on) == (reading > threshold)
    assert (below.sign * reading > below.on) == (reading < threshold)
    assert (above.sign * reading > above.off) == (reading > threshold - slack)
    assert (below.sign * reading > below.off) == (reading < threshold + slack)
    plain = When(probe="p", below=threshold)
    assert plain.on == plain.off


@pytest.mark.parametrize(
    "said, message",
    [
        ({"shape": "sawtooth"}, "'constant', 'linear', 'cosine', 'exponential' or 'entropy'"),
        ({"shape": "linear"}, "shape linear has no end without `tokens`"),
        ({"shape": "cosine"}, "shape cosine has no end without `tokens`"),
        ({"shape": "exponential"}, "shape exponential has no end without `half_life`"),
        ({"shape": "entropy", "high": 1.0}, "shape entropy has no end without `low`"),
        ({"shape": "entropy", "low": 1.0}, "shape entropy has no end without `high`"),
        ({"shape": "entropy", "low": 1.0, "high": 1.0}, "high must be above low"),
        ({"shape": "constant", "tokens": 4}, "shape constant has no `tokens`"),
        ({"shape": "linear", "tokens": 4, "half_life": 2.0}, "shape linear has no `half_life`"),
        ({"shape": "linear", "tokens": 0}, "greater than or equal to 1"),
        ({"shape": "exponential", "half_life": 0}, "greater than 0"),
        ({"shape": "constant", "from": 101}, "less than or equal to 100"),
        ({"shape": "constant", "from": math.nan}, "finite"),
        ({"shape": "constant", "until": 3}, "Extra inputs"),
    ],
)
def test_what_is_wrong_with_a_schedule_is_said(said: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Schedule.model_validate(said)


FORMULAS = {
    "constant": lambda s, e, n, t: s,
    "linear": lambda s, e, n, t: s + (e - s) * min(n / t, 1),
    "cosine": lambda s, e, n, t: e + (s - e) * (1 + math.cos(math.pi * min(n / t, 1))) / 2,
    "exponential": lambda s, e, n, t: e + (s - e) * 0.5 ** (n / t),
}


@given(
    shape=st.sampled_from(list(FORMULAS)),
    start=st.floats(-100, 100),
    to=st.floats(-100, 100),
    length=st.integers(1, 1000),
    generated=st.lists(st.integers(-50, 5000), min_size=1, max_size=50),
)
def test_gains_follow_their_formula(shape: str, start: float, to: float, length: int, generated: list[int]) -> None:
    said: dict[str, Any] = {"shape": shape, "from": start, "to": to}
    said |= {"linear": {"tokens": length}, "cosine": {"tokens": length}, "exponential": {"half_life": length}}.get(
        shape, {}
    )
    schedule = Schedule.model_validate(said)
    gains = schedule.gains(np.array(generated))
    assert gains.dtype == np.float32
    expected = [FORMULAS[shape](start, to, max(n, 0), length) for n in generated]
    np.testing.assert_allclose(gains, expected, rtol=1e-5, atol=1e-4)
    assert np.abs(gains).max() <= schedule.largest + 1e-4
    assert Schedule.model_validate(schedule.model_dump(by_alias=True)) == schedule


# -- what the planner makes of it


def planned(planner: Planner, edit: Vector, probe_file: Vector | None = None, **fields: Any) -> Gate:
    """The gate of an entry added to a plan."""
    if "when" in fields:
        fields["when"] = {"probe": "p", **fields["when"]}
    (index,) = planner.add(SteeringParams.model_validate({"vector": "v", **fields}), {}, edit, probe_file)
    return planner.edits[index].edit.gate


def test_gates_say_what_was_asked() -> None:
    planner = Planner()
    assert planned(planner, adds(3)) == OPEN
    assert planned(planner, adds(3), probe(1), when={"above": 0.5}) == Gate(-1, 0, True, 0.5, 0.5, 1)
    step = {"below": -2.0, "release": 3.0, "decide": "step"}
    assert planned(planner, adds(3), probe(1), when=step) == Gate(-1, 1, False, 2.0, -3.0, -1)
    linear = {"shape": "linear", "tokens": 5}
    assert planned(planner, adds(3), schedule=linear) == Gate(schedule_index=0)
    entropy = {"shape": "entropy", "from": 0.1, "to": 2.0, "low": 1.0, "high": 3.0}
    assert planned(planner, adds(3), schedule=entropy) == Gate(ramp=(2, 1.0, 3.0, 0.1, 2.0))
    both = planned(planner, adds(3), probe(1), when={"above": 0.7}, schedule=linear)
    assert both == Gate(0, 0, True, 0.7, 0.7, 1)
    plan = planner.plan
    assert (plan.num_columns, plan.entropy_column, len(plan.schedules), len(plan.probes)) == (3, 2, 1, 2)
    assert SteeringPlan.from_wire(plan.to_wire()) == plan


def test_equal_readings_share_a_column_and_equal_schedules_a_lane() -> None:
    planner = Planner()
    step = {"above": 0.0, "decide": "step"}
    gates = [
        planned(planner, adds(4), probe(1), when={"above": 0.5}),
        planned(planner, adds(4), probe(1), when={"below": 0.1}),  # another threshold, the same reading
        planned(planner, adds(4), probe(2), when={"above": 0.5}),
        planned(planner, adds(4), probe(2), when=step),
        planned(planner, adds(4), probe(2), when=step, where="generation"),
        planned(planner, adds(4), probe(2), when=step, where="all"),  # read from the first token on
    ]
    assert [gate.condition_index for gate in gates] == [0, 0, 1, 2, 2, 3]
    lanes = [
        planned(planner, adds(4), schedule={"shape": "constant", "from": f}).schedule_index for f in (0.5, 0.2, 0.5)
    ]
    assert lanes == [0, 1, 0]


def test_a_decision_on_the_prompt_is_for_what_follows() -> None:
    """Earlier prompt tokens may be in an earlier chunk, when nothing is decided yet: they are never edited."""
    for where in ("all", {"prompt": [[0, 4], [-3, None]], "generation": "all", "exclude": {"prompt": [[1, 2]]}}):
        planner = Planner()
        planned(planner, adds(3), probe(1), when={"above": 0.5}, where=where)
        assert planner.edits[0].where.intervals(10) == [(9, None)]
        assert planner.plan.segments(10)[0].start == 9
    planner = Planner()
    planned(planner, adds(3), probe(1), when={"above": 0.5}, where={"tokens": [7]})
    assert planner.edits[0].where.intervals_at_tokens(10) == [(9, None)]
    planner = Planner()
    planned(planner, adds(3), probe(1), when={"above": 0.5}, where={"prompt": [[0, 3]]})
    with pytest.raises(SteeringError, match="selects no token"):
        planner.edits[0].where.check(10, 20)
    with pytest.raises(SteeringError, match="too many excluded windows") as caught:
        many = {"generation": "all", "exclude": {"prompt": [[2 * i, 2 * i + 1] for i in range(64)]}}
        planned(Planner(), adds(3), probe(1), when={"above": 0.5}, where=many)
    assert caught.value.param == "where.exclude"


@pytest.mark.parametrize(
    "edit, its_probe, fields, param, message",
    [
        (adds(1), probe(1), {}, "when.probe", "read after layer 1, and this edit begins in layer 1"),
        (adds(0, 3), probe(1), {}, "when.probe", "begins in layer 0.*restrict `layers`"),
        (adds(2, site="resid_pre"), probe(1), {}, "when.probe", "begins in layer 1"),  # the same rows
        (adds(3), adds(1), {}, "when.probe", "its method is vector"),
        (adds(3), probe(0, 1), {}, "when.layer", r"directions at layers \[0, 1\]; name one"),
        (adds(3), probe(0, 1), {"layer": 2}, "when.layer", r"no direction at layer 2; it has \[0, 1\]"),
    ],
)
def test_what_cannot_be_a_condition_is_refused(
    edit: Vector, its_probe: Vector, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(SteeringError, match=message) as caught:
        planned(Planner(), edit, its_probe, when={"above": 0.5, **fields})
    assert caught.value.param == param


def test_an_edit_restricted_to_later_layers_may_depend_on_the_probe() -> None:
    planner = Planner()
    assert planned(planner, adds(0, 3), probe(1), when={"above": 0.5}, layers=[3]).condition_index == 0
    assert planned(planner, adds(0, 3), probe(0, 1), when={"above": 0.5, "layer": 0}, layers=[3]).condition_index == 1


def test_too_many_readings_and_schedules_are_refused() -> None:
    planner = Planner()
    for seed in range(MAX_CONDITIONS):
        planned(planner, adds(3), probe(1, seed=seed), when={"above": 0.5})
    for fields in ({"when": {"above": 0.5}}, {"schedule": {"shape": "entropy", "low": 1, "high": 2}}):
        with pytest.raises(SteeringError, match=f"depend on {MAX_CONDITIONS} different readings") as caught:
            planned(planner, adds(3), probe(1, seed=99), **fields)
        assert caught.value.param == next(iter(fields))
    for index in range(MAX_SCHEDULES):
        planned(planner, adds(3), schedule={"shape": "constant", "from": index / 10})
    with pytest.raises(SteeringError, match=f"{MAX_SCHEDULES} different schedules") as caught:
        planned(planner, adds(3), schedule={"shape": "constant", "from": 9})
    assert caught.value.param == "schedule"


def test_hysteresis_over_the_prompt_cannot_begin_in_the_cache() -> None:
    step, slack = {"above": 1.0, "decide": "step"}, {"above": 1.0, "release": 0.0, "decide": "step"}
    expected = [(step, "all", False), (slack, "all", True), (slack, "each_last", False)]
    for when, where, forgets in expected:
        planner = Planner()
        planned(planner, adds(3), probe(1), when=when, where=where)
        assert planner.plan.forgets_cached_steps == forgets


# -- clauses that name tokens


def windows(lowest: int) -> st.SearchStrategy[Any]:
    """`all`, `none`, or up to two windows of three positions."""
    starts = st.lists(st.integers(lowest, 12).filter(lambda start: not -3 <= start < 0), max_size=2)
    return st.sampled_from(["all", "none"]) | starts.map(lambda found: [(start, start + 3) for start in found])


def clause(chosen: Any, hole: Any, tokens: list[int], chooses: bool, excludes: bool) -> Where:
    exclude = Region(prompt=hole[0], generation=hole[1], tokens=tokens if excludes else None) if hole else None
    return Where(prompt=chosen[0], generation=chosen[1], tokens=tokens if chooses else None, exclude=exclude)


pairs = st.tuples(windows(-9), windows(0))


def says(region: Region, position: int, prompt_len: int, token: int) -> bool:
    """A region by its definition."""
    listed, index = (region.prompt, position) if position < prompt_len else (region.generation, position - prompt_len)
    if token in (region.tokens or ()):
        return True
    if isinstance(listed, str):
        return listed == "all"
    length = prompt_len if position < prompt_len else 0
    ends = [(start, math.inf if end is None else end) for start, end in listed]
    return any((s + length if s < 0 else s) <= index < (e + length if e < 0 else e) for s, e in ends)


@settings(max_examples=tries(300), deadline=None)
@given(
    said=st.lists(st.tuples(pairs, st.none() | pairs, st.booleans(), st.booleans()), min_size=1, max_size=3),
    tokens=st.lists(st.integers(0, 4), min_size=1, max_size=3),
    prompt_len=st.integers(1, 16),
    ids=st.lists(st.integers(0, 6), min_size=20, max_size=20),
)
def test_every_token_is_chosen_by_its_position_or_itself(
    said: list[Any], tokens: list[int], prompt_len: int, ids: list[int]
) -> None:
    """Several clauses over one set of tokens: a token gets the edits whose clauses choose it, and no other."""
    wheres = [clause(chosen, hole, tokens, chooses, excludes) for chosen, hole, chooses, excludes in said]
    planner, edits = Planner(), [adds(layer) for layer in range(len(wheres))]
    for where, edit in zip(wheres, edits, strict=True):
        planned(planner, edit, where=where.model_dump(exclude_none=True))
    for position, token in enumerate(ids):
        expected = [
            edit.digest
            for where, edit in zip(wheres, edits, strict=True)
            if _chosen(where, position, prompt_len, token)
        ]
        assert [item.digest for item in _row(planner.plan, position, prompt_len, token)] == expected
        assert all(
            position >= prompt_len - 1
            for where in wheres
            if where.is_late and _chosen(where, position, prompt_len, token)
        )


def _chosen(where: Where, position: int, prompt_len: int, token: int) -> bool:
    is_excluded = where.exclude is not None and says(where.exclude, position, prompt_len, token)
    return says(where, position, prompt_len, token) and not is_excluded


def _row(plan: SteeringPlan, position: int, prompt_len: int, token: int) -> Any:
    """What the segments say of one token."""
    here = [s for s in plan.segments(prompt_len) if s.start <= position and (s.end is None or position < s.end)]
    assert len(here) <= 1
    if not here:
        return ()
    return here[0].row_at_tokens if token in plan.token_ids else here[0].row


# -- how often an edit was open

readings = st.none() | st.floats(-3, 3, width=32)


@settings(max_examples=tries(300), deadline=None)
@given(
    values=st.lists(readings, min_size=1, max_size=24),
    entropies=st.lists(readings, min_size=24, max_size=24),
    on=st.floats(-2, 2, width=32),
    slack=st.floats(0, 2, width=32),
    sign=st.sampled_from([1, -1]),
    is_latched=st.booleans(),
    has_condition=st.booleans(),
    ramp=st.none() | st.sampled_from([(1, 0.0, 1.0, 0.0, 1.0), (1, -1.0, 1.0, 1.0, 0.0), (1, 0.0, 2.0, 0.5, -1.0)]),
)
def test_open_positions_are_counted_as_the_kernel_decides(
    values: list[float | None],
    entropies: list[float | None],
    on: float,
    slack: float,
    sign: int,
    is_latched: bool,
    has_condition: bool,
    ramp: tuple[int, float, float, float, float] | None,
) -> None:
    num = len(values)
    entropies = entropies[:num]
    off = on if is_latched else on - slack
    gate = Gate(condition_index=0 if has_condition else -1, is_latched=is_latched, on=on, off=off, sign=sign, ramp=ramp)
    was_open = _opened_by_the_kernel(gate, values, entropies)
    columns = [values[:1] if is_latched else values, entropies]
    is_known = [not has_condition or (values[0] if is_latched else value) is not None for value in values]
    counted = fired(gate, columns, range(num))
    assert counted.num_known == sum(is_known)
    assert counted.num_open == sum(was_open)  # what has no reading is closed
    middle = range(num // 3, num)
    assert fired(gate, columns, middle).num_open == sum(was_open[num // 3 :])


def _opened_by_the_kernel(gate: Gate, *columns: list[float | None]) -> list[bool]:
    program = assemble([], [Step((Diagonal(None, torch.ones(4)),), gate)])
    code = [
        [what, *(operand if isinstance(operand, int) else 0 for operand in operands)]
        for what, operands in zip(program.codes, program.operands, strict=True)
    ]
    num = len(columns[0])
    history = torch.tensor([[math.nan if value is None else value for value in column] for column in columns])
    tokens = torch.tensor([[0, position, 0, 1] for position in range(num)], dtype=torch.int32)
    x = torch.zeros(num, 4)
    run_edits_(
        x,
        torch.ones(1, 4),
        torch.tensor(code, dtype=torch.int32),
        torch.tensor(program.numbers),
        tokens,
        torch.ones(num, 1),
        history,
    )
    return [bool(row.any()) for row in x]


def test_readings_that_were_not_kept_are_not_known() -> None:
    gate = Gate(condition_index=0, on=1.0, off=1.0)
    assert fired(gate, [[2.0, None, 0.5]], range(6)) == (1, 2)
    assert fired(Gate(condition_index=0, is_latched=True, on=1.0, off=1.0), [[]], range(6)) == (0, 0)
    assert fired(Gate(condition_index=0, is_latched=True, on=1.0, off=1.0), [[2.0]], range(6)) == (6, 6)
    assert fired(Gate(schedule_index=2), [], range(6)) == (6, 6)
