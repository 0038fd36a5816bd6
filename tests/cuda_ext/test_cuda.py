"""The CUDA kernels do what the CPU kernels do, also inside a captured graph. Runs where a GPU is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from whipstaff import cuda_ext

from .batches import DTYPES, POPULARITY, slots, strided
from .test_attention_rows import paged
from .test_mix_logits import rows_for
from .test_run_edits import WIDTHS, any_edits, batch
from .test_typical import apart
from .tolerances import TOLERANCE

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

pytestmark = pytest.mark.gpu

S = 5
Arguments = tuple[Any, ...]  # tensors, lists of tensors and numbers, as the operator takes them


def put_arguments(popularity: str, hidden: int, dtype: torch.dtype) -> Arguments:
    return strided(133, hidden, dtype), strided(S, hidden, dtype), slots(popularity, 133, S, torch.int32)


def wide_put_arguments(popularity: str, hidden: int, dtype: torch.dtype) -> Arguments:
    index = slots(popularity, 133, S, torch.int32)
    return torch.randn(133, hidden).to(dtype), torch.randn(S, hidden).to(dtype), index


def run_edits_arguments(popularity: str, hidden: int, dtype: torch.dtype) -> Arguments:
    return batch(popularity, 133, hidden, dtype)


def mix_arguments(popularity: str, hidden: int, dtype: torch.dtype) -> Arguments:
    vocab, shape = hidden * 8, (33, 3)
    streams = [torch.randn(33, vocab + padding).to(dtype) * 4 for padding in (0, 8, 64)]
    return (
        torch.zeros(33, vocab),
        streams,
        rows_for(popularity, 33, 3),
        torch.randn(shape),
        torch.rand(shape) + 0.5,
        torch.rand(shape) < 0.5,
        torch.where(torch.rand(shape) < 0.3, 0.01, 0.0),
        torch.where(torch.rand(shape) < 0.3, 0.9, 1.0),
        torch.zeros(33, dtype=torch.int32),
    )


def typical_arguments(popularity: str, hidden: int, dtype: torch.dtype) -> Arguments:
    mass = torch.ones(38) if popularity == "nobody" else torch.rand(38) * 1.2
    return apart(33, hidden * 8, dtype), mass


def cut_arguments(popularity: str, hidden: int, dtype: torch.dtype) -> Arguments:
    low = torch.full((38,), -torch.inf) if popularity == "nobody" else torch.randn(38)
    return strided(33, hidden * 8, dtype), low, torch.randn(38).exp()


IN_PLACE: dict[str, tuple[Callable[..., None], Callable[..., Arguments]]] = {
    "put_rows_": (cuda_ext.put_rows_, put_arguments),
    "put_rows_ in wide words": (cuda_ext.put_rows_, wide_put_arguments),
    "run_edits_": (cuda_ext.run_edits_, run_edits_arguments),
    "mix_logits_": (cuda_ext.mix_logits_, mix_arguments),
    "cut_rows_": (cuda_ext.cut_rows_, cut_arguments),
    "typical_rows_": (cuda_ext.typical_rows_, typical_arguments),
}


def on(device: str, arguments: Arguments) -> Arguments:
    """Copies; rows stay as far apart as they were."""
    moved: list[object] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            copy = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=device)
            moved.append(copy.copy_(argument))
        else:
            moved.append([a.to(device, copy=True) for a in argument] if isinstance(argument, list) else argument)
    return tuple(moved)


def assert_same(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.cpu().double(), want.double(), **TOLERANCE[dtype])


@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("hidden", [64, 133 * 8, 4096])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", IN_PLACE)
def test_matches_the_cpu_kernel(name: str, dtype: torch.dtype, hidden: int, popularity: str) -> None:
    run, make = IN_PLACE[name]
    arguments = make(popularity, hidden, dtype)
    cpu, cuda = on("cpu", arguments), on("cuda", arguments)
    run(*cpu)
    run(*cuda)
    assert_same(cuda[0], cpu[0], dtype if name != "mix_logits_" else torch.float32)


@pytest.mark.parametrize("name", IN_PLACE)
def test_a_captured_graph_follows_its_buffers(name: str) -> None:
    run, make = IN_PLACE[name]
    first, second = make("nobody", 4096, torch.bfloat16), make("zipf", 4096, torch.bfloat16)
    buffers = on("cuda", first)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(*buffers)
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        run(*buffers)
    for buffer, value in zip(buffers, second, strict=True):
        if isinstance(buffer, Tensor):
            buffer.copy_(value)
        elif isinstance(buffer, list):
            for part, new in zip(buffer, value, strict=True):
                part.copy_(new)
    graph.replay()
    cpu = on("cpu", second)
    run(*cpu)
    assert_same(buffers[0], cpu[0], torch.bfloat16)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_match_the_cpu_kernel(dtype: torch.dtype, seed: int) -> None:
    edits = any_edits(seed, 9, WIDTHS[seed % len(WIDTHS)], dtype)
    edits = edits._replace(x=edits.x.clone()) if seed % 2 else edits  # rows that allow wide loads, and rows that do not
    cpu, cuda = on("cpu", edits), on("cuda", edits)
    cuda_ext.run_edits_(*cpu)
    cuda_ext.run_edits_(*cuda)
    for got, want in zip(cuda, cpu, strict=True):
        if want is not None:
            tolerance = TOLERANCE[dtype if want.dtype == dtype else torch.float32]
            torch.testing.assert_close(got.cpu().double(), want.double(), equal_nan=True, **tolerance)


def test_a_row_wider_than_a_block_has_unasked() -> None:
    edits = batch("all_different", 3, 20480, torch.bfloat16)
    cpu, cuda = on("cpu", edits), on("cuda", edits)
    cuda_ext.run_edits_(*cpu)
    cuda_ext.run_edits_(*cuda)
    assert_same(cuda[0], cpu[0], torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_logits_match_the_cpu_kernels(dtype: torch.dtype) -> None:
    logits, base, chosen = (
        strided(7, 5001, dtype) * 3,
        strided(7, 5009, dtype) * 3,
        torch.tensor([0, 1, -1, 0.3, 2, 0, 0.7]),
    )
    cpu, cuda = logits.clone(), logits.cuda()
    cuda_ext.apply_temperature_(cpu, chosen)
    cuda_ext.apply_temperature_(cuda, chosen.cuda())
    assert_same(cuda, cpu, dtype)
    for got, want in zip(
        cuda_ext.explain_rows(logits.cuda(), base.cuda()), cuda_ext.explain_rows(logits, base), strict=True
    ):
        assert_same(got, want, torch.float32)
    owners = torch.tensor([0, 3, 3, 6, -1, 7, 2])
    assert_same(
        cuda_ext.divergences(logits.cuda(), base.cuda(), owners.cuda()),
        cuda_ext.divergences(logits, base, owners),
        torch.float32,
    )


@pytest.mark.parametrize("order", [(1, 0, 2), (1, 2, 0)], ids=str)
@pytest.mark.parametrize("head_max", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_rows_match_the_cpu_kernel(dtype: torch.dtype, head_max: bool, order: tuple[int, ...]) -> None:
    keys, table, context = paged([1, 31, 32, 33, 700], 2, 128, 32, dtype, order)
    arguments = torch.randn(5, 6, 128).to(dtype), keys, table, context, 0.1, 720, head_max
    assert_same(cuda_ext.attention_rows(*on("cuda", arguments)), cuda_ext.attention_rows(*arguments), torch.float32)


def test_empty_batches() -> None:
    index = torch.zeros(4, dtype=torch.int32, device="cuda")
    cuda_ext.put_rows_(torch.ones(0, 8, device="cuda"), torch.ones(1, 8, device="cuda"), index)


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="rows is on cpu, x on cuda:0"):
        x, index = torch.ones(2, 8, device="cuda"), torch.zeros(2, dtype=torch.int32, device="cuda")
        cuda_ext.put_rows_(x, torch.ones(1, 8), index)
