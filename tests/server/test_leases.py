"""A vector leaves when the last who needs it lets go, and not before."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from catalogues import SHAPE

from whipstaff.server.engine.frontend.vector_leases import VectorLeases
from whipstaff.server.leases import NOTHING, Leases
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.vector_file import Header, Vector, packed, parse


def test_the_last_to_let_go_is_told() -> None:
    gone: list[str] = []
    leases = Leases(gone.append)
    one, other = leases.hold(["a", "b", "a"]), leases.hold(["b"])
    one.release()
    one.release()
    assert gone == ["a"] and "b" in leases and "a" not in leases
    with other.again():
        other.release()
        assert gone == ["a"]
    assert gone == ["a", "b"]


def test_what_was_released_holds_nothing() -> None:
    lease = Leases(lambda digest: None).hold(["a"])
    lease.release()
    with pytest.raises(RuntimeError, match="released"):
        lease.again()
    with NOTHING.again():
        pass


class Workers:
    """An engine that keeps what it is told to."""

    index = 0

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.problem: str | None = None

    async def collective_rpc(self, method: str, args: tuple[str, ...]) -> list[Any]:
        await asyncio.sleep(0)
        if method == "whipstaff_load_vector":
            assert args[2] == "api-server-0"
            if self.problem is None:
                self.held.add(args[1])
            return [self.problem]
        assert method == "whipstaff_drop_vector"
        self.held.discard(args[0])
        return [None]


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Vector]:
    data = packed(Header(method="caa", model=SHAPE), {"resid_post.1.add": torch.ones(SHAPE.hidden_size)})
    (tmp_path / "one.safetensors").write_bytes(data)
    return tmp_path / "one.safetensors", parse(data)


async def settled() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_workers_keep_what_is_held(saved: tuple[Path, Vector]) -> None:
    path, vector = saved

    async def run() -> None:
        workers = Workers()
        leases = VectorLeases(workers)  # type: ignore[arg-type]
        registry = leases.hold([vector.digest])
        read = await leases.read(path, vector.digest)
        assert await leases.read(path, vector.digest) is read is leases.adopt(vector)
        assert await leases.load(read, path) is None and workers.held == {vector.digest}
        request = leases.hold([vector.digest])
        registry.release()  # replaced, and a request still runs
        await settled()
        assert workers.held == {vector.digest}
        with request.again():
            request.release()
            await settled()
            assert workers.held == {vector.digest}
        await settled()
        assert workers.held == set()
        with leases.hold([vector.digest]):
            assert await leases.read(path, vector.digest) is not read

    asyncio.run(run())


def test_one_that_is_held_again_at_once_stays(saved: tuple[Path, Vector]) -> None:
    path, vector = saved

    async def run() -> None:
        workers = Workers()
        leases = VectorLeases(workers)  # type: ignore[arg-type]
        before = leases.hold([vector.digest])
        await leases.load(await leases.read(path, vector.digest), path)
        before.release()
        with leases.hold([vector.digest]):
            await settled()
            assert workers.held == {vector.digest}

    asyncio.run(run())


def test_what_workers_cannot_hold_is_forgotten_and_said(saved: tuple[Path, Vector]) -> None:
    path, vector = saved

    async def run() -> None:
        workers = Workers()
        workers.problem = "no room"
        leases = VectorLeases(workers)  # type: ignore[arg-type]
        with leases.hold([vector.digest]):
            assert await leases.load(await leases.read(path, vector.digest), path) == "no room"
            workers.problem = None
            assert await leases.load(vector, path) is None
            with pytest.raises(SteeringError, match="has the digest"):
                await leases.read(path, "another")

    asyncio.run(run())
