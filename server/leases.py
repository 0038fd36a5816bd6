"""Leases: how long a vector is needed, counted in plain sight.

The registry holds what it names, a request what its plan names until its response was sent, and the engine the same
until it has ended the request. Whatever nobody holds any more may leave the workers.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from types import TracebackType


class Lease:
    """Digests that stay until `release`, or the end of the `with` block."""

    def __init__(self, leases: "Leases", digests: frozenset[str]) -> None:
        self._leases, self._digests, self._is_held = leases, digests, True

    def again(self) -> "Lease":
        """A second one of the same. Raises: RuntimeError if this one was released."""
        if not self._is_held:
            raise RuntimeError("a lease that was released holds nothing")
        return self._leases.hold(self._digests)

    def release(self) -> None:
        """Once; to repeat it does nothing."""
        if self._is_held:
            self._is_held = False
            self._leases._drop(self._digests)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Leases:
    """Of one process, in its event loop."""

    def __init__(self, on_last: Callable[[str], None]) -> None:
        """`on_last` is told of each digest that nobody holds any more."""
        self._on_last = on_last
        self._held: Counter[str] = Counter()

    def hold(self, digests: Iterable[str]) -> Lease:
        """Keep these for whoever asks, until the lease is released."""
        named = frozenset(digests)
        self._held.update(named)
        return Lease(self, named)

    def __contains__(self, digest: str) -> bool:
        """Whether somebody holds it."""
        return digest in self._held

    def _drop(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._held[digest] -= 1
            if not self._held[digest]:
                del self._held[digest]
                self._on_last(digest)


NOTHING = Leases(lambda digest: None).hold(())
