"""Files of activations: whose they are, how much room they have, how long they last, and that nothing is left."""

import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load

from whipstaff.server.access import capture_files
from whipstaff.server.access.capture_files import CaptureFiles, Download, folder_of_captures
from whipstaff.server.access.keys import HOLDER, Holder
from whipstaff.server.access.ledger import Ledger, Meter
from whipstaff.server.access.policy import Policy, View
from whipstaff.server.errors import Forbidden, NotFound, RateLimited, Unavailable

TENSORS = {"0.0.positions": torch.arange(3), "0.0.resid_post.1": torch.randn(3, 5)}
SECONDS = 50.0


class Clock:
    """Time, which passes when it is told to."""

    now = 1000.0

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(capture_files, "time", found)
    return found


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with folder_of_captures(True) as found:
        assert found is not None and found.stat().st_mode & 0o077 == 0
        yield found
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(autouse=True)
def nobody_after() -> Iterator[None]:
    """Whose request it is goes no further than a test."""
    token = HOLDER.set(None)
    yield
    HOLDER.reset(token)


def files_in(folder: Path, most: int = 3, most_bytes: int = 10_000) -> CaptureFiles:
    return CaptureFiles(folder, most, most_bytes, SECONDS)


def left(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir() if path.name not in ("alive", "lock")}


def become(name: str, is_admin: bool = False) -> None:
    view = View(Policy())
    HOLDER.set(Holder(name, is_admin, None, view, Meter.of(Ledger.of_one(), name, view.policy)))


def made(files: CaptureFiles) -> str:
    return files.fill(files.reserve(1000), TENSORS).id


def test_a_file_is_there_for_every_process_until_it_expires(folder: Path, clock: Clock) -> None:
    number = made(files_in(folder))
    other = files_in(folder)
    file, kept = other.open(number)
    clock.now += SECONDS - 1
    other.sweep()
    other.own(number)
    clock.now += 1
    with pytest.raises(NotFound):
        other.own(number)
    other.sweep()
    assert left(folder) == set()
    with file:  # who has begun to fetch it gets the rest
        data = file.read()
    assert len(data) == kept.num_bytes
    assert all(torch.equal(TENSORS[name], tensor) for name, tensor in load(data).items())


def test_a_file_is_its_askers(folder: Path) -> None:
    files = files_in(folder)
    become("one")
    number = made(files)
    files.own(number)
    become("root", is_admin=True)
    files.own(number)
    become("two")
    with pytest.raises(Forbidden) as refused:
        files.open(number)
    assert refused.value.param == "id"
    for unknown in ("cap-" + "0" * 32, "../keys", f"{number}.json", ""):
        with pytest.raises(NotFound):
            files.open(unknown)


def test_room_is_bounded_in_files_and_bytes_and_comes_back(folder: Path, clock: Clock) -> None:
    files = files_in(folder, most=2, most_bytes=3000)
    with pytest.raises(Unavailable, match="--max-download-bytes") as refused:
        files.reserve(3001)
    assert refused.value.param == "capture_format"
    first = files.reserve(2000)
    with pytest.raises(RateLimited) as full:
        files_in(folder, most=2, most_bytes=3000).reserve(1001)
    assert full.value.seconds == 1
    size = files.fill(first, TENSORS).num_bytes
    assert size < 1000
    second = files.reserve(3000 - size)  # what was not used is free again
    clock.now += 10
    with pytest.raises(RateLimited) as full:
        files.reserve(1)
    assert full.value.seconds == SECONDS - 10
    files.drop(second.id)
    files.fill(files.reserve(1000), TENSORS)
    with pytest.raises(RateLimited):
        files.reserve(1)  # there is room, but for no third file
    clock.now += SECONDS
    files.reserve(3000)


def test_a_request_that_ends_without_an_answer_leaves_nothing(folder: Path) -> None:
    files = files_in(folder)
    ended, answered = Download(files), Download(files)
    for one in (ended, answered):
        one.reserve(1000)
    said = answered.fill(TENSORS)
    for one in (ended, answered, Download(files)):
        one.end()
    assert len(list(folder.glob("cap-*"))) == 2
    assert said == {
        "id": said["id"],
        "url": f"/v1/steering/captures/{said['id']}",
        "bytes": files.own(said["id"]).num_bytes,
        "expires": said["expires"],
    }


def test_what_cannot_be_written_is_told_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    download = Download(files_in(folder))
    download.reserve(1000)
    monkeypatch.setattr(capture_files, "save_file", full)
    assert download.fill(TENSORS) == {"problem": "what was read could not be written: No space left on device"}
    download.end()
    assert left(folder) == set()


def _hold(folder: str, told: "multiprocessing.synchronize.Event") -> None:
    tempfile.tempdir = folder
    with folder_of_captures(True) as own:
        assert own is not None
        made(files_in(own))
        told.set()
        signal.pause()


def test_what_a_killed_server_left_goes_when_the_next_one_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    context = multiprocessing.get_context("fork")
    told = context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path), told))
    other.start()
    try:
        assert told.wait(60)
        with folder_of_captures(True):  # a server that lives keeps its own
            assert len(list(tmp_path.iterdir())) == 2
    finally:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert len(list(tmp_path.iterdir())) == 1
    with folder_of_captures(True) as mine:
        assert list(tmp_path.iterdir()) == [mine]
    with folder_of_captures(False) as none:
        assert none is None and list(tmp_path.iterdir()) == []
