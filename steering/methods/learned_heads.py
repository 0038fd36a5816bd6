"""Learned heads: small networks on the last hidden state that decoding methods read. They edit nothing; they are files
of the registry like vectors, for one model, and a request names them in `decoding`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.head import HeadMethod
from whipstaff.steering.method import EditParams, Tensors


class Head(HeadMethod[EditParams]):
    """What the heads below share."""

    params, sites, where = EditParams, (), "all"
    off: ClassVar = {}


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


class CentresParams(EditParams):
    """What a file of centres says beside them."""

    adapters: list[Annotated[str, Field(min_length=1, max_length=256)]] = Field(
        [], max_length=1024, description="the LoRA adapter that each centre belongs to"
    )


class AdapterCentres(Head):
    """Where the training data of LoRA adapters lies: the nearer a query's feature, the more an adapter counts."""

    name, paper = "adapter_centres", "Li et al. 2025 (ELREA), arXiv:2502.00089"
    params = CentresParams
    parts: ClassVar = {"centres": ("adapters", "features")}

    def check_defaults(self, tensors: Tensors, defaults: Mapping[str, Any]) -> None:
        names, centres = defaults.get("adapters", []), tensors["centres"]
        if len(names) != len(centres):
            raise SteeringError(f"header field defaults.adapters: {len(names)} names for {len(centres)} centres")
        if len(set(names)) != len(names):
            raise SteeringError("header field defaults.adapters: an adapter is named twice")
        for name, centre in zip(names, centres, strict=True):
            if not centre.any():
                raise SteeringError(f"tensor 'centres': that of {name!r} is all 0, which is near to nothing")


class PrefixClassifier(Head):
    """How good a text is that ends here: class 1 of softmax(weight . h + bias), h of its last token."""

    name, paper = "prefix_classifier", "Choi et al. 2023 (KWD, KCTS), arXiv:2310.09044"
    parts: ClassVar = {"weight": ("2", "hidden"), "bias?": ("2",)}
