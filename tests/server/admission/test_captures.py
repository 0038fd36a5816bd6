"""What `capture` may say, what a request may take of a server's room, and the file that comes of it."""

import base64
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load

from whipstaff.server.admission.captured import NamedSequence, in_base64, tensors_of
from whipstaff.server.admission.captures import AnyEntry, admit_captures, most_file_bytes
from whipstaff.server.admission.prepare import compile_extras
from whipstaff.server.admission.request import CompiledRequest
from whipstaff.server.errors import WhipstaffError
from whipstaff.server.plan import PLAN_KEY, PlacedRequest, PositionedPlan, RequestPlan
from whipstaff.server.prompt.message_spans import Prompt
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.steering.method import HookPoint

NUM_PROMPT, MAX_TOKENS = 10, 5


@pytest.fixture(scope="module")
def reading(caps: Capabilities) -> Capabilities:
    """A server that lets three of its four layers be read."""
    return replace(caps, capture_layers=frozenset({0, 1, 2}), max_capture_bytes=1 << 20)


def compiled(caps: Capabilities, **fields: Any) -> CompiledRequest:
    made = compile_extras(fields, caps)
    assert made is not None
    return made


def place(made: CompiledRequest) -> PlacedRequest:
    prompt = Prompt(NUM_PROMPT, list(range(NUM_PROMPT)), 100, None)
    return made.at_prompt(prompt, lambda _: MAX_TOKENS, True)


def test_what_is_read_travels_with_the_plan(reading: Capabilities) -> None:
    entries: list[dict[str, Any]] = [
        {"layers": [2, 0]},
        {"site": "attn_head", "layers": "all", "where": "generation", "edited": False},
    ]
    with pytest.raises(WhipstaffError, match="--capture-layers 0,1,2,3") as refused:
        compiled(reading, capture=entries)
    assert (refused.value.status, refused.value.param) == (422, "capture[1].layers")
    entries[1]["layers"] = [1]
    made = compiled(reading, capture=entries)
    plan = RequestPlan.from_wire({PLAN_KEY: place(made).plan.to_wire()})
    assert plan is not None and plan.captures_id and plan.max_fed == NUM_PROMPT + MAX_TOKENS - 1
    placed = PositionedPlan(plan, NUM_PROMPT)
    assert [one.points for one in placed.captures] == [
        (HookPoint("resid_post", 2), HookPoint("resid_post", 0)),
        (HookPoint("attn_head", 1),),
    ]
    assert [one.intervals for one in placed.captures] == [((0, 14),), ((10, 14),)]
    assert placed.first_captured == 0 and placed.first_edited is None
    shape = reading.model
    assert placed.capture_bytes(shape) == 4 * (2 * 14 * shape.hidden_size + 4 * shape.num_heads * shape.head_dim)


def test_a_request_takes_no_more_than_there_is(reading: Capabilities) -> None:
    num = 14 * 4 * reading.model.hidden_size
    fields: dict[str, Any] = {"capture": {"layers": [1]}}
    place(compiled(replace(reading, max_capture_bytes=num), **fields))
    for most in (num - 1, 0):
        with pytest.raises(WhipstaffError, match=f"up to {num} bytes .* reads {most} at once") as refused:
            place(compiled(replace(reading, max_capture_bytes=most), **fields))
        assert (refused.value.status, refused.value.param) == (422, "capture")


def test_a_stream_that_a_method_reads_after_the_edits_is_not_read_before_them(early: Capabilities) -> None:
    able = replace(early, capture_layers=frozenset(range(4)), max_capture_bytes=1 << 20)
    dola = {"method": "dola", "layers": [0, 1], "relative_top": 0}
    compiled(able, decoding=dola, capture={"layers": [0]})
    compiled(able, decoding=dola, capture={"layers": [1], "edited": False})
    with pytest.raises(WhipstaffError) as refused:
        compiled(able, decoding=dola, capture={"layers": [0], "edited": False})
    assert (refused.value.status, refused.value.param) == (400, "capture.edited")


def told(rows: torch.Tensor, seen: list[bool]) -> dict[str, Any]:
    data = rows.contiguous().view(torch.uint8).numpy().tobytes()
    kind = str(rows.dtype).removeprefix("torch.")
    return {"data": data, "shape": list(rows.shape), "dtype": kind, "seen": np.array(seen).tobytes()}


def entries_of(caps: Capabilities, *said: dict[str, Any]) -> tuple[AnyEntry, ...]:
    return admit_captures({"capture": list(said)}, None, caps).entries


def test_a_file_is_made_of_all_ranks_parts(reading: Capabilities) -> None:
    """Heads are sharded, streams are not; what was generated in advance of an end is left out."""
    shape = reading.model
    entries = entries_of(
        reading,
        {"layers": [1, 0], "where": {"prompt": [[8, None]], "generation": "all"}, "dtype": "bfloat16"},
        {"site": "attn_head", "layers": [2], "where": "generation"},
        {"layers": [0], "where": "generation", "reduce": "mean"},
        {"layers": [0], "where": "generation", "reduce": "last"},
    )
    plan = place(compiled(reading, capture=[entry.params.model_dump() for entry in entries])).plan
    stream, heads = torch.randn(2, 5, shape.hidden_size), torch.randn(1, 3, shape.num_heads * shape.head_dim)
    own = [told(stream[1:, 2:], [True] * 3)] * 2
    ranks = [
        {"a": [told(stream.bfloat16(), [True] * 5), told(part, [True] * 3), *own]} for part in heads.chunk(2, dim=-1)
    ]
    placed = PositionedPlan(plan, NUM_PROMPT)
    found = tensors_of(NamedSequence(1, "a", 12), placed, entries, shape, ranks)
    assert found is not None
    data = base64.b64decode(in_base64(found))
    tensors = load(data)
    assert len(data) <= most_file_bytes(placed, shape)
    assert tensors["0.positions"].tolist() == [8, 9, 10, 11]
    assert torch.equal(tensors["0.resid_post.1"], stream[0, :4].bfloat16())
    assert torch.equal(tensors["0.resid_post.0"], stream[1, :4].bfloat16())
    assert torch.equal(tensors["1.attn_head.2"], heads[0, :2].unflatten(1, (shape.num_heads, shape.head_dim)))
    assert torch.equal(tensors["2.resid_post.0"], stream[1, 2:4].mean(0))
    assert torch.equal(tensors["3.resid_post.0"], stream[1, 3]) and tensors["3.positions"].tolist() == [10, 11]
    assert tensors_of(NamedSequence(0, "b", 12), placed, entries, shape, ranks) is None


def test_nothing_generated_is_nothing_read(reading: Capabilities) -> None:
    entries = entries_of(reading, {"layers": [0], "where": "generation"}, {"layers": [0], "reduce": "mean"})
    plan = place(compiled(reading, capture=[entry.params.model_dump() for entry in entries])).plan
    width = reading.model.hidden_size
    ranks = [{"a": [told(torch.empty(1, 0, width), []), told(torch.ones(1, 10, width), [True] * 10)]}]
    placed = PositionedPlan(plan, NUM_PROMPT)
    tensors = tensors_of(NamedSequence(0, "a", 10), placed, entries, reading.model, ranks)
    assert tensors is not None
    assert len(in_base64(tensors)) * 3 / 4 <= most_file_bytes(placed, reading.model)
    assert tensors["0.resid_post.0"].shape == (0, width) and tensors["0.positions"].tolist() == []
    assert torch.equal(tensors["1.resid_post.0"], torch.ones(width))


def test_a_file_is_for_servers_that_keep_files(reading: Capabilities) -> None:
    read: dict[str, Any] = {"capture": {"layers": [1]}, "capture_format": "download"}
    able = replace(reading, keeps_captures=True)
    made = compiled(able, **read)
    assert made.downloads and not compiled(able, capture={"layers": [1]}).downloads
    assert made.most_file_bytes([place(made)] * 2, 3) == 6 * most_file_bytes(
        PositionedPlan(place(made).plan, NUM_PROMPT), reading.model
    )
    for caps, fields, status in (
        (reading, read, 422),
        (able, {"capture_format": "download"}, 400),
        (able, {"capture_format": "download", "capture": []}, 400),
        (able, {**read, "capture_format": "file"}, 400),
    ):
        with pytest.raises(WhipstaffError) as refused:
            compiled(caps, **fields)
        assert (refused.value.status, refused.value.param) == (status, "capture_format")


def test_probes_are_read_along(reading: Capabilities) -> None:
    """One that ends the answer at the same tokens is read once; windows are those of the prompt."""
    stop: dict[str, Any] = {"stop_when": {"probe": "probes", "above": 1.0, "layer": 1}}
    entries: list[dict[str, Any]] = [
        {"probe": "probes", "layer": 1, "where": "each_last"},
        {"layers": [0]},
        {"probe": "probes", "layer": 1, "where": {"prompt": [[2, 4]], "generation": "all"}, "dtype": "float16"},
        {"probe": "probes", "layer": 1, "where": "each_last", "reduce": "mean"},
    ]
    made = compiled(reading, capture=entries, **stop)
    plan = RequestPlan.from_wire({PLAN_KEY: place(made).plan.to_wire()})
    assert plan is not None and plan.steering is not None
    assert (plan.steering.num_columns, plan.steering.told, plan.undrafted_by) == (2, (0, 1), "stop_when")
    assert [one.probe.condition_index for one in plan.steering.probes] == [0, 1]
    placed = PositionedPlan(plan, NUM_PROMPT)
    assert placed.first_captured == 0
    assert PositionedPlan(place(compiled(reading, capture=entries[2])).plan, NUM_PROMPT).first_captured == 2
    assert made.readings_by_entry([0.5, None]) == {"0": 0.5, "3": 0.5}
    stream = torch.randn(1, 14, reading.model.hidden_size)
    columns = [[None] * 9 + [1.0, 2.0, 6.0, 9.0], [None, None, 3.0, 4.0, *[None] * 6, 5.0, 6.0, 7.0]]
    sequence, ranks = NamedSequence(0, "a", 12), [{"a": [told(stream, [True] * 14)]}]
    tensors = tensors_of(sequence, placed, made.captures, reading.model, ranks, columns)
    assert tensors is not None
    assert tensors["0.probe.1"].tolist() == [1.0, 2.0, 6.0] and tensors["0.positions"].tolist() == [9, 10, 11]
    assert torch.equal(tensors["1.resid_post.0"], stream[0, :12])
    assert tensors["2.probe.1"].dtype == torch.float16 and tensors["2.positions"].tolist() == [2, 3, 10, 11]
    assert tensors["3.probe.1"].item() == 3.0
    assert tensors_of(sequence, placed, made.captures, reading.model, ranks) is None
    assert [one.get("digest") for one in (entry.to_json() for entry in made.captures)].count(None) == 1


def test_probes_that_cannot_be_read_are_refused(reading: Capabilities) -> None:
    many = [{"probe": "probes", "layer": 1, "where": {"prompt": [[index, None]]}} for index in range(5)]
    for entries, status, param in (
        ([{"probe": "no-such", "layer": 1}], 404, "capture[0].probe"),
        ([{"probe": "probes", "layer": 99}], 400, "capture[0].layer"),
        ([{"probe": "probes", "layer": 1, "edited": False}], 400, "capture[0].edited"),
        ([{"probe": "probes", "layer": 1, "where": {"tokens": [5]}}], 400, "capture[0].where.tokens"),
        (many, 400, "capture[4].probe"),
    ):
        with pytest.raises(WhipstaffError) as refused:
            compiled(reading, capture=entries)
        assert (refused.value.status, refused.value.param) == (status, param)
    nothing = compiled(reading, capture=[{"probe": "probes", "layer": 1, "where": {"generation": [[50, 60]]}}])
    with pytest.raises(WhipstaffError) as refused:
        place(nothing)
    assert refused.value.param == "capture[0].where"


@pytest.fixture(scope="module")
def looking(reading: Capabilities) -> Capabilities:
    """A server that can tell what the heads of two layers look at."""
    return replace(reading, attention_layers=frozenset({0, 2}))


def test_what_heads_look_at_is_made_of_all_ranks_parts(looking: Capabilities) -> None:
    """Heads come in the order that was asked for, as far as the sequence went."""
    num = looking.model.num_heads
    entries: list[dict[str, Any]] = [
        {"attention": {"2": [num - 1, 0], "0": "all"}, "dtype": "float16"},
        {"layers": [1], "where": "generation"},
        {"attention": {"0": [0, num - 1]}, "where": {"prompt": [[8, None]]}, "reduce": "max"},
        {"attention": {"0": [1]}, "reduce": "mean"},
    ]
    made = compiled(looking, capture=entries)
    plan = RequestPlan.from_wire({PLAN_KEY: place(made).plan.to_wire()})
    assert plan is not None and plan.captures_id
    placed = PositionedPlan(plan, NUM_PROMPT)
    assert [(one.layer, one.heads, one.intervals) for one in placed.attended] == [
        (2, (num - 1, 0), ((10, 14),)),
        (0, tuple(range(num)), ((10, 14),)),
        (0, (0, num - 1), ((8, 10),)),
        (0, (1,), ((10, 14),)),
    ]
    assert placed.needs_slots and placed.first_captured == 8
    width = looking.model.hidden_size
    assert placed.capture_bytes(looking.model) == 4 * (4 * width + 14 * (4 * 2 + 4 * num + 2 * 2 + 4))
    stream, random = torch.randn(1, 4, width), torch.Generator().manual_seed(0)
    seen = [torch.rand(4, num, 14, generator=random), torch.rand(2, num, 14, generator=random)]  # by all heads
    halves = [range(num // 2), range(num // 2, num)]

    def part(rows: torch.Tensor, heads: tuple[int, ...], own: range) -> dict[str, Any]:
        mine = rows[:, [head for head in sorted(heads) if head in own]]
        return told(mine.flatten(1)[None], [True] * len(rows))

    ranks = [
        {
            "a": [
                told(stream, [True] * 4),
                *(part(seen[i == 2], one.heads, own) for i, one in enumerate(placed.attended)),
            ]
        }
        for own in halves
    ]
    tensors = tensors_of(NamedSequence(0, "a", 12), placed, made.captures, looking.model, ranks)
    assert tensors is not None
    assert tensors["0.positions"].tolist() == [10, 11] and tensors["2.positions"].tolist() == [8, 9]
    assert torch.equal(tensors["0.attention.2"], seen[0][:2, [num - 1, 0], :12].half())
    assert torch.equal(tensors["0.attention.0"], seen[0][:2, :, :12].half())
    assert torch.equal(tensors["1.resid_post.1"], stream[0, :2])
    assert torch.equal(tensors["2.attention.0"], seen[1][:, [0, num - 1], :12].amax(1))
    assert torch.equal(tensors["3.attention.0"], seen[0][:2, 1, :12])
    assert len(in_base64(tensors)) * 3 / 4 <= most_file_bytes(placed, looking.model)


def test_heads_that_cannot_be_told_of_are_refused(looking: Capabilities) -> None:
    num = looking.model.num_heads
    for entry, status, param in (
        ({"attention": {"99": "all"}}, 400, "capture.attention.99"),
        ({"attention": {"1": "all"}}, 422, "capture.attention.1"),
        ({"attention": {"0": [num]}}, 400, "capture.attention.0[0]"),
        ({"attention": {"0": [0, 1, 0]}}, 400, "capture.attention.0[2]"),
        ({"attention": {}}, 400, "capture.attention"),
        ({"attention": {"0": []}}, 400, "capture.attention.0"),
        ({"attention": {"0": "some"}}, 400, "capture.attention.0"),
        ({"attention": {"last": "all"}}, 400, "capture.attention.last"),
        ({"attention": {"0": "all"}, "reduce": "last"}, 400, "capture.reduce"),
        ({"attention": {"0": "all"}, "edited": True}, 400, "capture.edited"),
        ({"attention": {"0": "all"}, "where": {"tokens": [3]}}, 400, "capture.where.tokens"),
    ):
        with pytest.raises(WhipstaffError) as refused:
            compiled(looking, capture=entry)
        assert (refused.value.status, refused.value.param) == (status, param), refused.value
    with pytest.raises(WhipstaffError, match="--attention-layers 0,1,2"):
        compiled(looking, capture={"attention": {"1": "all"}})
