"""Tables: what an address leads to is what its row's edits do, and room is reused without a trace."""

import json
import weakref
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from whipstaff.cuda_ext import run_edits_
from whipstaff.steering.edits import edits_of, weigh
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.method import HookPoint
from whipstaff.steering.ops import Diagonal, Directions
from whipstaff.steering.plan import Capture, Edit, EditSet, StreamCopy, num_slots
from whipstaff.steering.programs import Line
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.tables import SiteSpec, Tables
from whipstaff.steering.vector_file import Header, Vector, parse

CPU = torch.device("cpu")
SHAPE = ModelShape(architecture="Test", hidden_size=8, num_layers=3, num_heads=2, head_dim=6)
TOKEN_COLUMNS, NUM_GAINS = 6, 4


def vector(method: str, tensors: dict[str, Tensor], **defaults: Any) -> Vector:
    header = Header(method=method, model=SHAPE, defaults=defaults)
    return parse(save(tensors, metadata={"whipstaff": header.model_dump_json()}))


def _vectors() -> list[Vector]:
    torch.manual_seed(0)
    diagonal = {f"resid_post.{layer}.{part}": torch.randn(8) for layer in range(3) for part in ("add", "gain")}
    heads = {f"attn_head.{layer}.add": torch.randn(2, 6) for layer in range(3)}
    return [
        vector("vector", diagonal),
        vector("vector", heads),
        vector("directional_ablation", {f"resid_pre.{layer}.direction": torch.randn(8) for layer in (1, 2)}),
        vector("vector", {"resid_post.1.add": torch.randn(8)}),
    ]


VECTORS = _vectors()
BY_DIGEST = {vector.digest: vector for vector in VECTORS}


def entry(index: int, scale: float = 1.0, **more: Any) -> Edit:
    bare = Edit(VECTORS[index].digest, json.dumps({"scale": scale}), None, **more)
    weight = weigh(VECTORS[index], bare)
    return bare._replace(num_lines=weight.num_lines, num_instructions=weight.num_instructions)


ROWS: list[EditSet] = [
    (entry(0), entry(1, 0.5)),
    (entry(2), entry(0, -1.0), entry(3)),
    (entry(3, 2.0, renorm=True), entry(2)),
    (entry(1, 3.0),),
    tuple(entry(2, 0.1 * index) for index in range(1, 30)),  # longer than a frame
]


def tables(num_slots: int, ranks: int = 1, rank: int = 0, kept: dict[HookPoint, Tensor] | None = None) -> Tables:
    width = 12 // ranks
    specs = [SiteSpec(HookPoint("resid_post", layer), 0, 8) for layer in range(3)]
    specs += [SiteSpec(HookPoint("attn_head", layer), rank * width, width) for layer in range(3)]
    if kept:
        specs.append(SiteSpec(HookPoint("resid_pre", 0), 0, 8))
    return Tables(specs, num_slots, 3, CPU, BY_DIGEST.__getitem__, kept=kept)


def run(held: Tables, point: HookPoint, address: int, x: Tensor) -> Tensor:
    """The row x after the program at an address."""
    site, x = held.at(point), x[None].clone()
    tokens = torch.full((1, TOKEN_COLUMNS), -1, dtype=torch.int32)
    tokens[0, 0] = address
    run_edits_(x, site.lines, site.code, site.args, tokens, torch.ones(1, NUM_GAINS), torch.zeros(1, 1), kept=site.kept)
    return x[0]


def by_hand(row: EditSet, point: HookPoint, x: Tensor) -> Tensor:
    """One entry after the other, from the ops alone."""
    for item in row:
        assert isinstance(item, Edit)
        before = x
        for op in edits_of(BY_DIGEST[item.digest], item).get(point, ()):
            if isinstance(op, Directions):
                assert op.phi[0].name == "AFFINE" and op.read is not None
                readings = op.read @ x + (0 if op.bias is None else op.bias)
                x = x + (op.args[:, 0] * readings + op.args[:, 1]) @ op.write
            else:
                assert isinstance(op, Diagonal)
                x = x * (1 if op.mul is None else op.mul) + (0 if op.add is None else op.add)
        if item.renorm:
            x = x * before.norm() / x.norm()
    return x


def check(held: Tables, addresses: dict[EditSet, int]) -> None:
    for row, address in addresses.items():
        for point in held.hook_points:
            x = torch.randn(held.at(point).lines.shape[1])
            torch.testing.assert_close(run(held, point, address, x), by_hand(row, point, x))


def test_an_address_does_what_its_edits_do_one_after_the_other() -> None:
    held = tables(num_slots=64)
    check(held, held.acquire(ROWS))


def test_a_stream_is_kept_as_the_rows_edits_leave_it() -> None:
    held = tables(num_slots=64, kept={HookPoint.entering(layer): torch.full((4, 8), torch.nan) for layer in range(3)})
    edits = ROWS[1]
    rows: list[EditSet] = [(StreamCopy((0, 2)),), (*edits, StreamCopy((0, 1, 2)))]
    for row, address in held.acquire(rows).items():
        for point in held.hook_points:
            x, at = torch.randn(held.at(point).lines.shape[1]), held.at(point).kept
            after = run(held, point, address, x)
            if at is not None and (point != HookPoint("resid_post", 0) or row != rows[0]):
                assert torch.equal(at[0], after) and at[1:].isnan().all()
            elif at is not None:
                assert at.isnan().all()
            torch.testing.assert_close(after, by_hand(edits if row == rows[1] else (), point, x))
    assert held.kept(0) is held.at(HookPoint("resid_pre", 0)).kept
    assert held.kept(2) is held.at(HookPoint("resid_post", 1)).kept


def test_activations_are_captured_before_or_after_the_rows_edits() -> None:
    points = HookPoint("resid_post", 1), HookPoint("attn_head", 2)
    kept = {point: torch.full((4, 12 if point.site == "attn_head" else 8), torch.nan) for point in points}
    held, edits = tables(num_slots=64, kept=kept), ROWS[1]
    for is_edited in (False, True):
        row = (*edits, Capture(points, is_edited))
        for each, address in held.acquire([row, (Capture(points, is_edited),)]).items():
            for point in points:
                x, at = torch.randn(held.at(point).lines.shape[1]), held.at(point).kept
                assert at is not None
                after = run(held, point, address, x)
                torch.testing.assert_close(after, by_hand(edits if each == row else (), point, x))
                assert torch.equal(at[0], after if is_edited else x) and at[1:].isnan().all()


def test_room_is_reused_without_a_trace() -> None:
    """Rows in changing company, with room for a few: what was somewhere before never shows."""
    rows = ROWS[:4]
    held = tables(num_slots=max(num_slots(row, 3) for row in rows))
    generator = torch.Generator().manual_seed(1)
    for _ in range(60):
        wanted = [rows[int(torch.randint(len(rows), (), generator=generator))]]
        check(held, held.acquire(wanted))
    assert held.num_uploads > 2 * len(rows)


def test_rows_keep_their_place_while_there_is_room() -> None:
    held = tables(num_slots=64)
    addresses = held.acquire(ROWS[:3])
    assert held.acquire(ROWS) | addresses == held.acquire(ROWS)
    assert held.num_uploads == len(ROWS)


def test_a_step_that_does_not_fit_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="more steering rows than there is room for"):
        tables(num_slots=1).acquire(ROWS[:3])


def test_what_a_row_takes_is_no_more_than_was_said() -> None:
    """The scheduler counts in slots: rows that fit by its count must fit the tables."""
    for row in ROWS:
        tables(num_slots=num_slots(row, 3)).acquire([row])


def test_ranks_hold_their_slice_of_the_heads() -> None:
    whole, parts = tables(num_slots=8), [tables(num_slots=8, ranks=2, rank=rank) for rank in range(2)]
    x, point, row = torch.randn(12), HookPoint("attn_head", 1), ROWS[0]
    expected = run(whole, point, whole.acquire([row])[row], x)
    pieces = [run(part, point, part.acquire([row])[row], half) for part, half in zip(parts, x.chunk(2), strict=True)]
    assert torch.equal(torch.cat(pieces), expected)


def test_nothing_is_made_of_a_normalised_vector_at_scale_0() -> None:
    """Off is off bit for bit: adding zeros would still move what a residual holds."""
    assert edits_of(VECTORS[3], entry(3, 0.0, normalize=True)) == {}
    ((op,),) = edits_of(VECTORS[3], entry(3, 2.0, normalize=True)).values()
    assert isinstance(op, Diagonal) and op.add is not None
    assert float(op.add.norm()) == pytest.approx(2.0)


def test_a_forgotten_vector_leaves_no_row_and_no_room_behind() -> None:
    held = tables(num_slots=64)
    fresh = (len(held._free_frames), {name: len(pool.free) for name, pool in held._pools.items()})
    held.acquire(ROWS)
    held.forget(VECTORS[0].digest)
    assert held.num_used == 3  # the rows of the others
    check(held, held.acquire(ROWS[2:]))
    assert held.num_uploads == len(ROWS)
    for one in VECTORS:
        held.forget(one.digest)
    assert held.num_used == 0
    assert (len(held._free_frames), {name: len(pool.free) for name, pool in held._pools.items()}) == fresh
    check(held, held.acquire(ROWS))


PAIR = ("resid_pre.2", "resid_post.1")


def autoencoder(num_features: int, seed: int) -> Vector:
    codes = torch.randn(num_features, 8, generator=torch.Generator().manual_seed(seed))
    return vector("sae", {"resid_post.1.encoder": codes, "resid_post.1.decoder": codes.clone()}, activation="topk", k=2)


def test_encoders_take_the_room_that_was_set_apart_and_give_it_back() -> None:
    point = HookPoint("resid_post", 1)
    held = Tables([SiteSpec(point, 0, 8)], 4, 3, CPU, BY_DIGEST.__getitem__, {point: 10})
    small, other, large = autoencoder(4, 0), autoencoder(4, 1), autoencoder(6, 2)
    assert [held.reserve(one) for one in (small, small, large)] == [None] * 3
    assert "room for 4, and the 10" in str(held.reserve(other))
    held.forget(large.digest)
    assert held.reserve(other) is None
    assert "room for 6" in str(held.reserve(large))
    held.forget(small.digest)
    held.forget(other.digest)
    assert held.reserve(large) is None and held.reserve(VECTORS[0]) is None
    bare = Tables([SiteSpec(point, 0, 8)], 4, 3, CPU, BY_DIGEST.__getitem__)
    assert "the 0 that this server set apart" in str(bare.reserve(small))
    assert bare.reserve(VECTORS[1]) is None


def test_a_stream_has_one_autoencoder_of_a_file() -> None:
    """What leaves a block enters the next: two encoders there would overwrite each other's room."""
    codes = {f"{name}.{part}": torch.randn(4, 8) for name in PAIR for part in ("encoder", "decoder")}
    vector("sae", codes, activation="relu")
    with pytest.raises(SteeringError, match="are the same stream"):
        vector("sae", codes, activation="topk", k=2)


def test_a_shared_line_is_known_by_its_numbers_and_an_own_one_by_itself() -> None:
    one = torch.randn(4096)
    other = one.clone()
    other[5] += 1
    assert Line.shared(one) == Line.shared(one.clone()) != Line.shared(other)
    assert len({Line.shared(one), Line.shared(one.clone()), Line.shared(other), Line.own(one), Line.own(one)}) == 4
    assert Line.shared(torch.zeros(3)) != Line.shared(-torch.zeros(3))


def test_what_is_kept_of_a_vector_does_not_keep_it() -> None:
    one = vector("vector", {"resid_post.1.add": torch.ones(8)})
    kept = weigh(one, Edit(one.digest, '{"scale": 2.0}', None))
    assert weigh(one, Edit(one.digest, '{"scale": 2.0}', None)) is kept
    seen = weakref.ref(one)
    del one
    assert seen() is None
