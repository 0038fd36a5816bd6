"""Learned heads: small networks on the last hidden state that decoding methods read. They edit nothing; they are files
of the registry like vectors, for one model, and a request names them in `decoding`."""

from collections.abc import Sequence
from typing import ClassVar

from whipstaff.steering.method import EditParams, Method, Place, Tensors
from whipstaff.steering.ops import Op
from whipstaff.steering.shape import ModelShape


class Head(Method[EditParams]):
    """What the heads below share. Their shapes use `hidden`, and free names that the served model must agree with."""

    params, sites, where, served_by = EditParams, (), "all", "logits"
    off: ClassVar = {}

    def ops(self, tensors: Tensors, params: EditParams, place: Place, model: ModelShape) -> Sequence[Op]:
        return ()


class DeferHead(Head):
    """Whether the assistant should say the next token: sigmoid(weight . h + bias)."""

    name, paper = "defer_head", "Shen et al. 2024 (Co-LLM), arXiv:2403.03870"
    parts: ClassVar = {"weight": ("hidden",), "bias?": ()}


class TemperatureHead(Head):
    """Which of some temperatures to use: softmax(w2 . silu(w1 . silu(w0 . h + b0) + b1) + b2)."""

    name, paper = "temperature_head", "Dhuliawala et al. 2024 (AdaptiveDecoder), arXiv:2411.09661"
    parts: ClassVar = {
        "temperatures": ("choices",),
        "w0": ("inner", "hidden"),
        "b0": ("inner",),
        "w1": ("inner", "inner"),
        "b1": ("inner",),
        "w2": ("choices", "inner"),
        "b2": ("choices",),
    }


class TokenClassifier(Head):
    """How good a continuation each token is: sigmoid(weight . h + bias), one number per entry of the vocabulary."""

    name, paper = "token_classifier", "Choi et al. 2023 (KWD, KCTS), arXiv:2310.09044"
    parts: ClassVar = {"weight": ("vocab", "hidden"), "bias?": ("vocab",)}
