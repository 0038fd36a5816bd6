"""Activations on the disk, one file a hook point: a fit reads them layer by layer, and one that was cut off goes on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit.source import Asked, Source
from whipstaff.steering.method import HookPoint

_EVERY = 64  # texts between two notes of how far it got
Progress = Callable[[str, int, int], None]  # (what, done, of)


class Rows:
    """(texts, positions, width) float32 at each hook point; every text is read at equally many positions.

    Args:
        folder: holds them; whoever named it removes it.
        goes_on: take over what a fit of the same texts, model and places has left there.

    Raises: SteeringError where something is left that is not to be taken over.
    """

    def __init__(
        self, folder: Path, source: Source, asked: Sequence[Asked], points: Sequence[HookPoint], goes_on: bool
    ) -> None:
        counts = {1 if each.is_mean else len(each.positions) for each in asked}
        if len(counts) != 1:
            raise SteeringError(f"texts are read at {sorted(counts)} positions; it has to be equally many", "read")
        self.folder, self.source, self.asked, self.points = folder, source, list(asked), list(points)
        self.num_positions = counts.pop()
        self._state = folder / "state.json"
        self._key = _key(source, asked, points)
        self._start(goes_on)

    def _start(self, goes_on: bool) -> None:
        if self.folder.exists():
            left = json.loads(self._state.read_text()) if self._state.exists() else {}
            if goes_on and left.get("key") != self._key:
                raise SteeringError(
                    f"{self.folder} is of another fit: of other data, another model or other flags", "resume"
                )
            if not goes_on:
                raise SteeringError(
                    f"{self.folder} is what a fit that was cut off has read: --resume goes on, --force starts anew"
                )
        else:
            self.folder.mkdir()
            self._note(0)

    def _note(self, done: int) -> None:
        temporary = self._state.with_suffix(".new")
        temporary.write_text(json.dumps({"key": self._key, "done": done}))
        temporary.replace(self._state)

    @property
    def num_done(self) -> int:
        return int(json.loads(self._state.read_text())["done"])

    def _map(self, point: HookPoint, mode: Any) -> NDArray[np.float32]:
        shape = (len(self.asked), self.num_positions, self.source.shape.width(point.site))
        return np.memmap(self.folder / f"{point.site}.{point.layer}.f32", np.float32, mode, shape=shape)

    def collect(self, progress: Progress) -> "Rows":
        """Read what is not there yet."""
        done, total = self.num_done, len(self.asked)
        files = {point: self._map(point, "r+" if done else "w+") for point in self.points}
        progress("reading", done, total)
        for found in self.source.read(self.asked[done:], self.points) if done < total else ():
            for point, rows in found.items():
                if not torch.isfinite(rows).all():
                    raise SteeringError(f"text {done + 1}: {point.site} {point.layer} is not finite")
                files[point][done] = rows.numpy()
            done += 1
            if done % _EVERY == 0 or done == total:
                for file in files.values():
                    file.flush()  # type: ignore[attr-defined]  # a memmap's
                self._note(done)
            progress("reading", done, total)
        return self

    def at(self, point: HookPoint, position: int = 0) -> NDArray[np.float32]:
        """(texts, width) of one hook point and position, in memory."""
        return np.array(self._map(point, "r")[:, position])


def _key(source: Source, asked: Sequence[Asked], points: Sequence[HookPoint]) -> str:
    said = [source.identity(), [list(point) for point in points]]
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for each in asked:
        digest.update(repr((each.ids, each.positions, each.is_mean)).encode())
    return digest.hexdigest()
