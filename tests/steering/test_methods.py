"""Every steering method reproduces the published interventions, is exactly off when off, and names what is wrong."""

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from typing import Any

import goldens
import pytest
import torch
from reference import ops as reference
from safetensors.torch import save
from torch import Tensor
from transformers import AutoModelForCausalLM

from whipstaff.steering import methods
from whipstaff.steering.artifacts import Header, Vector, parse
from whipstaff.steering.method import Method, Place, Scaled
from whipstaff.steering.methods import METHODS
from whipstaff.steering.shape import SITES, ModelShape
from whipstaff.steering.where import Where

MODELS = ("gemma2_a", "gpt2_a", "llama_a", "mixtral_a", "qwen2_a")
CASES = [case for model in MODELS for case in goldens.cases(model)]
OTHERS = [case for model in MODELS for case in goldens.others(model)]
TOLERANCE = 2e-4  # logits, float32 model against float64 references (the goldens' README)
ENTRY_FIELDS = {"renorm"}  # of a request's entry, not of a method
SHAPE = ModelShape(
    architecture="Toy", hidden_size=16, num_layers=3, num_heads=2, head_dim=8, num_kv_heads=1, num_experts=4
)


def file_of(method: str, tensors: Mapping[str, Tensor], shape: ModelShape = SHAPE) -> Vector:
    """What the server would load."""
    header = Header(method=method, model=shape)
    return parse(save(dict(tensors), metadata={"whipstaff": header.model_dump_json()}))


def ops_of(vector: Vector, **said: Any) -> dict[Place, Any]:
    """The edits of a request that says this, at every place, whatever the token."""
    method: Any = vector.method
    params = method.params.model_validate(said)
    method.check_params(params, vector.tensors)
    method.check_model(params, vector.header.model)
    edits = [each for each, _ in method.spread(params, vector.tensors, Where.of(method.where))]
    return {
        place: [op for each in edits for op in method.ops(tensors, each, place, vector.header.model)]
        for place, tensors in vector.tensors.items()
    }


def only(found: Mapping[Place, Any]) -> Any:
    """The one op of the one place."""
    ((op,),) = found.values()
    return op


def run(found: Mapping[Place, Any], x: Tensor, **kwargs: Any) -> Tensor:
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
        for place, tensors in vector.tensors.items():

            def touches(position: int, prompt_len: int, its_where: Where = its_where) -> bool:
                spans = its_where.intervals(prompt_len)
                return any(start <= position and (end is None or position < end) for start, end in spans)

            ops = method.ops(tensors, each, place, shape)
            yield reference.Edit(place.site, place.layer, ops, touches, piece.params.get("renorm", False))


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
            assert not any(method.ops(tensors, params, place, shape) for place, tensors in vector.tensors.items())


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
    assert all(place in method.places(SHAPE) and place.site in method.sites for place in method.places(SHAPE))
