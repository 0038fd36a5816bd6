"""The operators' schemas and what implements them: the compiled libraries, or the reference when asked for by name."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from whipstaff.cuda_ext import interpreter, reference


class Operator(NamedTuple):
    name: str
    schema: str
    reference: Callable[..., object]
    fake: Callable[..., object]  # shapes and dtypes of the result, for torch.compile


def _changes_in_place(x: Tensor, *others: object) -> None:
    """The fake kernel of an operator that changes x and returns nothing."""
    for other in others:
        if isinstance(other, Tensor) and other.device != x.device:
            raise RuntimeError(f"a tensor is on {other.device}, x on {x.device}")


def _binds(bound: Tensor, site: int, *tables: Tensor | None, **more: Tensor | None) -> None:
    """The fake kernel of what writes addresses, which fake tensors do not have."""


def _runs_bound(x: Tensor, residual: Tensor | None, bound: Tensor, site: int) -> None:
    _changes_in_place(x, residual)


def _explanation(final: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
    per_row = (len(final),)
    return final.new_empty(per_row, dtype=torch.float32), final.new_empty(per_row, dtype=torch.float32)


def _probabilities(
    query: Tensor,
    keys: Tensor,
    block_table: Tensor,
    context: Tensor,
    scale: float,
    max_context: int,
    head_max: bool = False,
) -> Tensor:
    heads = () if head_max else (query.shape[1],)
    return query.new_empty((len(query), *heads, max_context), dtype=torch.float32)


def _per_early_row(mature: Tensor, early: Tensor, owners: Tensor) -> Tensor:
    return mature.new_empty(len(early), dtype=torch.float32)


OPERATORS = [
    Operator(
        "whipstaff::put_rows_",
        "(Tensor(a!) x, Tensor rows, Tensor index) -> ()",
        reference.put_rows_,
        _changes_in_place,
    ),
    Operator(
        "whipstaff::run_edits_",
        "(Tensor(a!) x, Tensor lines, Tensor code, Tensor args, Tensor tokens, Tensor gains, Tensor(b!) history, "
        "Tensor(c!)? residual=None, Tensor(d!)? meter=None, Tensor? encoder=None, Tensor? encoder_bias=None, "
        "Tensor(e!)? kept=None) -> ()",
        interpreter.run_edits_,
        _changes_in_place,
    ),
    Operator(
        "whipstaff::bind_edits_",
        "(Tensor(a!) bound, int site, Tensor lines, Tensor code, Tensor args, Tensor tokens, Tensor gains, "
        "Tensor history, Tensor? meter=None, Tensor? encoder=None, Tensor? encoder_bias=None, Tensor? kept=None) -> ()",
        interpreter.bind_edits_,
        _binds,
    ),
    Operator(
        "whipstaff::run_bound_edits_",
        "(Tensor(a!) x, Tensor(b!)? residual, Tensor bound, int site) -> ()",
        interpreter.run_bound_edits_,
        _runs_bound,
    ),
    Operator(
        "whipstaff::mix_logits_",
        "(Tensor(a!) out, Tensor[] streams, Tensor rows, Tensor weights, Tensor? temperatures=None, "
        "Tensor? log_softmax=None, Tensor? alphas=None, Tensor? top_ps=None, Tensor(b!)? num_allowed=None) -> ()",
        reference.mix_logits_,
        _changes_in_place,
    ),
    Operator(
        "whipstaff::apply_temperature_",
        "(Tensor(a!) logits, Tensor temperature) -> ()",
        reference.apply_temperature_,
        _changes_in_place,
    ),
    Operator(
        "whipstaff::explain_rows",
        "(Tensor final, Tensor? base) -> (Tensor, Tensor)",
        reference.explain_rows,
        _explanation,
    ),
    Operator(
        "whipstaff::divergences",
        "(Tensor mature, Tensor early, Tensor owners) -> Tensor",
        reference.divergences,
        _per_early_row,
    ),
    Operator(
        "whipstaff::cut_rows_",
        "(Tensor(a!) logits, Tensor? low, Tensor? high) -> ()",
        reference.cut_rows_,
        _changes_in_place,
    ),
    Operator(
        "whipstaff::typical_rows_",
        "(Tensor(a!) logits, Tensor mass) -> ()",
        reference.typical_rows_,
        _changes_in_place,
    ),
    Operator(
        "whipstaff::attention_rows",
        "(Tensor query, Tensor keys, Tensor block_table, Tensor context, float scale, int max_context, "
        "bool head_max=False) -> Tensor",
        reference.attention_rows,
        _probabilities,
    ),
]


class LibraryMissing(ImportError):
    """A compiled library is not there; the message says how to build it."""


def load() -> str:
    """Registers every operator and returns which code runs behind them.

    WHIPSTAFF_CUDA_EXT chooses "compiled" or "reference"; WHIPSTAFF_CUDA_EXT_FOLDER names another place to take the
    compiled libraries from, such as a build with sanitizers.
    """
    for operator in OPERATORS:
        torch.library.define(operator.name, operator.schema)
        torch.library.register_fake(operator.name, operator.fake)
    choice = os.environ.get("WHIPSTAFF_CUDA_EXT", "compiled")
    if choice == "reference":
        return _register_reference()
    if choice != "compiled":
        raise ImportError(f"WHIPSTAFF_CUDA_EXT is {choice!r}; it must be 'compiled' (the default) or 'reference'")
    _load_library("_cpu")
    if torch.version.cuda is None:
        return "cpu"
    _load_library("_cuda")
    return "cpu+cuda"


def _register_reference() -> str:
    for operator in OPERATORS:
        torch.library.impl(operator.name, "CompositeExplicitAutograd", operator.reference)
    return "reference"


def _load_library(name: str) -> None:
    folder = Path(os.environ.get("WHIPSTAFF_CUDA_EXT_FOLDER", Path(__file__).parent))
    found = sorted(folder.glob(f"{name}.*so"))
    if not found:
        raise LibraryMissing(
            f"whipstaff.cuda_ext.{name} is not built in {folder}: run `pip install --no-build-isolation --no-deps -e .`"
            " in the repository (with nvcc on PATH for CUDA), or set WHIPSTAFF_CUDA_EXT=reference to run plain torch"
        )
    torch.ops.load_library(found[0])  # type: ignore[no-untyped-call]
