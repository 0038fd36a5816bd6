"""Heads of kind `prefix_classifier`: two classes by a hidden state, of which the second is the wanted one."""

from collections.abc import Mapping

from torch import Tensor

NUM_CLASSES = 2


def classes(hidden: Tensor, head: Mapping[str, Tensor]) -> Tensor:
    """(R, 2) float32 logits W h + bias of (R, H) hidden states after the final norm, in whatever type the model runs.

    Args:
        head: `weight` (2, H) and perhaps `bias` (2,), float32.
    """
    found = hidden.float() @ head["weight"].T
    return found + head["bias"] if "bias" in head else found
