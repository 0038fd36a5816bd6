"""Slot tables: what a slot holds is what its row's edits do, and slots are reused without a trace."""

import pytest
import torch
from safetensors.torch import save

from whipstaff.steering.artifacts import SITES, Header, ModelShape, Site, Vector, parse
from whipstaff.steering.plan import Row, RowEdit
from whipstaff.steering.slots import SiteSpec, SlotTables

SHAPE = ModelShape(architecture="Test", hidden_size=6, num_layers=4, num_heads=2, head_dim=4)
CPU = torch.device("cpu")


def vector(seed: int, names: list[str]) -> Vector:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"resid_post": (6,), "attn_head": (2, 4)}
    tensors = {name: torch.randn(sizes[name.split(".")[0]], generator=generator) for name in names}
    return parse(save(tensors, {"whipstaff": Header(method="test", model=SHAPE).model_dump_json()}))


VECTORS = [
    vector(0, [f"resid_post.{layer}.{part}" for layer in range(4) for part in ("add", "gain")]),
    vector(1, ["resid_post.2.add", "attn_head.0.gain", "attn_head.3.add", "attn_head.3.gain"]),
    vector(2, [f"attn_head.{layer}.add" for layer in (1, 2)]),
]
BY_DIGEST = {one.digest: one for one in VECTORS}
ROWS: list[Row] = [
    (RowEdit(VECTORS[0].digest, 1.5, None),),
    (RowEdit(VECTORS[0].digest, 1.5, (1, 3)), RowEdit(VECTORS[1].digest, -2.0, None)),
    (RowEdit(VECTORS[1].digest, -2.0, None), RowEdit(VECTORS[0].digest, 1.5, (1, 3))),
    (RowEdit(VECTORS[2].digest, 0.5, (2,)),),
    (RowEdit(VECTORS[0].digest, 0.0, None), RowEdit(VECTORS[2].digest, 1.0, None)),
]


def tables(num_slots: int, ranks: int = 1, rank: int = 0) -> SlotTables:
    heads = 8 // ranks
    specs = [SiteSpec("resid_post", layer, 6, 0, 6) for layer in range(4)]
    specs += [SiteSpec("attn_head", layer, 8, rank * heads, heads) for layer in range(4)]
    return SlotTables(specs, num_slots, CPU, BY_DIGEST.__getitem__)


def by_hand(row: Row, site: Site, layer: int, x: torch.Tensor) -> torch.Tensor:
    """The edits of a row one after the other, as their definition says."""
    for edit in row:
        parts = BY_DIGEST[edit.digest].tensors.get((site, layer))
        if parts and (edit.layers is None or layer in edit.layers):
            x = x + edit.scale * (parts.get("gain", 0.0) * x + parts.get("add", 0.0))
    return x


def check(held: SlotTables, slots: dict[Row, int]) -> None:
    for row, slot in slots.items():
        for site in SITES:
            x = torch.linspace(-2, 2, SHAPE.width(site))
            for layer in range(4):
                mul, add = held.at(site, layer)
                torch.testing.assert_close(x * mul[slot] + add[slot], by_hand(row, site, layer, x))


def test_a_slot_does_what_its_edits_do_one_after_the_other() -> None:
    held = tables(num_slots=8)
    check(held, held.acquire(ROWS))


def test_slots_are_reused_without_a_trace() -> None:
    """Two slots for five rows, in changing company: what was in a slot before never shows."""
    held = tables(num_slots=2)
    for first in range(40):
        wanted = [ROWS[(first * 3) % 5], ROWS[(first * 2 + 1) % 5]]
        slots = held.acquire(wanted)
        assert len(set(slots.values())) == len(set(wanted))
        check(held, slots)
    assert held.num_used == 2


def test_rows_in_use_stay_and_known_rows_are_not_written_again() -> None:
    held = tables(num_slots=3)
    slots = held.acquire(ROWS[:2])
    assert held.num_uploads == 2
    assert held.acquire(ROWS[:3]) | slots == held.acquire(ROWS[:3])
    assert held.num_uploads == 3
    assert held.acquire([ROWS[0], ROWS[3]])[ROWS[0]] == slots[ROWS[0]]  # row 1 was the least recently used


def test_more_rows_in_one_step_than_slots_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="more steering rows than there are slots"):
        tables(num_slots=2).acquire(ROWS[:3])


def test_each_rank_of_a_tensor_parallel_model_holds_its_heads() -> None:
    whole = tables(num_slots=4)
    parts = [tables(num_slots=4, ranks=2, rank=rank) for rank in range(2)]
    slot = whole.acquire([ROWS[1]])[ROWS[1]]
    for layer in range(4):
        for which in range(2):
            pieces = [part.at("attn_head", layer)[which][part.acquire([ROWS[1]])[ROWS[1]]] for part in parts]
            assert torch.equal(torch.cat(pieces), whole.at("attn_head", layer)[which][slot])
