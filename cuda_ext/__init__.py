"""The compiled operators: typed functions over torch.ops.whipstaff, and the choice of what runs behind them.

CPU tensors go to the C++ library, CUDA tensors to the CUDA library. Nothing falls back silently: a library that is
missing raises here, and the pure-torch reference runs only when WHIPSTAFF_CUDA_EXT=reference asks for it.
"""

import torch
from torch import Tensor

from whipstaff.cuda_ext.libraries import load

IMPLEMENTATION = load()
"""Which code runs: "cpu", "cpu+cuda" or "reference"; for the start-up log."""

_diag_edit_ = torch.ops.whipstaff.diag_edit_.default


def diag_edit_(
    x: Tensor,
    mul: Tensor | None,
    add: Tensor | None,
    slot: Tensor,
    gain: Tensor | None = None,
    residual: Tensor | None = None,
    renorm: bool = False,
) -> None:
    """x[t] <- x[t] * mul[s] + add[s]   where s = slot[t] names a row; every other token is left alone, bit for bit.

    With `gain`:      x[t] <- x[t] + gain[t] * (edit(x[t]) - x[t]);  gain 0 leaves the token alone.
    With `residual`:  x[t] <- edit(x[t] + residual[t]);  residual[t] <- 0.
    With `renorm`:    the edited row is rescaled to the length it had before.

    x, residual   (T, H) float32, bfloat16 or float16, changed in place; rows may be strided
    mul           (S, H), or (S, G) with G dividing H: one scale per H / G columns; float32 or x's type, or None
    add           (S, H) of mul's type, or None
    slot          (>= T,) int32 or int64, the first T are used; outside [0, S) = leave alone
    gain          (>= T,) float32, or None
    """
    _diag_edit_(x, mul, add, slot, gain, residual, renorm)
