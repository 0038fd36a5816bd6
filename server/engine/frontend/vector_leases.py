"""Which vectors the workers hold for this process: those that anything in this process still refers to.

A request in flight refers to the vectors of its plan until the engine has finished it or was told to abort it (see
`PlanDict.keeps`), so a vector that was replaced stays as long as somebody may look it up and not longer, whether the
request runs, was preempted or waits for slots. What this process sends arrives in order: a request's abort comes before
the word that its vector may go. Workers count the processes that hold a vector.
"""

import asyncio
import contextlib
import weakref
from pathlib import Path

from vllm.v1.engine.exceptions import EngineDeadError

from whipstaff.server.engine.frontend.launch import Engine
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.vector_file import Vector, read


class VectorLeases:
    """Of one process; `holder` is its name among those that share the workers."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._holder = engine, f"api-server-{engine.index}"
        self._loop = asyncio.get_running_loop()
        self._alive: weakref.WeakValueDictionary[str, Vector] = weakref.WeakValueDictionary()
        self.loaded: set[str] = set()  # digests of what the workers hold for this process
        self._order = asyncio.Lock()  # of loading and dropping
        self._tasks: set[asyncio.Task[None]] = set()

    async def read(self, path: Path, digest: str) -> Vector:
        """The vector of that digest, the same object for as long as it lives. Raises: SteeringError, OSError."""
        vector = self._alive.get(digest)
        if vector is None:
            vector = self.adopt(await asyncio.to_thread(read, path))
            if vector.digest != digest:
                raise SteeringError(f"{path} has the digest {vector.digest}")
        return vector

    def adopt(self, vector: Vector) -> Vector:
        """The one object that stands for what was read."""
        if (known := self._alive.get(vector.digest)) is not None:
            return known
        self._alive[vector.digest] = vector
        weakref.finalize(vector, self._gone, vector.digest).atexit = False
        return vector

    async def load(self, vector: Vector, path: Path) -> str | None:
        """Have the workers hold a vector, whose file is at `path`, for as long as it lives here; what is in the way, or
        None."""
        async with self._order:
            if vector.digest in self.loaded:
                return None
            answers = await self._engine.collective_rpc(
                "whipstaff_load_vector", args=(str(path), vector.digest, self._holder)
            )
            problem: str | None = next(filter(None, answers), None)
            if problem is None:
                self.loaded.add(vector.digest)
            else:
                await self._forget(vector.digest)
        return problem

    def _gone(self, digest: str) -> None:
        """The last reference to a vector was dropped, in whichever thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed, and the engine with it
            self._loop.call_soon_threadsafe(self._drop_soon, digest)

    def _drop_soon(self, digest: str) -> None:
        task = self._loop.create_task(self._drop_unless_back(digest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _drop_unless_back(self, digest: str) -> None:
        async with self._order:
            if digest in self._alive or digest not in self.loaded:
                return  # it was read again meanwhile, or never loaded
            await self._forget(digest)

    async def _forget(self, digest: str) -> None:
        self.loaded.discard(digest)
        with contextlib.suppress(EngineDeadError):
            await self._engine.collective_rpc("whipstaff_drop_vector", args=(digest, self._holder))
