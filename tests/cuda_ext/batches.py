"""The batches that will come: how tokens share table rows, and inputs that are slices of larger tensors."""

import torch
from hypothesis import settings
from torch import Tensor

PROPERTY = settings(deadline=None, max_examples=80, derandomize=True)

POPULARITY = ("nobody", "all_one", "all_different", "zipf", "one_and_the_rest")
BATCHES = (1, 3, 7, 133)
HIDDEN = (64, 133, 4096)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INDEX_TYPES = (torch.int32, torch.int64)


def slots(popularity: str, num_tokens: int, num_slots: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """(num_tokens + 5,) a persistent buffer: what lies after the batch's tokens must not be read as slots."""
    batch = {
        "nobody": lambda: torch.full((num_tokens,), -1),
        "all_one": lambda: torch.full((num_tokens,), num_slots - 1),
        "all_different": lambda: torch.arange(num_tokens) % num_slots,
        "zipf": lambda: (1 / torch.rand(num_tokens)).long().clamp(max=num_slots) - 1,
        "one_and_the_rest": lambda: torch.where(torch.arange(num_tokens) == num_tokens // 2, 0, -1),
    }[popularity]()
    return torch.cat([batch, torch.full((5,), 10**6)]).to(dtype)


def strided(num_rows: int, num_columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random (num_rows, num_columns) whose rows lie apart in memory, the first at an odd address."""
    return torch.randn(num_rows, num_columns + 3).to(dtype)[:, 1 : num_columns + 1]
