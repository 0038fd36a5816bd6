"""Learned heads that decoding methods read: each kind's tensors and their shapes."""

from collections.abc import Mapping

Shape = tuple[str, ...]
"""Sizes by name: "hidden" and "vocab" are the served model's; any other name is the file's own, the same wherever it
stands."""

HEADS: Mapping[str, Mapping[str, Shape]] = {
    "defer_head": {"weight": ("hidden",), "bias": ()},
    "temperature_head": {
        "temperatures": ("choices",),
        "w0": ("width", "hidden"),
        "b0": ("width",),
        "w1": ("width", "width"),
        "b1": ("width",),
        "w2": ("choices", "width"),
        "b2": ("choices",),
    },
    "token_classifier": {"weight": ("vocab", "hidden"), "bias": ("vocab",)},
}
"""Kind -> part -> shape."""

OPTIONAL: Mapping[str, frozenset[str]] = {"defer_head": frozenset({"bias"}), "token_classifier": frozenset({"bias"})}
"""Kind -> the parts that a file may leave out."""
