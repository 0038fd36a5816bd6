"""What a set of vectors needs of the engine that will serve them, known before it starts."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from whipstaff.steering.artifacts import Vector
from whipstaff.steering.method import Place
from whipstaff.steering.shape import Site
from whipstaff.steering.sites import canonical


@dataclass(frozen=True)
class Needs:
    """Sites to hook, and room for the encoders of TopK autoencoders: features by place."""

    sites: frozenset[Site] = frozenset()
    encoders: dict[Place, int] = field(default_factory=dict)

    @staticmethod
    def of(vectors: Iterable[Vector], sites: Iterable[Site] = ()) -> "Needs":
        """What `vectors` need, and `sites` besides."""
        wanted, encoders = set(sites), dict[Place, int]()
        for vector in vectors:
            for place, tensors in vector.tensors.items():
                at = canonical(place)
                wanted.add(at.site)
                if size := vector.method.encoder_size(tensors, vector.header.defaults):
                    encoders[at] = encoders.get(at, 0) + size
        return Needs(frozenset(wanted), encoders)
