"""What a set of vectors needs of the engine that will serve them, known before it starts."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import SITES, Site
from whipstaff.steering.vector_file import Vector

Hook = Site | Literal["attention"]  # what an operator may ask for: a site, or the attention computation itself


@dataclass(frozen=True)
class Needs:
    """Sites to hook, and room for the encoders of TopK autoencoders: features by hook point."""

    sites: frozenset[Site] = frozenset()
    attention: bool = False
    encoders: dict[HookPoint, int] = field(default_factory=dict)

    @staticmethod
    def of(vectors: Iterable[Vector], hooks: Iterable[Hook] = ()) -> "Needs":
        """What `vectors` need, and `hooks` besides."""
        asked = set(hooks)
        needs = Needs(frozenset(site for site in SITES if site in asked), "attention" in asked)
        for vector in vectors:
            needs |= vector.method.kind.needs(vector)
        return needs

    @staticmethod
    def of_hook_points(vector: Vector) -> "Needs":
        """What edits of activations need: the vector's sites, and room for its encoders."""
        sizes = {
            point.canonical: vector.method.encoder_size(tensors, vector.header.defaults)
            for point, tensors in vector.tensors.items()
        }
        return Needs(
            frozenset(point.site for point in sizes), encoders={at: size for at, size in sizes.items() if size}
        )

    def __or__(self, other: "Needs") -> "Needs":
        """Both."""
        sizes = {at: self.encoders.get(at, 0) + size for at, size in other.encoders.items()}
        return Needs(self.sites | other.sites, self.attention or other.attention, {**self.encoders, **sizes})
