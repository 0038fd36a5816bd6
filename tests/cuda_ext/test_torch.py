"""What torch asks of an operator: a schema that says what changes, shapes without data, a place in a compiled graph."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from whipstaff import cuda_ext
from whipstaff.cuda_ext.libraries import OPERATORS

from .test_attention_rows import paged
from .test_mix_logits import identity_rows
from .test_run_edits import Edits, batch, bind


def put_rows_arguments() -> tuple[Any, ...]:
    return torch.randn(6, 32), torch.randn(5, 32), torch.arange(6, dtype=torch.int32)


def run_edits_arguments() -> tuple[Any, ...]:
    edits = batch("all_different", 6, 32, torch.float32)._replace(
        encoder=torch.randn(3, 32), encoder_bias=torch.ones(3)
    )
    edits = edits._replace(x=torch.randn(6, 32), residual=torch.randn(6, 32), history=torch.zeros(11, 7))
    return tuple(edits._replace(kept=torch.randn(8, 32)))


def bind_edits_arguments() -> tuple[Any, ...]:
    edits = Edits(*run_edits_arguments())
    return torch.zeros(2, cuda_ext.BOUND_WORDS, dtype=torch.int64), 1, *edits[1:7], *edits[8:]


def run_bound_arguments() -> tuple[Any, ...]:
    edits = Edits(*run_edits_arguments())
    BOUND_BY_TESTS.append(edits)
    return edits.x, edits.residual, bind(edits), 1


BOUND_BY_TESTS: list[Edits] = []  # whoever keeps addresses keeps the tensors


def mix_logits_arguments() -> tuple[Any, ...]:
    streams, rows = [torch.randn(3, 40), torch.randn(3, 41)], identity_rows(3, 2)
    return torch.zeros(3, 40), streams, rows, torch.ones(3, 2), None, None, torch.ones(3, 2), None, None


def attention_rows_arguments() -> tuple[Any, ...]:
    keys, table, context = paged([5, 40], 2, 16, 16, torch.float32)
    return torch.randn(2, 4, 16), keys, table, context, 0.25, 48, True


ARGUMENTS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "put_rows_": put_rows_arguments,
    "run_edits_": run_edits_arguments,
    "bind_edits_": bind_edits_arguments,
    "run_bound_edits_": run_bound_arguments,
    "mix_logits_": mix_logits_arguments,
    "apply_temperature_": lambda: (torch.randn(3, 40), torch.tensor([0.0, 1.0, 2.0])),
    "explain_rows": lambda: (torch.randn(3, 40), torch.randn(3, 41)),
    "divergences": lambda: (torch.randn(3, 40), torch.randn(3, 41), torch.tensor([2, 0, 9])),
    "cut_rows_": lambda: (torch.randn(3, 40), torch.zeros(3), None),
    "typical_rows_": lambda: (torch.randn(3, 40), torch.tensor([0.2, 0.9, 1.0])),
    "attention_rows": attention_rows_arguments,
}


@pytest.mark.parametrize("name", [operator.name.removeprefix("whipstaff::") for operator in OPERATORS])
def test_registration(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.whipstaff, name).default, ARGUMENTS[name]())


def test_an_operator_without_data_refuses_tensors_on_two_devices() -> None:
    x, rows, index = put_rows_arguments()
    with pytest.raises(RuntimeError, match="a tensor is on meta, x on cpu"):
        cuda_ext.put_rows_(x, rows.to("meta"), index)


def put_step(x: Tensor, rows: Tensor, index: Tensor) -> Tensor:
    x = x * 2
    cuda_ext.put_rows_(x, rows, index)
    return x + 1


def test_put_rows_under_torch_compile() -> None:
    arguments = torch.randn(6, 32), torch.randn(5, 32), torch.tensor([0, -1, 2, -1, 4, 0], dtype=torch.int32)
    torch.testing.assert_close(torch.compile(put_step, fullgraph=True)(*arguments), put_step(*arguments))


def test_a_compiled_step_follows_its_buffers() -> None:
    x, rows, index = torch.randn(3, 8), torch.randn(3, 8), torch.full((4,), -1, dtype=torch.int32)
    compiled = torch.compile(put_step, fullgraph=True)
    torch.testing.assert_close(compiled(x, rows, index), 2 * x + 1)
    index[1] = 1
    rows[1] = 7
    assert compiled(x, rows, index)[1].tolist() == [8.0] * 8


def edit_step(x: Tensor, *others: Any) -> Tensor:
    x = x * 2
    cuda_ext.run_edits_(x, *others)
    return x + 1


def bound_step(x: Tensor, bound: Tensor) -> Tensor:
    x = x * 2
    cuda_ext.run_bound_edits_(x, None, bound, 1)
    return x + 1


@pytest.mark.parametrize("is_bound", [False, True])
def test_run_edits_under_torch_compile(is_bound: bool) -> None:
    edits = batch("all_different", 6, 32, torch.float32)._replace(residual=None)
    copy = edits.copies()
    compiled: Callable[..., Tensor] = torch.compile(bound_step if is_bound else edit_step, fullgraph=True)
    arguments = (edits.x, bind(edits)) if is_bound else edits
    torch.testing.assert_close(compiled(*arguments), edit_step(*copy))
    torch.testing.assert_close(edits.history, copy.history, equal_nan=True)
    assert edits.kept is not None and copy.kept is not None and torch.equal(edits.kept, copy.kept)


def test_mix_logits_under_torch_compile() -> None:
    def step(out: Tensor, other: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
        logits = out * 2
        cuda_ext.mix_logits_(logits, [out, other + 1], rows, weights)
        return logits + 1

    arguments = torch.randn(3, 40), torch.randn(3, 40), identity_rows(3, 2), torch.randn(3, 2)
    torch.testing.assert_close(torch.compile(step, fullgraph=True)(*arguments), step(*arguments))
