"""Every steering method reproduces the published interventions, is exactly off when off, and names what is wrong."""

import importlib
import math
import pkgutil
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import goldens
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from reference import ops as reference
from safetensors.torch import load_file, save
from soak import tries
from torch import Tensor
from transformers import AutoModelForCausalLM

from whipstaff import cuda_ext
from whipstaff.steering import methods
from whipstaff.steering.edits import weigh
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import EDITS
from whipstaff.steering.method import HookPoint, Method, Scaled
from whipstaff.steering.methods import METHODS
from whipstaff.steering.methods.reft import where_of
from whipstaff.steering.ops import diagonal
from whipstaff.steering.plan import Capture, Edit, EditSet, ProbeRead, StreamCopy, num_slots
from whipstaff.steering.programs import OPEN, Gate, Line, Step, assemble, lines_of
from whipstaff.steering.routing_scheme import Routing
from whipstaff.steering.shape import SITES, ModelShape
from whipstaff.steering.tables import SiteSpec, Tables
from whipstaff.steering.vector_file import Header, Vector, packed, parse
from whipstaff.steering.where import Where

MODELS = ("gemma2_a", "gpt2_a", "llama_a", "mixtral_a", "qwen2_a")
CASES = [case for model in MODELS for case in goldens.cases(model)]
OTHERS = [case for model in MODELS for case in goldens.others(model)]
TOLERANCE = 2e-4  # logits, float32 model against float64 references (the goldens' README)
ENTRY_FIELDS = {"renorm"}  # of a request's entry, not of a method
CPU = torch.device("cpu")
SHAPE = ModelShape(
    architecture="Toy", hidden_size=16, num_layers=3, num_heads=2, head_dim=8, num_kv_heads=1, num_experts=4
)


def file_of(method: str, tensors: Mapping[str, Tensor], shape: ModelShape = SHAPE) -> Vector:
    """What the server would load."""
    header = Header(method=method, model=shape)
    return parse(save(dict(tensors), metadata={"whipstaff": header.model_dump_json()}))


def ops_of(vector: Vector, **said: Any) -> dict[HookPoint, Any]:
    """The edits of a request that says this, at every place, whatever the token."""
    method: Any = vector.method
    params = method.params.model_validate(said)
    method.check_params(params, vector.tensors)
    method.check_model(params, vector.header.model)
    edits = [each for each, _ in method.spread(params, vector.tensors, Where.of(method.where))]
    return {
        point: [op for each in edits for op in method.ops(tensors, each, point, vector.header.model)]
        for point, tensors in vector.tensors.items()
    }


def only(found: Mapping[HookPoint, Any]) -> Any:
    """The one op of the one place."""
    ((op,),) = found.values()
    return op


def run(found: Mapping[HookPoint, Any], x: Tensor, **kwargs: Any) -> Tensor:
    """What the ops of the one place do to a row."""
    ((ops),) = found.values()
    return reference.edited(x.double(), ops, **kwargs)


def edits_of(piece: goldens.Piece, shape: ModelShape) -> Iterator[reference.Edit]:
    """A golden's piece as the reference's edits."""
    vector = file_of(piece.method, piece.tensors, shape)
    method: Any = vector.method
    params = method.params.model_validate({k: v for k, v in piece.params.items() if k not in ENTRY_FIELDS})
    method.check_params(params, vector.tensors)
    where = piece.where or Where.of(method.where)
    for each, its_where in method.spread(params, vector.tensors, where):
        for point, tensors in vector.tensors.items():

            def touches(position: int, prompt_len: int, its_where: Where = its_where) -> bool:
                spans = its_where.intervals(prompt_len)
                return any(start <= position and (end is None or position < end) for start, end in spans)

            ops = method.ops(tensors, each, point, shape)
            yield reference.Edit(point.site, point.layer, ops, touches, piece.params.get("renorm", False))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {
        name: AutoModelForCausalLM.from_pretrained(
            goldens.ROOT / "models" / name, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for name in MODELS
    }


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_goldens(case: goldens.Case, models: dict[str, Any]) -> None:
    shape = goldens.shape_of(case.model)
    edits = [edit for piece in case.pieces for edit in edits_of(piece, shape)]
    prompt = case.io["input_ids"].tolist()
    got = reference.logits(models[case.model], prompt, len(prompt), edits)
    assert (got.double() - case.io["logits_f64"]).abs().max() < TOLERANCE
    if "greedy_ids_f64" in case.io:
        tokens, rows = reference.greedy(models[case.model], prompt, len(case.io["greedy_ids_f64"]), edits)
        assert tokens == case.io["greedy_ids_f64"].tolist()
        assert (rows.double() - case.io["step_logits_f64"]).abs().max() < TOLERANCE


@pytest.mark.parametrize("case", OTHERS, ids=lambda case: case.name)
def test_what_the_engine_serves_otherwise_makes_no_edits(case: goldens.Case) -> None:
    shape = goldens.shape_of(case.model)
    for piece in case.pieces:
        method: Any = METHODS[piece.method]
        params = method.params.model_validate(piece.params)
        method.check_model(params, shape)
        if piece.tensors:
            vector = file_of(piece.method, piece.tensors, shape)
            method.check_params(params, vector.tensors)
            assert not any(method.ops(tensors, params, point, shape) for point, tensors in vector.tensors.items())


def test_the_table_is_complete() -> None:
    found = set()
    for module in pkgutil.iter_modules(methods.__path__):
        its = importlib.import_module(f"{methods.__name__}.{module.name}")
        found |= {c for c in vars(its).values() if isinstance(c, type) and issubclass(c, Method) and hasattr(c, "name")}
    assert {type(method) for method in METHODS.values()} == found
    assert all(name == method.name for name, method in METHODS.items())


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_every_method_says_what_it_is(method: Method[Any]) -> None:
    assert method.paper and method.where in ("all", "prompt", "generation", "last_prompt", "each_last")
    assert set(method.sites) <= set(SITES)
    properties = method.params.model_json_schema()["properties"] if method.params.model_fields else {}
    assert all("description" in said for said in properties.values())
    assert all(isinstance(symbol, str) for shape in method.parts.values() for symbol in shape)
    assert not set(properties) & {"vector", "layers", "where", "when", "schedule", "normalize", "renorm"}
    if method.off:
        method.params.model_validate(method.off)
    assert bool(method.off) == (issubclass(method.params, Scaled) or method.name == "pasta")
    assert all(point in method.hook_points(SHAPE) and point.site in method.sites for point in method.hook_points(SHAPE))


def test_the_reference_reaches_every_site(models: dict[str, Any]) -> None:
    """An edit shows in the logits from its first token on; what leaves a block enters the next one."""
    for name, model in models.items():
        shape, prompt = goldens.shape_of(name), list(range(3, 15))
        plain = reference.logits(model, prompt, len(prompt), [])
        pushed: dict[tuple[str, int], Tensor] = {}
        for site, layer in [(site, 1) for site in SITES if site != "router" or shape.num_experts] + [("resid_pre", 2)]:
            push = 2.0 * torch.linspace(-1, 1, shape.width(site))
            edit = reference.Edit(site, layer, [diagonal(1.0, push)], lambda position, _: position >= 5)
            pushed[site, layer] = reference.logits(model, prompt, len(prompt), [edit])
            change = (pushed[site, layer] - plain).abs().amax(1)
            assert change[:5].max() < 1e-4 and change[5] > 1e-3, f"{name} {site}"
        torch.testing.assert_close(pushed["resid_post", 1], pushed["resid_pre", 2], rtol=0, atol=1e-4)


# A file, a request and the op that together show what each method does, on a row of 16 numbers.
ROW = torch.linspace(-1.5, 2.0, 16)
GENERATOR = torch.Generator().manual_seed(3)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def orthonormal(rank: int, width: int = 16) -> Tensor:
    return torch.linalg.qr(numbers(width, rank))[0].T.contiguous()


EXAMPLES: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
    "vector": ({"mlp_in.1.add": numbers(16), "mlp_in.1.gain": numbers(16)}, {}),
    "caa": ({"resid_post.1.add": numbers(16)}, {}),
    "actadd": ({"resid_pre.1.rows": numbers(1, 16)}, {}),
    "repe": ({"resid_post.1.add": numbers(16)}, {"operator": "piecewise_linear"}),
    "control_vector": ({"resid_post.1.add": numbers(16)}, {}),
    "shift_vector": ({"resid_post.1.add": numbers(16)}, {}),
    "function_vector": ({"resid_post.1.add": numbers(16)}, {}),
    "task_vector": ({"resid_post.1.state": numbers(16)}, {}),
    "iti": ({"attn_head.1.direction": numbers(2, 8), "attn_head.1.sigma": torch.tensor([2.0, 0.0])}, {}),
    "lofit": ({"attn_head.1.A": numbers(2, 8), "attn_head.1.v": numbers(2, 8)}, {}),
    "site": ({"attn_head.1.task": numbers(2, 8), "attn_head.1.alpha": torch.tensor([1.0, 0.25])}, {}),
    "defer_head": ({"weight": numbers(16), "bias": torch.tensor(0.5)}, {}),
    "temperature_head": (
        {
            **{"temperatures": torch.tensor([0.0, 0.5, 1.0]), "w0": numbers(5, 16), "b0": numbers(5)},
            **{"w1": numbers(5, 5), "b1": numbers(5), "w2": numbers(3, 5), "b2": numbers(3)},
        },
        {},
    ),
    "token_classifier": ({"weight": numbers(30, 16)}, {}),
    "prefix_classifier": ({"weight": numbers(2, 16), "bias": numbers(2)}, {}),
    "adapter_centres": ({"centres": numbers(2, 9)}, {"adapters": ["law", "math"]}),
    "head_scale": ({"attn_head.1.scale": torch.tensor([0.0, 2.0])}, {}),
    "tarot": ({"attn_head.1.angles": numbers(2, 7)}, {}),
    "directional_ablation": ({"mlp_out.1.direction": numbers(16)}, {}),
    "add_direction": ({"resid_pre.1.direction": numbers(16)}, {}),
    "directional_patch": ({"resid_pre.1.direction": numbers(16)}, {"value": 2.5}),
    "context_knob": ({"resid_post.1.basis": orthonormal(3)}, {"value": [1.0, -2.0, 3.0]}),
    "angular": (
        {"attn_in.1.first_direction": numbers(16), "attn_in.1.second_direction": numbers(16)},
        {"angle": 130.0},
    ),
    "loreft": (
        {"resid_post.1.weight": numbers(2, 16), "resid_post.1.bias": numbers(2), "resid_post.1.rotate": orthonormal(2)},
        {"activation": "silu"},
    ),
    "noreft": (
        {"resid_post.1.weight": numbers(2, 16), "resid_post.1.bias": numbers(2), "resid_post.1.project": numbers(2, 16)}
        | {"resid_post.1.project_bias": numbers(2)},
        {"activation": "relu"},
    ),
    "consreft": ({"resid_post.1.bias": numbers(2), "resid_post.1.rotate": orthonormal(2)}, {}),
    "lobireft": ({"resid_post.1.bias": numbers(2), "resid_post.1.rotate": orthonormal(2)}, {}),
    "direft": (
        {"resid_post.1.weight": numbers(2, 16), "resid_post.1.bias": numbers(2), "resid_post.1.rotate": orthonormal(2)},
        {"activation": "tanh"},
    ),
    "nodireft": (
        {
            "resid_post.1.weight": numbers(2, 16),
            "resid_post.1.bias": numbers(2),
            "resid_post.1.project": numbers(2, 16),
        },
        {},
    ),
    "sae": (
        {f"resid_post.1.{part}": numbers(*shape) for part, shape in {"encoder": (6, 16), "decoder": (6, 16)}.items()}
        | {"resid_post.1.encoder_bias": numbers(6), "resid_post.1.decoder_bias": numbers(16)},
        {"features": [{"feature": 4, "set": 2.0}, {"feature": 1, "scale": 0.0}]},
    ),
    "lf_steering": (
        {"resid_post.1.encoder": numbers(6, 16), "resid_post.1.decoder": numbers(6, 16)},
        {"features": [0, 1, 2, 3, 4, 5], "k": 3},
    ),
    "mote": ({"router.1.off": torch.tensor([1.0, 0, 0, 0])}, {}),
    "probe": ({"resid_post.1.direction": numbers(16), "resid_post.1.bias": torch.tensor(0.5)}, {}),
    "soft_prompt": ({"rows": numbers(3, 16)}, {}),
    "prefix_kv": (
        {f"attn_head.{layer}.{part}": numbers(4, 1, 8) for layer in range(3) for part in ("key", "value")},
        {},
    ),
    "side_attention": (
        {"tokens": numbers(3, 16), "attn_head.1.gate": numbers(2), "attn_head.2.gate": numbers(1)},
        {},
    ),
    "attention_override": ({}, {"edits": [{"layer": 1, "head": 0, "keys": [3, -1], "weights": [0.25, 0.75]}]}),
    "pasta": ({}, {"heads": {"1": [0, 1]}, "spans": [[2, 5], [-3, None]]}),
}
EDITORS = {
    name: example for name, example in EXAMPLES.items() if METHODS[name].off and name not in ("side_attention", "pasta")
}


def test_every_method_has_an_example() -> None:
    assert set(EXAMPLES) == set(METHODS)


@pytest.mark.parametrize("name", EXAMPLES)
def test_parameters_survive_json(name: str) -> None:
    params = METHODS[name].params.model_validate(EXAMPLES[name][1])
    assert METHODS[name].params.model_validate_json(params.model_dump_json()) == params


@pytest.mark.parametrize("name", EDITORS)
def test_off_makes_no_edit(name: str) -> None:
    tensors, said = EDITORS[name]
    assert any(ops_of(file_of(name, tensors), **said).values())
    for strength in (0, 0.0, -0.0):
        off = {**said, **METHODS[name].off, "scale": strength}
        assert not any(ops_of(file_of(name, tensors), **off).values())
    assert not any(ops_of(file_of(name, tensors), **METHODS[name].off).values())


def test_off_leaves_logits_alone(models: dict[str, Any]) -> None:
    """Through the same hooks, with every edited case's own file."""
    for case in CASES:
        shape, prompt = goldens.shape_of(case.model), case.io["input_ids"].tolist()
        pieces = [
            piece._replace(params={**piece.params, **METHODS[piece.method].off})
            for piece in case.pieces
            if METHODS[piece.method].off
        ]
        edits = [edit for piece in pieces for edit in edits_of(piece, shape)]
        plain = reference.logits(models[case.model], prompt, len(prompt), [])
        assert torch.equal(reference.logits(models[case.model], prompt, len(prompt), edits), plain)


@pytest.mark.parametrize("name", [name for name in EDITORS if issubclass(METHODS[name].params, Scaled)])
def test_strength_is_how_far_to_go(name: str) -> None:
    """Every edit but TaRot's rotation and the signed ones is linear in its strength."""
    tensors, said = EDITORS[name]
    vector = file_of(name, tensors)
    point = next(iter(vector.tensors))
    x = numbers(SHAPE.width(point.site)).double()
    changes = [reference.edited(x, ops_of(vector, **said, scale=s)[point]) - x for s in (0.5, 1.0)]
    if name != "tarot":
        torch.testing.assert_close(2 * changes[0], changes[1], rtol=1e-5, atol=1e-5)
    assert changes[1].norm() > 0.05


def test_rows_of_one_file_share_their_numbers() -> None:
    """The engine keeps the numbers of places without parts of their own once."""

    def num_lines(ops: Mapping[HookPoint, Any]) -> int:
        return len(lines_of({point: assemble([], [Step(tuple(found))]) for point, found in ops.items()})["hidden"])

    ablation = ops_of(file_of("directional_ablation", {"direction": numbers(16)}))
    assert len(ablation) == 3 * SHAPE.num_layers and num_lines(ablation) == 1
    directions = {"first_direction": numbers(16), "second_direction": numbers(16)}
    angular = ops_of(file_of("angular", directions), angle=90)
    assert HookPoint("attn_in", 0) not in angular and len(angular) == 2 * SHAPE.num_layers - 1
    assert num_lines(angular) == 2


def test_iti_normalises_its_directions_and_leaves_other_heads() -> None:
    direction = numbers(2, 8)
    file = file_of("iti", {"attn_head.1.direction": direction, "attn_head.1.sigma": torch.tensor([0.5, 0.0])})
    op = only(ops_of(file))
    torch.testing.assert_close(op.add.view(2, 8)[0], 15 * 0.5 * direction[0] / direction[0].norm())
    assert op.mul is None and not op.add.view(2, 8)[1].any()


def test_actadd_has_a_position_for_every_row() -> None:
    vector = file_of("actadd", {"resid_pre.1.rows": numbers(3, 16)})
    method: Any = vector.method

    def windows(**said: Any) -> list[Any]:
        params = method.params.model_validate(said)
        method.check_params(params, vector.tensors)
        return [(p.row, w.prompt) for p, w in method.spread(params, vector.tensors, Where.of("prompt"))]

    assert windows() == [(0, [(0, 1)]), (1, [(1, 2)]), (2, [(2, 3)])]
    assert windows(location="back") == [(0, [(-3, -2)]), (1, [(-2, -1)]), (2, [(-1, None)])]
    assert windows(location=7, row=1) == [(1, [(8, 9)])]
    spread = method.spread(method.params.model_validate({"location": "mid"}), vector.tensors, Where.of("prompt"))
    clauses = [where for _, where in spread]
    for prompt_len in range(3, 12):  # the release's rule
        start = prompt_len // 2 - 3 // 2
        assert [where.intervals(prompt_len) for where in clauses] == [[(start + n, start + n + 1)] for n in range(3)]
    with pytest.raises(SteeringError):
        for where in clauses:
            where.check(prompt_len=2, max_tokens=4)
    last = Where(prompt=windows()[-1][1])
    with pytest.raises(SteeringError):  # a prompt of two tokens has none for the third row
        last.check(prompt_len=2, max_tokens=4)
    with pytest.raises(SteeringError) as found:
        list(method.spread(method.params(), vector.tensors, Where.of("all")))
    assert found.value.param == "where"


def test_task_vector_and_head_patch_replace_exactly() -> None:
    state, mean = numbers(16), numbers(2, 8)
    torch.testing.assert_close(
        run(ops_of(file_of("task_vector", {"resid_post.0.state": state})), ROW), state.double(), rtol=0, atol=0
    )
    file = file_of("head_scale", {"attn_head.0.mean": mean, "attn_head.0.mean_mask": torch.tensor([0.0, 1.0])})
    got = run(ops_of(file), ROW)
    assert torch.equal(got, torch.cat([ROW[:8], mean[1]]).double())


def test_repe_pushes_along_the_side_a_row_is_on() -> None:
    add = numbers(16)
    file = file_of("repe", {"resid_post.0.add": add})
    for row, sign in ((add, 1), (-add, -1)):
        for scale in (3.0, -3.0):
            got = run(ops_of(file, operator="piecewise_linear", scale=scale), row)
            torch.testing.assert_close(got, (row + 3.0 * sign * add).double())
    kept = run(ops_of(file, scale=2.0), ROW, renorm=True)
    torch.testing.assert_close(kept.norm(), ROW.double().norm())


def test_projections_set_the_component() -> None:
    direction = 7 * numbers(16)
    unit = (direction / direction.norm()).double()
    for name, said, value in (("directional_ablation", {}, 0.0), ("directional_patch", {"value": 2.5}, 2.5)):
        got = run(ops_of(file_of(name, {"resid_pre.0.direction": direction}), **said), ROW)
        torch.testing.assert_close(got, ROW + (value - unit @ ROW.double()) * unit, rtol=1e-5, atol=1e-6)
    basis = 3 * orthonormal(2)
    got = run(ops_of(file_of("context_knob", {"resid_post.0.basis": basis}), value=[4.0, -1.0]), ROW)
    torch.testing.assert_close(basis.double() @ got / 3, torch.tensor([4.0, -1.0]).double(), rtol=1e-5, atol=1e-5)


def test_angular_turns_to_the_angle_and_adaptive_only_what_leans() -> None:
    first, second = torch.eye(16)[0] * 4, torch.eye(16)[0] + torch.eye(16)[1]
    file = file_of("angular", {"mlp_in.0.first_direction": first, "mlp_in.0.second_direction": second})
    got = run(ops_of(file, angle=90.0), ROW)
    length = ROW[:2].norm().double()
    torch.testing.assert_close(got[:2], torch.stack([0 * length, length]), rtol=1e-6, atol=1e-6)
    assert torch.equal(got[2:], ROW[2:].double())
    assert torch.equal(run(ops_of(file, angle=90.0, adaptive=True), ROW), ROW.double())  # ROW[0] < 0
    assert not torch.equal(run(ops_of(file, angle=90.0, adaptive=True), -ROW), -ROW.double())


ACTS = {"linear": lambda z: z, "relu": torch.relu, "tanh": torch.tanh, "silu": torch.nn.functional.silu}


@pytest.mark.parametrize("activation", ACTS)
def test_reft_formulas(activation: str) -> None:
    rotate, weight, project = orthonormal(3), numbers(3, 16), numbers(3, 16)
    bias, project_bias, h = numbers(3), numbers(3), ROW
    acted = ACTS[activation](weight @ h + bias)
    wanted = {
        "loreft": h + rotate.T @ (acted - rotate @ h),
        "noreft": h + project.T @ (acted - (project @ h + project_bias)),
        "consreft": h + rotate.T @ (bias - rotate @ h),
        "lobireft": h + rotate.T @ bias,
        "direft": h + rotate.T @ acted,
        "nodireft": h + project.T @ acted,
    }
    parts = {"weight": weight, "bias": bias, "rotate": rotate, "project": project, "project_bias": project_bias}
    for name, result in wanted.items():
        own = {f"resid_post.0.{said.rstrip('?')}": parts[said.rstrip("?")] for said in METHODS[name].parts}
        said = {"activation": activation} if "activation" in METHODS[name].params.model_fields else {}
        got = run(ops_of(file_of(name, own), **said), h)
        torch.testing.assert_close(got, result.double(), rtol=1e-4, atol=1e-5)


def test_reft_clauses() -> None:
    assert where_of("f3+l2") == Where(prompt=[(0, 3), (-2, None)])
    assert where_of("l1") == where_of("f0+l1") == Where(prompt=[(-1, None)])
    for bad in ("", "f0+l0", "last", "l1+f1"):
        with pytest.raises(SteeringError):
            where_of(bad)


@pytest.mark.parametrize("kind", ["rotary", "givens"])
def test_tarot_is_the_release_matrix(kind: str) -> None:
    """Against the golden's own matrices: z' = z M for every head."""
    case = {"rotary": "tarot_rotary_llama", "givens": "tarot_givens_qwen2"}[kind]
    params = load_file(goldens.ROOT / "cases" / case / "params.safetensors")
    shape = goldens.shape_of(case.rsplit("_", 1)[1] + "_a")
    z = numbers(4 * 32).double()
    got = run(ops_of(file_of("tarot", {"attn_head.0.angles": params["angles"][0]}, shape)), z)
    wanted = torch.einsum("hi,hij->hj", z.view(4, 32), params["matrices"][0].double()).flatten()
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.norm(), z.norm(), rtol=1e-6, atol=0)


def test_tarot_turns_whole_mlp_outputs_too() -> None:
    turned = run(ops_of(file_of("tarot", {"mlp_out.0.angles": torch.full((1, 8), torch.pi / 2)})), ROW)
    wanted = torch.stack([ROW[1::2], -ROW[::2]], 1).flatten()
    torch.testing.assert_close(turned, wanted.double(), rtol=0, atol=1e-6)
    assert len(ops_of(file_of("tarot", {"mlp_out.0.angles": numbers(1, 15)}))[HookPoint("mlp_out", 0)]) == 4
    scaled = run(ops_of(file_of("tarot", {"attn_head.0.scale": torch.tensor([0.5, 3.0])}), scale=2.0), ROW)
    torch.testing.assert_close(scaled, torch.cat([0 * ROW[:8], 5 * ROW[8:]]).double())


def code_of(x: Tensor, parts: dict[str, Tensor], activation: str, k: int) -> tuple[Tensor, Tensor]:
    """Features and reconstruction of a row by the SAE's definition."""
    before = parts["encoder"] @ (x - parts["decoder_bias"]) + parts["encoder_bias"]
    if activation == "topk":
        kept = before >= before.topk(k).values[-1]
    else:
        kept = before > (parts["threshold"] if activation == "jumprelu" else 0)
    found = torch.relu(before) * kept
    return found, found @ parts["decoder"] + parts["decoder_bias"]


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("norm", ["none", "constant_norm_rescale", "layer_norm", "input_scale"])
def test_sae_edits_features_and_keeps_the_error(activation: str, norm: str) -> None:
    parts = {"encoder": numbers(12, 16), "encoder_bias": numbers(12), "decoder": numbers(12, 16)}
    parts |= {"decoder_bias": numbers(16), "threshold": torch.rand(12, generator=GENERATOR)}
    x = numbers(16)
    seen, back = x, torch.tensor(1.0)
    if norm == "constant_norm_rescale":
        seen, back = x * 4 / x.norm(), x.norm() / 4
    elif norm == "layer_norm":
        seen, back = (x - x.mean()) / (x.std() + 1e-5), x.std()
    elif norm == "input_scale":
        seen, back = 1.7 * x, torch.tensor(1 / 1.7)
    before, decoded = code_of(seen, parts, activation, k=5)
    on, off = int(before.argmax()), int((before == 0).nonzero()[0])
    is_on = before > 0
    after = before.clone()
    after[on] = 9.0
    after[off] += 3.0
    scaled, careful, set_off = [i for i in range(12) if i not in (on, off)][:3]
    after[scaled] *= -2
    after[careful] += 4.0 * is_on[careful]
    after[set_off] = 0.5
    wanted = x + back * (after @ parts["decoder"] + parts["decoder_bias"] - decoded)
    file = {f"resid_post.0.{part}": tensor for part, tensor in parts.items()}
    if norm == "input_scale":
        file["resid_post.0.input_scale"] = torch.tensor(1.7)
    edits = [
        {"feature": on, "set": 9.0},
        {"feature": off, "add": 3.0},
        {"feature": scaled, "scale": -2.0},
        {"feature": careful, "add": 4.0, "only_if_active": True},
        {"feature": set_off, "set": 0.5},
    ]
    said: dict[str, Any] = {"features": edits, "activation": activation, "k": 5 if activation == "topk" else None}
    if norm != "input_scale":
        said["normalize_activations"] = norm
    vector = file_of("sae", file)
    torch.testing.assert_close(run(ops_of(vector, **said), x), wanted.double(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(through_tables(vector, said, x[None])[0], wanted, rtol=1e-4, atol=1e-4)


NORMS = ["none", "constant_norm_rescale", "layer_norm", "input_scale"]


def decoded_after(row: Tensor, parts: dict[str, Tensor], said: dict[str, Any], norm: str) -> Tensor:
    """decode(a') of one row in float64, straight from the definition: encode all, edit, decode all."""
    x, parts = row.double(), {name: tensor.double() for name, tensor in parts.items()}
    scaled, mean, back = x, torch.tensor(0.0), torch.tensor(1.0)
    if norm == "constant_norm_rescale":
        back = x.norm() / math.sqrt(len(x))
        scaled = x / back
    elif norm == "layer_norm":
        mean, back = x.mean(), x.std()
        scaled = (x - mean) / (back + 1e-5)
    elif norm == "input_scale":
        scaled, back = parts["input_scale"] * x, 1 / parts["input_scale"]
    taken_off = parts["decoder_bias"] if said.get("apply_b_dec_to_input", True) else 0.0
    before = parts["encoder"] @ (scaled - taken_off) + parts["encoder_bias"]
    found = torch.relu(before)
    if said["activation"] == "jumprelu":
        found = found * (before > parts["threshold"])
    elif said["activation"] == "topk":
        found = found * (before >= before.topk(said["k"]).values[-1])
    after = found.clone()
    for edit in said["features"]:
        at = edit["feature"]
        if not edit.get("only_if_active") or found[at] > 0:
            after[at] = edit["set"] if "set" in edit else found[at] * edit.get("scale", 1.0) + edit.get("add", 0.0)
    return back * (after @ parts["decoder"] + parts["decoder_bias"]) + mean


def autoencoder(num_features: int, width: int = 16) -> dict[str, Tensor]:
    parts = {"encoder": numbers(num_features, width), "encoder_bias": numbers(num_features)}
    parts |= {"decoder": numbers(num_features, width) / 4, "decoder_bias": numbers(width)}
    return parts | {"threshold": torch.rand(num_features, generator=GENERATOR)}


def through_tables(vector: Vector, said: dict[str, Any], x: Tensor, gain: float = 1.0) -> Tensor:
    """The rows after an entry, by the tables that a server would hold it in and the operator that reads them."""
    method: Any = vector.method
    params = method.params.model_validate(said)
    method.check_params(params, vector.tensors)
    edit = Edit(vector.digest, params.model_dump_json(), None, gate=Gate(schedule_index=0))
    weight = weigh(vector, edit)
    edit = edit._replace(num_lines=weight.num_lines, num_instructions=weight.num_instructions)
    held = room(num_slots((edit,), SHAPE.num_layers), {vector.digest: vector})
    begin = held.acquire([(edit,)])[(edit,)]
    at = held.at(next(iter(vector.tensors)).canonical)
    encoders = at.encoders
    assert encoders is not None
    tokens = torch.tensor([[begin, position] for position in range(len(x))], dtype=torch.int32)
    edited = x.clone()
    gains, history = torch.full((len(x), 1), gain), torch.zeros(1, 1)
    tables = (at.lines, at.code, at.args, tokens, gains, history)
    cuda_ext.run_edits_(edited, *tables, None, None, encoders.weight, encoders.bias)
    return edited


@pytest.mark.parametrize("num_features", [12, 150])
@pytest.mark.parametrize("activation", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("norm", NORMS)
def test_sae_without_the_error_term_is_decoded_anew(activation: str, norm: str, num_features: int) -> None:
    parts, x = autoencoder(num_features), numbers(7, 16)
    said: dict[str, Any] = {"activation": activation, "use_error_term": False, "apply_b_dec_to_input": norm != "none"}
    if activation == "topk":
        said["k"] = num_features // 3
    if norm == "input_scale":
        parts["input_scale"] = torch.tensor(1.7)
    else:
        said["normalize_activations"] = norm
    said["features"] = [
        {"feature": 0, "set": 9.0},
        {"feature": num_features - 1, "add": 3.0},
        {"feature": 5, "scale": -2.0},
        {"feature": 7, "add": 4.0, "only_if_active": True},
        {"feature": 8, "set": 0.5, "only_if_active": True},
    ]
    vector = file_of("sae", {f"resid_post.0.{part}": tensor for part, tensor in parts.items()})
    wanted = torch.stack([decoded_after(row, parts, said, norm) for row in x])
    for scale, gain in ((1.0, 1.0), (0.5, 1.0), (-1.5, 0.3), (1.0, 0.0)):
        got = through_tables(vector, said | {"scale": scale}, x, gain)
        mixed = x.double() + gain * scale * (wanted - x.double())
        torch.testing.assert_close(got.double(), mixed, rtol=1e-4, atol=1e-4)
        by_ops = torch.stack([run(ops_of(vector, **said, scale=scale), row) for row in x])  # at a gain of 1
        torch.testing.assert_close(by_ops, x.double() + scale * (wanted - x.double()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_edits", [12, 20, 64])
def test_edits_of_many_features_read_the_same_row(num_edits: int) -> None:
    """Also where their instructions lie in several frames."""
    parts, x = autoencoder(80), numbers(3, 16)
    vector = file_of("sae", {f"resid_post.0.{part}": tensor for part, tensor in parts.items()})
    kinds: list[dict[str, Any]] = [{"add": 1.0}, {"scale": 0.0}, {"set": 0.5}]
    features = [{"feature": feature, **kinds[feature % 3]} for feature in range(num_edits)]
    said: dict[str, Any] = {"features": features, "activation": "relu"}
    back = decoded_after(x[0], parts, said | {"features": []}, "none")
    wanted = x[0] + decoded_after(x[0], parts, said, "none") - back
    torch.testing.assert_close(through_tables(vector, said, x)[0].double(), wanted, rtol=1e-4, atol=1e-4)


def test_sae_without_the_error_term_and_without_biases() -> None:
    parts = {name: autoencoder(20)[name] for name in ("encoder", "decoder")}
    vector, x = file_of("sae", {f"resid_post.0.{part}": tensor for part, tensor in parts.items()}), numbers(3, 16)
    said = {"features": [{"feature": 2, "set": 3.0}], "use_error_term": False}
    found = torch.relu(x @ parts["encoder"].T)
    found[:, 2] = 3.0
    torch.testing.assert_close(through_tables(vector, said, x), found @ parts["decoder"], rtol=1e-4, atol=1e-4)


def test_a_neutral_edit_is_off_only_with_the_error_term() -> None:
    """Decoding changes rows even where no feature is edited; a scale of 0 is off either way."""
    parts, x = autoencoder(12), numbers(3, 16)
    vector = file_of("sae", {f"resid_post.0.{part}": tensor for part, tensor in parts.items()})
    said: dict[str, Any] = {"features": [{"feature": 0, "scale": 1.0}]}
    assert torch.equal(through_tables(vector, said, x), x)
    assert (through_tables(vector, said | {"use_error_term": False}, x) - x).abs().max() > 0.1
    off = vector.method.params.model_validate(said | {"use_error_term": False, "scale": 0.0})
    assert vector.method.is_off(off)
    assert not vector.method.is_off(off.model_copy(update={"scale": 1.0}))


def test_sae_requests_share_the_encoder() -> None:
    """What TopK reads is the file's own, whichever features a request names."""
    tensors = {"resid_post.0.encoder": numbers(6, 16), "resid_post.0.decoder": numbers(6, 16)}
    vector = file_of("sae", tensors | {"resid_post.0.decoder_bias": numbers(16)})
    said: dict[str, Any] = {"activation": "topk", "k": 2}
    one, other = (only(ops_of(vector, features=[{"feature": f, "set": 1.0}], **said)) for f in (1, 2))
    point = HookPoint("resid_post", 0)
    assert one.top_k.encoder.data_ptr() == vector.tensors[point]["encoder"].data_ptr()
    assert one.top_k.bias.data_ptr() == other.top_k.bias.data_ptr()
    assert vector.method.encoder_size(vector.tensors[point], said) == 6
    assert vector.method.encoder_size(vector.tensors[point], {}) == 0
    params = vector.method.params.model_validate(said | {"features": ONE})
    vector.method.check_file(params, said)
    with pytest.raises(SteeringError) as found:  # there is no room for what the server was not told of
        vector.method.check_file(params, {})
    assert found.value.param == "activation"


def test_lf_steering_adds_to_active_features_only() -> None:
    tensors = {f"resid_post.0.{part}": numbers(6, 16) for part in ("encoder", "decoder")}
    encoder, decoder = tensors["resid_post.0.encoder"], tensors["resid_post.0.decoder"]
    got = run(ops_of(file_of("lf_steering", tensors), features=[0, 1, 2, 3], k=2, bias=0.5, scale=4.0), ROW)
    before = encoder @ ROW
    active = [f for f in before.topk(2).indices.tolist() if before[f] > 0 and f < 4]
    torch.testing.assert_close(got, (ROW + 2.0 * decoder[active].sum(0)).double(), rtol=1e-5, atol=1e-5)


def test_mote_routes_by_mode() -> None:
    mote: Any = METHODS["mote"]
    tensors = file_of(
        "mote", {"router.1.off": torch.tensor([0.0, 1, 0, 0]), "router.1.on": torch.tensor([0.0, 0, 0, 1])}
    ).tensors

    def params(**said: Any) -> Any:
        return mote.params.model_validate(said)

    assert mote.routing(params(), tensors) == {1: Routing("pre", (1,), (3,))}
    assert mote.routing(params(mode="zero", experts={"1": {"off": [2]}}), tensors) == {1: Routing("zero", (1, 2), (3,))}
    assert mote.routing(params(mode="force", experts={"0": {"on": [2]}}), {}) == {0: Routing("force", (), (2,))}
    assert mote.routing(params(experts={"0": {}}), {}) == {}
    assert mote.hook_points(SHAPE) == [HookPoint("router", layer) for layer in range(3)]
    assert mote.hook_points(SHAPE.model_copy(update={"num_experts": 0})) == []


BAD_FILES: list[tuple[str, dict[str, Tensor]]] = [
    ("vector", {"resid_post.3.add": numbers(16)}),
    ("caa", {"resid_pre.1.add": numbers(16)}),
    ("caa", {"resid_post.1.gain": numbers(16)}),
    ("actadd", {"resid_pre.1.rows": numbers(65, 16)}),
    ("iti", {"attn_head.1.direction": numbers(2, 8)}),
    ("iti", {"attn_head.1.direction": torch.zeros(2, 8), "attn_head.1.sigma": torch.ones(2)}),
    ("iti", {"attn_head.1.direction": numbers(2, 8), "attn_head.1.sigma": -torch.ones(2)}),
    ("site", {"attn_head.1.task": numbers(2, 8), "attn_head.1.alpha": torch.tensor([0.5, 1.5])}),
    ("head_scale", {"attn_head.1.mean": numbers(2, 8)}),
    ("head_scale", {"attn_head.1.mean": numbers(2, 8), "attn_head.1.mean_mask": torch.tensor([0.5, 1.0])}),
    ("tarot", {"attn_head.1.angles": numbers(2, 5)}),
    ("tarot", {"attn_head.1.angles": numbers(1, 4)}),
    ("tarot", {"attn_head.1.angles": numbers(2, 4), "attn_head.1.scale": torch.ones(2)}),
    ("directional_ablation", {"direction": torch.zeros(16)}),
    ("probe", {"resid_post.1.direction": torch.zeros(16)}),
    ("context_knob", {"resid_post.1.basis": torch.ones(2, 16)}),
    ("context_knob", {"resid_post.1.basis": torch.zeros(1, 16)}),
    ("angular", {"first_direction": torch.ones(16), "second_direction": -2 * torch.ones(16)}),
    ("lobireft", {"resid_post.1.bias": numbers(65), "resid_post.1.rotate": numbers(65, 16)}),
    ("direft", {"resid_post.1.weight": numbers(2, 16), "resid_post.1.rotate": numbers(3, 16)}),
    ("sae", {"resid_post.1.encoder": numbers(16, 6), "resid_post.1.decoder": numbers(6, 16)}),
    ("mote", {"router.1.off": torch.tensor([2.0, 0, 0, 0])}),
    ("soft_prompt", {"resid_pre.0.rows": numbers(2, 16)}),
    ("prefix_kv", {"attn_head.0.key": numbers(2, 2, 8), "attn_head.0.value": numbers(2, 2, 8)}),
    ("side_attention", {"tokens": numbers(65, 16), "attn_head.1.gate": numbers(1)}),
    ("side_attention", {"tokens": numbers(2, 16), "attn_head.1.gate": numbers(3)}),
    ("prefix_classifier", {"weight": numbers(3, 16)}),
    ("prefix_classifier", {"weight": numbers(2, 16), "bias": numbers(1)}),
]


@pytest.mark.parametrize(("name", "tensors"), BAD_FILES, ids=lambda value: value if isinstance(value, str) else "")
def test_bad_files_are_refused(name: str, tensors: dict[str, Tensor]) -> None:
    with pytest.raises(SteeringError):
        file_of(name, tensors)


def test_givens_rotations_need_a_power_of_two() -> None:
    shape = SHAPE.model_copy(update={"head_dim": 6, "hidden_size": 12})
    file_of("tarot", {"attn_head.0.angles": numbers(2, 3)}, shape)
    with pytest.raises(SteeringError, match="power of two"):
        file_of("tarot", {"attn_head.0.angles": numbers(2, 5)}, shape)


SAE_FILE = {"resid_post.1.encoder": numbers(6, 16), "resid_post.1.decoder": numbers(6, 16)}
ONE = [{"feature": 0, "set": 1.0}]
REFT_FILE = {f"resid_post.1.{part}": numbers(40, 16) for part in ("weight", "rotate")}
BAD_REQUESTS: list[tuple[str, dict[str, Tensor], dict[str, Any], str]] = [
    ("caa", EXAMPLES["caa"][0], {"scale": 1e5}, "scale"),
    ("caa", EXAMPLES["caa"][0], {"scales": 1.0}, "scales"),
    ("actadd", EXAMPLES["actadd"][0], {"location": "centre"}, "location"),
    ("actadd", {"resid_pre.1.rows": numbers(3, 16)}, {"location": -2}, "location"),
    ("actadd", EXAMPLES["actadd"][0], {"row": 1}, "row"),
    ("repe", EXAMPLES["repe"][0], {"operator": "cubic"}, "operator"),
    ("directional_patch", EXAMPLES["directional_patch"][0], {}, "value"),
    ("context_knob", EXAMPLES["context_knob"][0], {"value": [1.0]}, "value"),
    ("angular", EXAMPLES["angular"][0], {"angle": 400}, "angle"),
    ("loreft", REFT_FILE, {"activation": "tanh"}, "activation"),
    ("sae", SAE_FILE, {"features": []}, "features"),
    ("sae", SAE_FILE, {"features": [*ONE, {"feature": 6, "set": 1.0}]}, "features.1.feature"),
    ("sae", SAE_FILE, {"features": [*ONE, *ONE]}, "features.1.feature"),
    ("sae", SAE_FILE, {"features": [{"feature": 0, "set": 1.0, "add": 1.0}]}, "features.0"),
    ("sae", SAE_FILE, {"features": ONE, "activation": "jumprelu"}, "activation"),
    ("sae", SAE_FILE, {"features": ONE, "activation": "topk"}, "k"),
    ("sae", SAE_FILE, {"features": ONE, "k": 3}, "k"),
    ("sae", SAE_FILE, {"features": ONE, "activation": "topk", "k": 7}, "k"),
    ("lf_steering", SAE_FILE, {"features": [2, 9], "k": 2}, "features.1"),
    ("mote", {}, {}, "experts"),
    ("mote", {}, {"experts": {"0": {"off": [4]}}}, "experts.0.off.0"),
    ("mote", {}, {"experts": {"3": {"off": [1]}}}, "experts.3"),
    ("mote", {}, {"experts": {"0": {"off": [1], "on": [1]}}}, "experts.0"),
    ("mote", {}, {"experts": {"0": {"off": [1]}}, "mode": "force"}, "mode"),
    ("prefix_kv", {f"attn_head.1.{part}": numbers(2, 1, 8) for part in ("key", "value")}, {}, "vector"),
    ("attention_override", {}, {"edits": [{"layer": 3, "head": 0, "keys": [0]}]}, "edits.0.layer"),
    ("attention_override", {}, {"edits": [{"layer": 0, "head": 2, "keys": [0]}]}, "edits.0.head"),
    ("attention_override", {}, {"edits": [{"layer": 0, "head": 0, "keys": [0, 1], "weights": [1]}]}, "edits.0"),
    ("attention_override", {}, {"edits": [{"layer": 0, "head": 0, "keys": [0], "weights": [0.5]}]}, "edits.0"),
    ("pasta", {}, {"heads": {"0": [2]}, "spans": [[0, 2]]}, "heads.0.0"),
    ("pasta", {}, {"heads": {"5": [0]}, "spans": [[0, 2]]}, "heads.5"),
    ("pasta", {}, {"heads": {"0": [0]}, "spans": [[2, 2]]}, ""),
    ("pasta", {}, {"heads": {"0": [0]}, "spans": [[0, 2]], "alpha": 0}, "alpha"),
]


@pytest.mark.parametrize(("name", "tensors", "said", "field"), BAD_REQUESTS)
def test_bad_requests_name_the_field(name: str, tensors: dict[str, Tensor], said: dict[str, Any], field: str) -> None:
    method: Any = METHODS[name]
    placed = file_of(name, tensors).tensors if tensors else {}
    try:
        params = method.params.model_validate(said)
        method.check_params(params, placed)
        method.check_model(params, SHAPE)
    except ValidationError as error:
        assert ".".join(map(str, error.errors()[0]["loc"])).startswith(field)
    except SteeringError as error:
        assert error.param == field
    else:
        pytest.fail("accepted")


@pytest.mark.parametrize(
    ("adapters", "change", "message"),
    [
        (["law", "math"], {}, None),
        (["law"], {}, "1 names for 2 centres"),
        (None, {}, "0 names for 2 centres"),
        (["law", "law"], {}, "twice"),
        (["law", ""], {}, r"defaults\.adapters\.1"),
        ("law", {}, r"defaults\.adapters"),
        (["law", "math"], {"centres": torch.stack([ROW, 0 * ROW])}, "'math' is all 0"),
        (["law", "math"], {"centres": ROW}, r"wanted \[adapters, features\]"),
        (["law", "math"], {"centres": torch.full((2, 3), torch.nan)}, "not finite"),
    ],
)
def test_centres_and_their_names_are_checked_together(adapters: Any, change: Any, message: str | None) -> None:
    stated = {} if adapters is None else {"adapters": adapters}
    header = Header(method="adapter_centres", model=SHAPE, defaults=stated)
    data = packed(header, {"centres": numbers(2, 9)} | change)
    if message is None:
        assert parse(data).header.defaults["adapters"] == adapters
        return
    with pytest.raises(SteeringError, match=message):
        parse(data)


def test_programs_do_what_the_ops_say() -> None:
    """The instructions that each example becomes, run by the kernel, against the reference."""
    for name, (tensors, said) in EDITORS.items():
        for point, ops in ops_of(file_of(name, tensors), **said).items():
            x = numbers(5, SHAPE.width(point.site))
            wanted = torch.stack([reference.edited(row.double(), ops) for row in x])
            executed(ops, x)
            torch.testing.assert_close(x.double(), wanted, rtol=1e-4, atol=1e-4, msg=partial("{}: {}".format, name))


def executed(ops: Any, x: Tensor) -> None:
    """One program for all rows of x."""
    program = assemble([], [Step(tuple(ops))])
    lines: list[Tensor] = []
    code = torch.zeros(len(program.codes), 6, dtype=torch.int32)
    for row, (number, operands) in enumerate(zip(program.codes, program.operands, strict=True)):
        for column, operand in enumerate(operands):
            if isinstance(operand, Line):
                lines.append(operand.numbers)
                operands[column] = len(lines) - 1
        code[row] = torch.tensor([number, *operands])
    encoder, encoder_bias = next(((each.weight, each.bias) for each in program.encodings), (None, None))
    tokens = torch.tensor([[0, position] for position in range(len(x))], dtype=torch.int32)
    numbers_ = torch.tensor(program.numbers)
    table = torch.stack(lines) if lines else torch.zeros(1, x.shape[1])
    gains, history = torch.ones(len(x), 1), torch.zeros(1, 1)
    cuda_ext.run_edits_(x, table, code, numbers_, tokens, gains, history, None, None, encoder, encoder_bias)


PROGRAMS = [name for name in EXAMPLES if METHODS[name].kind is EDITS]
GATES = [
    OPEN,
    Gate(schedule_index=0),
    Gate(schedule_index=1),
    Gate(condition_index=0, on=0.5, off=0.5),
    Gate(ramp=(1, 0.5, 2.0, 1.0, 0.0)),
]
PROBE = file_of("probe", EXAMPLES["probe"][0])
PLACES = sorted({HookPoint(site, layer).canonical for site in SITES if site != "router" for layer in range(3)})


@st.composite
def entries(draw: st.DrawFn, name: str | None = None) -> tuple[Vector, Edit]:
    """An entry whose file has the example's numbers at several places, some of them alike and some the same stream."""
    name = name or draw(st.sampled_from(PROGRAMS))
    tensors, said = EXAMPLES[name]
    method: Any = METHODS[name]
    examples = {label.split(".")[-1]: tensor for label, tensor in tensors.items()}
    is_of_heads = next(iter(tensors)).startswith("attn_head")
    sites = [site for site in method.sites if (site == "attn_head") == is_of_heads and site != "router"]
    chosen = st.tuples(st.sampled_from(sites), st.integers(0, 2), st.sampled_from([1.0, 0.5]))
    is_alone = method.encoder_size(examples, {}) > 0  # in its stream

    def apart(point: tuple[Any, int, float]) -> HookPoint:
        named = HookPoint(point[0], point[1])
        return named.canonical if is_alone else named

    hook_points = draw(st.lists(chosen, min_size=1, max_size=8, unique_by=apart))
    placed = {f"{site}.{layer}.{part}": by * each for site, layer, by in hook_points for part, each in examples.items()}
    vector = file_of(name, examples if method.hook_points(SHAPE) and draw(st.booleans()) else placed)
    params = next(method.spread(method.params.model_validate(said), vector.tensors, Where.of(method.where)))[0]
    edit = Edit(vector.digest, params.model_dump_json(), None, gate=draw(st.sampled_from(GATES)))
    edit = edit._replace(renorm=draw(st.booleans()), normalize=draw(st.booleans()) and weigh(vector, edit).only_adds)
    weight = weigh(vector, edit)
    return vector, edit._replace(num_lines=weight.num_lines, num_instructions=weight.num_instructions)


def room(slots: int, vectors: Mapping[str, Vector]) -> Tables:
    """A model's tables, with room for the encoders of `vectors`."""
    specs = [SiteSpec(point, 0, SHAPE.width(point.site)) for point in PLACES]
    kept = {HookPoint.entering(layer): torch.zeros(1, 16) for layer in (0, 2)}
    held = Tables(specs, slots, SHAPE.num_layers, CPU, vectors.__getitem__, dict.fromkeys(PLACES, 150), kept)
    assert not any(map(held.reserve, vectors.values()))
    return held


@pytest.mark.parametrize("name", PROGRAMS)
@settings(max_examples=tries(25), deadline=None)
@given(data=st.data())
def test_what_is_weighed_is_what_the_tables_take(name: str, data: st.DataObject) -> None:
    vector, edit = data.draw(entries(name))
    held = room(1000, {vector.digest: vector})
    held.acquire([(edit,)])
    assert edit.num_lines == max(map(len, held._held[(edit,)].lines.values()))
    assert edit.num_instructions == max(len(program.codes) for program in held._programs((edit,)).values())


@settings(max_examples=tries(200), deadline=None)
@given(st.lists(st.lists(entries(), max_size=4), min_size=1, max_size=4), *(st.booleans(),) * 3)
def test_rows_that_fit_by_count_fit_the_tables(
    rows: list[Any], is_probed: bool, is_kept: bool, is_captured: bool
) -> None:
    """However their entries merge: the scheduler lets in what a step can hold."""
    vectors = {vector.digest: vector for row in rows for vector, _ in row} | {PROBE.digest: PROBE}
    probes = (ProbeRead(PROBE.digest, 1, 0, False),) * is_probed
    captures = Capture((HookPoint("resid_post", 0),), False), Capture((HookPoint("resid_post", 1),), True)
    wanted: list[EditSet] = [
        (*probes, *(edit for _, edit in row), *((StreamCopy((0, 2)),) * is_kept), *captures[: 2 * is_captured])
        for row in rows
        if row or is_probed
    ]
    room(sum(num_slots(row, SHAPE.num_layers) for row in set(wanted)), vectors).acquire(wanted)
