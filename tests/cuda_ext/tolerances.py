"""How far a kernel may be from the float64 reference: one table, by the type of the tensor it writes."""

from typing import Any

import torch

TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 2e-5, "atol": 2e-5},
    torch.bfloat16: {"rtol": 8e-3, "atol": 1e-3},  # half a unit in the last place is 2^-9 of the value
    torch.float16: {"rtol": 1e-3, "atol": 1e-3},
}
