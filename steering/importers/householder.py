"""torch's orthogonal parametrisation as a checkpoint stores it: the matrix itself is in no file."""

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers.source import numbers

ORIGINAL, BASE = "parametrizations.weight.original", "parametrizations.weight.0.base"


def orthogonal(original: object, base: object) -> Tensor:
    """(rank, width): the rows are the columns of base @ Q.

    Q is the product of the reflectors I - tau v v^T below the diagonal of `original` (width, rank), v with 1 on it, its
    columns times the integer diagonal. `base` (width, width) moves it to where training began; None: it stayed.
    """
    x = numbers("original", original, None, None).double()
    width, rank = x.shape
    if not 0 < rank <= width:
        raise SteeringError(f"the stored matrix has shape {[width, rank]}; it needs at least as many rows as columns")
    below = x.tril(-1)
    tau = 2 / (1 + below.square().sum(0))
    q: Tensor = torch.linalg.householder_product(below, tau) * x.diagonal().trunc()
    if base is not None:
        q = numbers("base", base, width, width).double() @ q
    return q.T.float().contiguous()
