"""The registry's folder: whatever stops a writer, what is read is the old state or the new one, never a mixture."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import environment

from whipstaff.server.errors import StorageFull
from whipstaff.server.registry.folder import BadStore, Manifest, RegistryFolder
from whipstaff.server.registry.vectors import BadVectorFile, VectorFile, VectorSnapshot, read_stored
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header, packed, parse, read

SHAPE = ModelShape(architecture="Test", hidden_size=8, num_layers=2, num_heads=2, head_dim=4)
NUM_KILLS = 8


def data(number: int) -> bytes:
    return packed(Header(method="caa", model=SHAPE), {"resid_post.0.add": torch.full((8,), float(number + 1))})


def keep(store: RegistryFolder, name: str, content: bytes) -> Path:
    with store.locked():
        path = store.put(content)
        manifest = store.read()
        digest = hashlib.sha256(content).hexdigest()
        store.commit(manifest.model_copy(update={"vectors": manifest.vectors | {name: digest}}))
        store.sweep()
    return path


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_what_is_kept_is_found_again_bit_for_bit(tmp_path: Path) -> None:
    path = keep(RegistryFolder(tmp_path / "new" / "folder"), "one", data(1))
    again = RegistryFolder(tmp_path / "new" / "folder")
    assert again.read().vectors == {"one": hashlib.sha256(data(1)).hexdigest()}
    assert path.read_bytes() == data(1) and path.name == f"{parse(data(1)).digest}.safetensors"
    (found,) = read_stored(again, {}).values()
    assert found.vector.digest == parse(data(1)).digest and not found.is_fixed


def test_every_change_changes_the_stamp(tmp_path: Path) -> None:
    store = RegistryFolder(tmp_path)
    seen = {store.stamp()}
    for number in range(20):
        keep(store, "one", data(number % 2))
        seen.add(store.stamp())
    assert len(seen) == 21


def test_replaced_and_half_written_files_are_swept(tmp_path: Path) -> None:
    store = RegistryFolder(tmp_path)
    for number in range(3):
        keep(store, "one", data(number))
    keep(store, "same", data(2))
    (tmp_path / "objects" / ".half").write_bytes(b"x")
    RegistryFolder(tmp_path)
    assert files(tmp_path) == {"lock", "manifest.json", f"objects/{parse(data(2)).digest}.safetensors"}


@pytest.mark.parametrize("step", ["fsync", "replace", "chmod"])
def test_a_disk_that_fails_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    store = RegistryFolder(tmp_path)
    keep(store, "one", data(1))
    before = files(tmp_path)

    def fail(*args: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="the disk is full"):
        keep(store, "one", data(2))
    monkeypatch.undo()
    assert files(tmp_path) == before and store.read().vectors == {"one": parse(data(1)).digest}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_what_finds_no_room_is_said_so(tmp_path: Path, number: int) -> None:
    store = RegistryFolder(tmp_path)
    with pytest.raises(StorageFull, match="nothing was changed"), store.spool():
        raise OSError(number, "full")
    with pytest.raises(OSError, match="broken"), store.spool():
        raise OSError(errno.EIO, "broken")


def test_a_spool_has_no_name(tmp_path: Path) -> None:
    store = RegistryFolder(tmp_path)
    before = files(tmp_path)
    with store.spool() as file:
        file.write(b"x" * 100_000)
        file.flush()
        assert files(tmp_path) == before


def test_damaged_folders_are_refused_with_the_file(tmp_path: Path) -> None:
    store = RegistryFolder(tmp_path)
    path = keep(store, "one", data(1))
    path.write_bytes(data(1)[:-3])
    with pytest.raises(BadVectorFile, match=f"'one', {path}: not a sound safetensors file"):
        read_stored(store, {})
    path.write_bytes(data(2))
    with pytest.raises(BadVectorFile, match="the file was changed"):
        read_stored(store, {})
    with pytest.raises(BadVectorFile, match="two vectors are called 'one'"):
        read_stored(store, {"one": VectorFile(path, read(path))})
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(BadStore, match=r"manifest\.json cannot be read"):
        RegistryFolder(tmp_path)


def test_a_registry_says_why_the_workers_cannot_hold_a_vector(tmp_path: Path) -> None:
    path = keep(RegistryFolder(tmp_path), "one", data(1))
    registry = VectorSnapshot({"one": VectorFile(path, read(path), False, "no room")}, SHAPE)
    assert registry.entry("one").problem == "no room" and registry.names == []


WRITER = """
import sys
from hashlib import sha256
from pathlib import Path
from whipstaff.server.registry.folder import RegistryFolder
store = RegistryFolder(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for number in range(5):
        data = str(number).encode() * 10_000
        with store.locked():
            store.put(data)
            manifest = store.read()
            vectors = manifest.vectors | {sys.argv[2]: sha256(data).hexdigest()}
            store.commit(manifest.model_copy(update={"vectors": vectors}))
            store.sweep()
"""


def test_writers_of_two_processes_and_kills_leave_a_whole_registry(tmp_path: Path) -> None:
    for _ in range(NUM_KILLS):
        writers = [
            subprocess.Popen(
                [sys.executable, "-c", WRITER, str(tmp_path), name], stdout=subprocess.PIPE, env=environment()
            )
            for name in ("one", "two")
        ]
        for writer in writers:
            assert writer.stdout is not None and writer.stdout.readline() == b"ready\n"
        time.sleep(0.1)
        for writer in writers:
            writer.send_signal(signal.SIGKILL)
            writer.communicate()
        store = RegistryFolder(tmp_path)
        vectors = store.read().vectors
        assert set(vectors) <= {"one", "two"}
        assert all(
            hashlib.sha256(store.path_of(digest).read_bytes()).hexdigest() == digest for digest in vectors.values()
        )
        assert len(list((tmp_path / "objects").iterdir())) == len(set(vectors.values()))
    assert set(vectors) == {"one", "two"}


def test_a_manifest_holds_nothing_else() -> None:
    assert Manifest().model_dump() == {"format": 1, "vectors": {}, "presets": {}}
