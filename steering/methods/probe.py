"""A probe reads a row and edits nothing: conditions of other edits ask for its reading, direction . x + bias."""

from typing import ClassVar, Literal

from pydantic import Field

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.probe import ProbeMethod
from whipstaff.steering.method import EditParams, HookPoint, Tensors
from whipstaff.steering.shape import ModelShape


class ProbeParams(EditParams):
    metric: Literal["dot", "cosine"] = Field("dot", description="cosine: both are brought to length 1 first")


class Probe(ProbeMethod[ProbeParams]):
    name, paper = "probe", "Alain and Bengio 2016, arXiv:1610.01644; as a condition: Lee et al. 2024, arXiv:2409.05907"
    params, sites, where = ProbeParams, ("resid_post",), "all"
    off: ClassVar = {}
    parts: ClassVar = {"direction": ("width",), "bias?": ()}

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if not tensors["direction"].any():
            raise SteeringError(f"the direction of {point.site} {point.layer} has length 0")
