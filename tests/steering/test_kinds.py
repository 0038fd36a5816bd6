"""A steering method of any kind is its file and a line of the table: methods that nobody has heard of are served."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from catalogues import PLACES, SPARSE_SHAPE, compiled, receipt, refusal
from torch import Tensor

from whipstaff.server.api.method_table import method_table
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorFile, VectorSnapshot
from whipstaff.steering.edits import edits_of
from whipstaff.steering.fed import Fed
from whipstaff.steering.inserts import InsertParams
from whipstaff.steering.kinds.attention import ATTENTION, AttentionEdit, AttentionMethod, RowOverride
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.kinds.head import HeadMethod
from whipstaff.steering.kinds.probe import ProbeMethod
from whipstaff.steering.kinds.router import ROUTER, RouterMethod
from whipstaff.steering.kinds.rows import RowsMethod
from whipstaff.steering.method import EditParams, HookPoint, Method, Scaled, Tensors, Trial
from whipstaff.steering.methods import METHODS
from whipstaff.steering.needs import Needs
from whipstaff.steering.ops import Diagonal, EditOp, diagonal
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.routing_scheme import Routing, Scheme
from whipstaff.steering.served import AttentionAbilities, ModuleAbilities
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, packed, parse

SHAPE = SPARSE_SHAPE
SCHEME = Scheme(4, 2, "softmax", True, 1, 1, None)
ABILITIES = ModuleAbilities(AttentionAbilities([0, 1], bias=[0], lacking={2: "it has none"}), {1: SCHEME})


class Nudge(ScaledMethod[Scaled]):
    name, paper, params, sites, where = "nudge", "none", Scaled, ("mlp_out",), "all"
    parts: ClassVar = {"push": ("width",)}

    def edits(self, tensors: Tensors, params: Scaled, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return (diagonal(params.scale, tensors["push"]),)


class Gauge(ProbeMethod[EditParams]):
    name, paper, params, sites, where = "gauge", "none", EditParams, ("resid_post",), "all"
    off: ClassVar = {}
    parts: ClassVar = {"direction": ("width",)}


class LayerParams(EditParams):
    layer: int = 0


class Stare(AttentionMethod[LayerParams]):
    """Head 0 looks at the prompt's last token."""

    name, paper, params, sites, where = "stare", "none", LayerParams, (), "last_prompt"
    off: ClassVar = {}
    parts: ClassVar = {}
    needs_file, is_relative = False, True

    def asked_layers(self, params: LayerParams, tensors: Mapping[HookPoint, Tensors]) -> Mapping[int, str]:
        return {params.layer: "layer"}

    def attention_edits(
        self, params: LayerParams, tensors: Mapping[HookPoint, Tensors], prompt_len: int
    ) -> Iterator[AttentionEdit]:
        yield RowOverride(params.layer, 0, (prompt_len - 1,), (1.0,))

    def trials(self, abilities: ModuleAbilities) -> Iterator[Trial]:
        yield Trial("staring", {"layer": 1})


class Shun(RouterMethod[LayerParams]):
    """Expert 0 of a layer is never selected."""

    name, paper, params, sites, where = "shun", "none", LayerParams, ("router",), "all"
    off: ClassVar = {}
    parts: ClassVar = {}
    needs_file = False

    def routing(self, params: LayerParams, tensors: Mapping[HookPoint, Tensors]) -> Mapping[int, Routing]:
        return {params.layer: Routing("pre", (0,), ())}


class Preface(RowsMethod[InsertParams]):
    name, paper, params = "preface", "none", InsertParams
    off: ClassVar = {}


class Verdict(HeadMethod[EditParams]):
    name, paper, params, sites, where = "verdict", "none", EditParams, (), "all"
    off: ClassVar = {}
    parts: ClassVar = {"weight": ("hidden",)}


NEW: list[Method[Any]] = [Nudge(), Gauge(), Stare(), Shun(), Preface(), Verdict()]
NUMBERS: dict[str, dict[str, Tensor]] = {
    "nudge": {"mlp_out.2.push": torch.ones(8)},
    "gauge": {"resid_post.0.direction": torch.ones(8)},
    "preface": {"rows": torch.ones(3, 8)},
    "verdict": {"weight": torch.ones(8)},
}


@pytest.fixture
def caps(monkeypatch: pytest.MonkeyPatch) -> Capabilities:
    """A server that was started with a file of each new method that takes one."""
    for method in NEW:
        monkeypatch.setitem(METHODS, method.name, method)
    vectors = {name: parse(packed(Header(method=name, model=SHAPE), numbers)) for name, numbers in NUMBERS.items()}
    files = {name: VectorFile(Path(name), vector) for name, vector in vectors.items()}
    return Capabilities(
        VectorSnapshot(files, SHAPE),
        {},
        None,
        512,
        num_layers=4,
        hook_points=PLACES | {HookPoint("router", layer) for layer in range(4)},
        attention=ABILITIES.attention,
        routing=ABILITIES.routing,
    )


def planned(caps: Capabilities, entry: dict[str, Any]) -> SteeringPlan:
    """The plan of one entry, as a worker gets it."""
    plan = compiled(caps, steering=entry).plan.steering
    assert plan is not None
    return SteeringPlan.from_wire(plan.to_wire())


def test_a_method_that_edits(caps: Capabilities) -> None:
    entry = {"vector": "nudge", "scale": 2, "when": {"probe": "gauge", "above": 0.5}}
    (one,) = planned(caps, entry).edits
    ((point, (op,)),) = edits_of(caps.registry.usable("nudge", ""), one.edit).items()
    assert isinstance(op, Diagonal)
    assert point == HookPoint("mlp_out", 2) and op.add is not None and op.add.tolist() == [2.0] * 8
    said = receipt(caps, entry, [Fed(3, 5, [])])
    assert (said["method"], said["scale"], said["edited_tokens"]) == ("nudge", 2.0, 3)
    assert compiled(caps, steering={"vector": "nudge", "scale": 0}).steering.entries == []
    assert "edits nothing" in refusal(caps, steering={"vector": "gauge"}).message


def test_a_method_of_attention(caps: Capabilities) -> None:
    entry = {"method": "stare", "layer": 1}
    (one,) = planned(caps, entry).module_edits
    vector = caps.registry.without_file["stare"]
    assert [*ATTENTION.edits(vector, one.edit, 9)] == [RowOverride(1, 0, (8,), (1.0,))]
    assert receipt(caps, entry, [Fed(3, 5, [])]).items() >= {"layer": 1, "edited_tokens": 1}.items()
    error = refusal(caps, steering={"method": "stare", "layer": 2})
    assert (error.param, "it has none" in error.message) == ("steering.layer", True)
    assert [*vector.method.trials(ABILITIES)] == [("staring", {"layer": 1})]
    assert Needs.of([vector]).attention


def test_a_method_of_routers(caps: Capabilities) -> None:
    entry = {"method": "shun", "layer": 1}
    (one,) = planned(caps, entry).module_edits
    assert ROUTER.routing(caps.registry.without_file["shun"], one.edit) == {1: Routing("pre", (0,), ())}
    assert receipt(caps, entry, [Fed(3, 5, [])]).items() >= {"layer": 1, "edited_tokens": 5}.items()
    assert refusal(caps, steering={"method": "shun", "layer": 0}).param == "steering.experts"
    three = [{"method": "shun", "layer": 1}, {"method": "mote", "experts": {"1": {"off": [1, 2]}}}]
    assert "fewer than 2 experts" in refusal(caps, steering=three).message  # both kinds of entry together


def test_a_method_of_rows(caps: Capabilities) -> None:
    (entry,) = compiled(caps, steering={"vector": "preface", "insert": 2, "tokens": 2}).steering.entries
    assert entry.soft is not None and (entry.soft.num, entry.soft.params.insert) == (2, 2)
    said = receipt(caps, {"vector": "preface", "insert": 2, "tokens": 2})
    assert (said["method"], said["prompt_tokens"]) == ("preface", 2)
    assert refusal(caps, steering={"vector": "preface", "where": "all"}).param == "steering.where"


def test_a_learned_head(caps: Capabilities) -> None:
    assert "methods of `decoding` read it" in refusal(caps, steering={"vector": "verdict"}).message
    assert not Needs.of([caps.registry.usable("verdict", "")]).sites


def test_the_table_has_them(caps: Capabilities) -> None:
    rows = {row["name"]: row for row in method_table(caps, "base")}
    assert rows.keys() & {method.name for method in NEW} == {"nudge", "gauge", "stare", "shun", "preface"}
    assert all(rows[name]["available"] for name in ("nudge", "gauge", "stare", "shun", "preface"))
    assert "when" in rows["nudge"]["schema"]["properties"] and "when" not in rows["stare"]["schema"]["properties"]
