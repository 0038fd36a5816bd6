"""The diagonal edit  x <- x * mul + add  and how several of them become one."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from whipstaff.steering.artifacts import Site, Vector

# What activations of size one may become, by dtype. Normalisation squares activations in float32, so bfloat16 and
# float32 models have room for 1e15 and a large activation besides; float16 itself ends at 65504.
MAX_GROWTH = {"float16": 1e3, "bfloat16": 1e15, "float32": 1e15}
Edit = tuple[Vector, float, tuple[int, ...] | None]  # a vector, its scale and on which of its layers (None: all)


def growth(edits: Iterable[Edit]) -> float:
    """How large the edits can make an activation of size one on its way through all layers, at most.

    Beyond MAX_GROWTH activations overflow: what a request then leaves in the KV cache is not finite, and attention
    kernels that multiply masked entries by zero carry that into the next request which gets the block.
    """
    places: dict[tuple[int, Site], tuple[float, float]] = {}  # bounds on |mul| and |add|, in the order of the layers
    for vector, scale, layers in edits:
        for (site, layer), (gain, add) in vector.peaks.items():
            if layers is None or layer in layers:
                mul_bound, add_bound = places.get((layer, site), (1.0, 0.0))
                factor = 1 + abs(scale) * gain
                places[layer, site] = mul_bound * factor, add_bound * factor + abs(scale) * add
    size = 1.0
    for (_, site), (mul_bound, add_bound) in sorted(places.items()):
        size = size * mul_bound + add_bound if site == "resid_post" else size + mul_bound + add_bound
    return size


def compose(edits: Iterable[Edit], site: Site, layers: Sequence[int], width: int) -> tuple[Tensor, Tensor] | None:
    """The edits of one site as one (mul, add) pair per layer, each float32 (len(layers), width), in the order given.

    Each edit is  x <- x + s * (gain * x + add). Composing x * m1 + a1 with (m2, a2) gives x * m1 * m2 + a1 * m2 + a2.
    None when no edit touches any of these layers.
    """
    mul, add, is_touched = torch.ones(len(layers), width), torch.zeros(len(layers), width), False
    row_of = {layer: row for row, layer in enumerate(layers)}
    for vector, scale, chosen in edits:
        stack = vector.stacks.get(site)
        if stack is None:
            continue
        wanted = [i for i, layer in enumerate(stack.layers) if layer in row_of and (chosen is None or layer in chosen)]
        if not wanted:
            continue
        rows = torch.tensor([row_of[stack.layers[i]] for i in wanted])
        is_touched = True
        if stack.gain is not None:
            factor = 1 + scale * stack.gain[wanted]
            mul[rows] *= factor
            add[rows] *= factor
        if stack.add is not None:
            add[rows] += scale * stack.add[wanted]
    return (mul, add) if is_touched else None
