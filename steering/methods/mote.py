"""MoTE: experts of a mixture-of-experts model switched off or forced on, per layer.

    pre          an expert that is off is not selectable; the next best takes its place
    zero         an expert that is off keeps its place with weight 0
    zero_renorm  as zero, and the others' weights grow to the former sum
    force        nothing is off
An expert that is on, in any mode, takes the place of the weakest selected one. The engine does it behind the router.
Experts are named by the request, by a file (masks `off` and `on`, 1 for the experts meant), or by both.
"""

from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.router import RouterMethod
from whipstaff.steering.method import EditParams, HookPoint, Tensors, Trial
from whipstaff.steering.routing_scheme import Routing
from whipstaff.steering.served import ModuleAbilities
from whipstaff.steering.shape import ModelShape

_Index = Annotated[int, Field(strict=True, ge=0)]


class Experts(BaseModel):
    """Routed experts of one layer, by their logical index."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    off: list[_Index] = Field([], max_length=4096)
    on: list[_Index] = Field([], max_length=64)


class MoTEParams(EditParams):
    mode: Literal["pre", "zero", "zero_renorm", "force"] = Field("pre", description="what off means")
    experts: dict[Annotated[int, Field(ge=0)], Experts] = Field({}, max_length=1024, description="layer -> experts")


class MoTE(RouterMethod[MoTEParams]):
    name, paper = "mote", "Dahlke et al. 2025, arXiv:2502.11096"
    params, sites, where = MoTEParams, ("router",), "all"
    needs_file = False
    off: ClassVar = {}
    parts: ClassVar = {"off?": ("experts",), "on?": ("experts",)}

    def hook_points(self, model: ModelShape) -> list[HookPoint]:
        return [HookPoint("router", layer) for layer in range(model.num_layers)] if model.num_experts else []

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        for part, mask in tensors.items():
            if not ((mask == 0) | (mask == 1)).all():
                raise SteeringError(f"{part} of layer {point.layer} holds numbers other than 0 and 1")

    def check_params(self, params: MoTEParams, tensors: Mapping[HookPoint, Tensors]) -> None:
        layers = {point.layer for point in tensors} | set(params.experts)
        chosen = {layer: self.chosen(params, layer, tensors.get(HookPoint("router", layer), {})) for layer in layers}
        if not any(off or on for off, on in chosen.values()):
            raise SteeringError("no expert is off or on", "experts")
        for layer, (off, on) in chosen.items():
            if both := sorted(set(off) & set(on)):
                raise SteeringError(f"expert {both[0]} is both off and on", f"experts.{layer}")
            if off and params.mode == "force":
                raise SteeringError("force switches experts on; pre, zero and zero_renorm switch off", "mode")

    def check_model(self, params: MoTEParams, model: ModelShape) -> None:
        if not model.num_experts:
            raise SteeringError("the model has no experts", "experts")
        for layer, experts in params.experts.items():
            if layer >= model.num_layers:
                raise SteeringError(f"the model has layers 0 to {model.num_layers - 1}", f"experts.{layer}")
            for part, named in (("off", experts.off), ("on", experts.on)):
                for index, expert in enumerate(named):
                    if expert >= model.num_experts:
                        raise SteeringError(
                            f"a layer has experts 0 to {model.num_experts - 1}", f"experts.{layer}.{part}.{index}"
                        )

    def chosen(self, params: MoTEParams, layer: int, tensors: Tensors) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The experts of a layer that are off, and those that are on."""
        named = params.experts.get(layer, Experts())
        off, on = (
            tuple(sorted({*experts, *(tensors[part].nonzero().flatten().tolist() if part in tensors else ())}))
            for part, experts in (("off", named.off), ("on", named.on))
        )
        return off, on

    def routing(self, params: MoTEParams, tensors: Mapping[HookPoint, Tensors]) -> dict[int, Routing]:
        """What each layer's router does; layers without experts that are off or on are left out."""
        layers = sorted({point.layer for point in tensors} | set(params.experts))
        found = {layer: self.chosen(params, layer, tensors.get(HookPoint("router", layer), {})) for layer in layers}
        return {layer: Routing(params.mode, off, on) for layer, (off, on) in found.items() if off or on}

    def trials(self, abilities: ModuleAbilities) -> Iterator[Trial]:
        """Experts that are switched off, layer by layer, so that as few are left as a token needs."""
        for layer, scheme in abilities.routing.items():
            experts = {layer: {"off": list(range(scheme.num_experts - scheme.top_k))}}
            yield Trial(f"experts of layer {layer}", {"mode": "zero", "experts": experts})
