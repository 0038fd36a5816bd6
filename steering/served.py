"""What a served model can be steered by, and what its operator allows: all that entries are checked against."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from whipstaff.steering.edits import Lengths
from whipstaff.steering.method import HookPoint
from whipstaff.steering.routing_scheme import Scheme
from whipstaff.steering.shape import ModelShape


@dataclass(frozen=True)
class AttentionAbilities:
    """What the attention layers of a model obey. Layers are 0-based block indices."""

    layers: Sequence[int]  # that obey
    bias: Sequence[int] = ()  # whose scores can be added to
    side: Sequence[int] = ()  # that learned rows can go through: they have the fused projection
    windows: Mapping[int, int] = field(default_factory=dict)  # layer -> how many tokens back it sees, where not all
    lacking: Mapping[int, str] = field(default_factory=dict)  # why other layers that have attention do not obey


@dataclass(frozen=True)
class ModuleAbilities:
    """What the modules of a model obey beside programs of edits."""

    attention: AttentionAbilities | None = None  # None: attention was left alone
    routing: Mapping[int, Scheme] = field(default_factory=dict)  # how each layer with experts selects them

    def to_wire(self) -> dict[str, Any]:
        """Plain data. A router's own bias stays where it is: nothing is checked against it."""
        routing = {layer: asdict(replace(scheme, bias=None)) for layer, scheme in self.routing.items()}
        return {"attention": self.attention and asdict(self.attention), "routing": routing}

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> "ModuleAbilities":
        attention = wire["attention"]
        routing = {layer: Scheme(**scheme) for layer, scheme in wire["routing"].items()}
        return ModuleAbilities(attention and AttentionAbilities(**attention), routing)


@dataclass(frozen=True)
class Limit:
    """What an operator allows: edits beyond a relative dose are refused, or weakened until they keep to it."""

    max_dose: float
    policy: Literal["refuse", "clamp"] = "refuse"


@dataclass(frozen=True, kw_only=True)
class Served(ABC):
    """One served model."""

    hook_points: frozenset[HookPoint] = frozenset()  # where edits can be made
    attention: AttentionAbilities | None = None  # what the attention layers obey; None: they were left alone
    routing: Mapping[int, Scheme] = field(default_factory=dict)  # how each layer with experts selects them
    takes_soft_prompts: bool = True
    dtype: str = "float32"  # of activations
    lengths: Lengths = field(default_factory=lambda: Lengths({}))
    limit: Limit | None = None
    tensor_parallel: int = 1

    @property
    @abstractmethod
    def model(self) -> ModelShape:
        """Its sizes."""
