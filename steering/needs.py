"""What a set of vectors needs of the engine that will serve them, known before it starts."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from whipstaff.steering.method import HookPoint
from whipstaff.steering.shape import SITES, Site
from whipstaff.steering.sites import canonical
from whipstaff.steering.vector_file import Vector

Hook = Site | Literal["attention"]  # what an operator may ask for: a site, or the attention computation itself


@dataclass(frozen=True)
class Needs:
    """Sites to hook, and room for the encoders of TopK autoencoders: features by place."""

    sites: frozenset[Site] = frozenset()
    attention: bool = False
    encoders: dict[HookPoint, int] = field(default_factory=dict)

    @staticmethod
    def of(vectors: Iterable[Vector], hooks: Iterable[Hook] = ()) -> "Needs":
        """What `vectors` need, and `hooks` besides."""
        asked = set(hooks)
        sites, attention = {site for site in SITES if site in asked}, "attention" in asked
        encoders: dict[HookPoint, int] = {}
        for vector in vectors:
            if vector.method.served_by == "attention":
                attention = True
                continue
            for place, tensors in vector.tensors.items():
                at = canonical(place)
                sites.add(at.site)
                if size := vector.method.encoder_size(tensors, vector.header.defaults):
                    encoders[at] = encoders.get(at, 0) + size
        return Needs(frozenset(sites), attention, encoders)
