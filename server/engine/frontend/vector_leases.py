"""Which vectors the workers hold for this process: those of which somebody here has a lease.

A request in flight has one until its response was sent, and `Engine.generate` another until the engine has finished it
or was told to abort it; so a vector that was replaced stays as long as somebody may look it up and not longer, whether
the request runs, was preempted or waits for slots. What this process sends arrives in order: a request's abort comes
before the word that its vector may go. Workers count the processes that hold a vector.
"""

import asyncio
import contextlib
from pathlib import Path

from vllm.v1.engine.exceptions import EngineDeadError

from whipstaff.server.engine.frontend.launch import Engine
from whipstaff.server.leases import Leases
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.vector_file import Vector, read


class VectorLeases(Leases):
    """Of one process; its name is its own among those that share the workers."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(self._drop_soon)
        self._engine, self._holder = engine, f"api-server-{engine.index}"
        self._vectors: dict[str, Vector] = {}  # by digest, what was read and is held
        self._loaded: set[str] = set()  # digests of what the workers hold for this process
        self._order = asyncio.Lock()  # of loading and dropping
        self._tasks: set[asyncio.Task[None]] = set()

    async def read(self, path: Path, digest: str) -> Vector:
        """The vector of a digest that the caller holds, the same object each time. Raises: SteeringError, OSError."""
        vector = self._vectors.get(digest)
        if vector is None:
            vector = await asyncio.to_thread(read, path)
            if vector.digest != digest:
                raise SteeringError(f"{path} has the digest {vector.digest}")
            vector = self.adopt(vector)
        return vector

    def adopt(self, vector: Vector) -> Vector:
        """The one object that stands for a vector that was read, whose digest the caller holds."""
        return self._vectors.setdefault(vector.digest, vector)

    async def load(self, vector: Vector, path: Path) -> str | None:
        """Have the workers hold a vector, whose file is at `path` and of which the caller has a lease; what is in the
        way, or None."""
        async with self._order:
            if vector.digest in self._loaded:
                return None
            answers = await self._engine.collective_rpc(
                "whipstaff_load_vector", args=(str(path), vector.digest, self._holder)
            )
            problem: str | None = next(filter(None, answers), None)
            if problem is None:
                self._loaded.add(vector.digest)
            else:
                await self._forget(vector.digest)
        return problem

    def _drop_soon(self, digest: str) -> None:
        """Nobody holds it any more."""
        task = asyncio.get_running_loop().create_task(self._drop_unless_held(digest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drop_unless_held(self, digest: str) -> None:
        async with self._order:
            if digest in self:
                return
            self._vectors.pop(digest, None)
            if digest in self._loaded:
                await self._forget(digest)

    async def _forget(self, digest: str) -> None:
        self._loaded.discard(digest)
        with contextlib.suppress(EngineDeadError):
            await self._engine.collective_rpc("whipstaff_drop_vector", args=(digest, self._holder))
