"""The operators in plain torch: what the compiled kernels must equal, and what runs when asked for by name."""

import os

import torch
from torch import Tensor

IS_CHECKED = os.environ.get("WHIPSTAFF_CUDA_EXT_CHECKED") == "1"


def _compute_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _edited(slot: Tensor, gain: Tensor | None, num_tokens: int, num_slots: int) -> tuple[Tensor, Tensor]:
    """The tokens that are edited and the table row of each."""
    rows = slot[:num_tokens]
    if IS_CHECKED:
        _check_slots(rows, num_slots)
    keep = (rows >= 0) & (rows < num_slots)
    if gain is not None:
        keep &= gain[:num_tokens] != 0
    tokens = keep.nonzero().flatten()
    return tokens, rows[tokens].long()


def _check_slots(rows: Tensor, num_slots: int) -> None:
    for token in (rows >= num_slots).nonzero().flatten().tolist():
        raise RuntimeError(f"slot[{token}] is {int(rows[token])}, the tables have {num_slots} rows")


def diag_edit_(
    x: Tensor,
    mul: Tensor | None,
    add: Tensor | None,
    slot: Tensor,
    gain: Tensor | None = None,
    residual: Tensor | None = None,
    renorm: bool = False,
) -> None:
    table = mul if mul is not None else add
    if table is None:
        raise RuntimeError("diag_edit_ needs mul, add or both")
    tokens, rows = _edited(slot, gain, len(x), len(table))
    before = x[tokens].to(_compute_type(x))  # (E, H) the edited tokens only
    if residual is not None:
        before = before + residual[tokens]
    after = before
    if mul is not None:
        after = after * mul[rows].to(after.dtype).repeat_interleave(x.shape[1] // mul.shape[1], dim=1)
    if add is not None:
        after = after + add[rows].to(after.dtype)
    if gain is not None:
        after = before + gain[tokens].to(after.dtype)[:, None] * (after - before)
    if renorm:
        length = after.norm(dim=1, keepdim=True)
        after = torch.where(length > 0, after * (before.norm(dim=1, keepdim=True) / length), after)
    x[tokens] = after.to(x.dtype)
    if residual is not None:
        residual[tokens] = 0
