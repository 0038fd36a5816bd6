"""A model on this machine: what is read is what hooks see, and edits are those that the engine makes."""

import goldens
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from whipstaff.cuda_ext import Phi, run_edits_
from whipstaff.steering.apply import applied
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.source import Asked, Entry
from whipstaff.steering.method import HookPoint
from whipstaff.steering.ops import PER_TOKEN_NORMS, Cross, Diagonal, Directions, EditOp, Replacement, TopK, directions
from whipstaff.steering.programs import Line, Step, assemble
from whipstaff.steering.vector_file import packed, parse

MODELS = ("gemma2_a", "gpt2_a", "llama_a", "mixtral_a", "qwen2_a")
TOLERANCE = 2e-4
_loaded: dict[str, LocalModel] = {}


def local(name: str) -> LocalModel:
    if name not in _loaded:
        folder = goldens.ROOT / "models" / name
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
        _loaded[name] = LocalModel(model, None, batch_size=3)
    return _loaded[name]


def entry(piece: goldens.Piece, model: str) -> Entry:
    """A piece of a golden case as an entry, with the numbers of its file."""
    vector = parse(packed(piece.header(goldens.shape_of(model)), piece.tensors))
    params = {name: value for name, value in piece.params.items() if name != "renorm"}
    return Entry(piece.method, vector.tensors, vector.header.known_defaults | params, piece.where)


CASES = [case for model in MODELS for case in goldens.cases(model)]


@pytest.mark.parametrize(
    "case", [c for c in CASES if not any("renorm" in p.params for p in c.pieces)], ids=lambda c: c.name
)
def test_edits_give_the_published_logits(case: goldens.Case) -> None:
    model = local(case.model)
    ids = case.io["input_ids"].tolist()
    entries = [entry(piece, case.model) for piece in case.pieces]
    with torch.inference_mode(), model.edited(entries, [len(ids)]):
        found = model.forward([ids])[0]
    assert (found - case.io["logits_f64"]).abs().max() < TOLERANCE


WIDTH = 16
GENERATOR = torch.Generator().manual_seed(3)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def some(phi: Phi) -> Directions:
    """Four directions of one kind, with arguments that make all of its cases happen."""
    return directions(numbers(4, WIDTH), numbers(4, WIDTH), phi, a=-0.5, b=0.7, c=0.3, d=0.1, bias=numbers(4))


def centred(num: int) -> Tensor:
    found = numbers(num, WIDTH)
    return found - found.mean(1, keepdim=True)


def encoded(norm: str) -> Directions:
    """Four features of an autoencoder of eight, of which the three largest readings count, in the row's place."""
    encoder, bias = centred(8), numbers(8)
    made = directions(encoder[:4], numbers(4, WIDTH), Phi.TOP_K, a=0.0, b=1.5, bias=bias[:4])
    top_k, replacement = TopK(encoder, bias, 3), Replacement(0.6, numbers(WIDTH))
    return Directions(made.read, made.write, made.phi, made.args, made.bias, norm, top_k, replacement)


OPS: dict[str, tuple[list[EditOp], bool]] = {
    "diagonal": ([Diagonal(numbers(WIDTH), numbers(WIDTH)), Diagonal(None, numbers(WIDTH))], False),
    "cross": ([Cross(numbers(WIDTH), numbers(WIDTH), 4)], False),
    "renorm": ([Diagonal(None, numbers(WIDTH))], True),
    "constant": ([directions(None, numbers(2, WIDTH), Phi.AFFINE, b=1.0)], False),
    "several": ([some(Phi.SET), Diagonal(numbers(WIDTH)), some(Phi.SILU)], False),
    **{f"directions {phi.name}": ([some(phi)], False) for phi in Phi if phi not in (Phi.OFF, Phi.TOP_K)},
    **{f"autoencoder {norm}": ([encoded(norm)], False) for norm in PER_TOKEN_NORMS},
}


def served(x: Tensor, ops: list[EditOp], renorm: bool) -> Tensor:
    """The rows after the program that the engine would run."""
    program = assemble([], [Step(tuple(ops), renorm=renorm)])
    lines = list(dict.fromkeys(program.lines))
    operands = [[lines.index(each) if isinstance(each, Line) else each for each in row] for row in program.operands]
    code = torch.tensor([[op, *row] for op, row in zip(program.codes, operands, strict=True)], dtype=torch.int32)
    rows = torch.stack([line.numbers for line in lines]).float() if lines else torch.zeros(1, WIDTH)
    encoder = [(each.weight, each.bias) for each in program.encodings]
    found, num = x.clone(), len(x)
    run_edits_(
        found,
        rows.contiguous(),
        code,
        torch.tensor(program.numbers, dtype=torch.float32),
        torch.zeros(num, 2, dtype=torch.int32),
        torch.zeros(num, 1),
        torch.zeros(1, 1),
        encoder=encoder[0][0].contiguous() if encoder else None,
        encoder_bias=encoder[0][1].contiguous() if encoder else None,
    )
    return found


@pytest.mark.parametrize("name", OPS)
def test_edits_are_those_that_the_engine_runs(name: str) -> None:
    ops, renorm = OPS[name]
    x = numbers(64, WIDTH)
    wanted = served(x, ops, renorm)
    assert (wanted - x).abs().max() > 1e-2
    torch.testing.assert_close(applied(x, ops, renorm), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_reach_an_edits_numbers() -> None:
    add = numbers(WIDTH).requires_grad_()
    applied(numbers(5, WIDTH), [Diagonal(None, add)]).sum().backward()
    assert add.grad is not None and torch.equal(add.grad, torch.full((WIDTH,), 5.0))


def test_batches_and_their_order_change_nothing() -> None:
    model = local("llama_a")
    texts = [tuple(range(3, 3 + length)) for length in (9, 4, 12, 7, 5, 11, 3)]
    points = [HookPoint("resid_post", 3), HookPoint("attn_head", 1), HookPoint("mlp_in", 2)]
    asked = [Asked(ids, (0, len(ids) - 1)) for ids in texts]
    together = list(model.read(asked, points))
    for one, found in zip(asked, together, strict=True):
        (alone,) = LocalModel(model.model, None, batch_size=1).read([one], points)
        for point in points:
            assert found[point].shape == (2, model.shape.width(point.site))
            torch.testing.assert_close(found[point], alone[point], rtol=0, atol=1e-5)
    rows = list(model.predict(texts))
    for ids, row in zip(texts, rows, strict=True):
        wanted = model.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(row, wanted, rtol=0, atol=1e-4)


def test_a_mean_is_over_the_positions_that_were_asked_for() -> None:
    model, point, ids = local("llama_a"), HookPoint("resid_post", 0), tuple(range(5, 15))
    (whole,) = model.read([Asked(ids, tuple(range(10)))], [point])
    (mean,) = model.read([Asked(ids, (2, 3, 7), is_mean=True)], [point])
    torch.testing.assert_close(mean[point][0], whole[point][[2, 3, 7]].mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("point", "reason"),
    [(HookPoint("resid_post", 9), "layers 0 to 3"), (HookPoint("router", 0), "no experts")],
)
def test_places_that_are_not_there_are_named(point: HookPoint, reason: str) -> None:
    with pytest.raises(SteeringError, match=reason):
        list(local("llama_a").read([Asked((1, 2), (0,))], [point]))


def test_a_text_that_is_too_long_is_refused() -> None:
    model = local("llama_a")
    most = model.model.config.max_position_embeddings
    with pytest.raises(SteeringError, match=str(most)):
        list(model.read([Asked(tuple([3] * (most + 1)), (0,))], [HookPoint("resid_post", 0)]))
