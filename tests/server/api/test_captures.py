"""The route of files: a server that was told to end waits for those that are being sent; without files it says so."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient

from whipstaff.server.access.capture_files import CaptureFiles
from whipstaff.server.api import captures, generate
from whipstaff.server.errors import WhipstaffError


class Life:
    """Counts what is being answered."""

    num = 0

    @contextmanager
    def answering(self) -> Iterator[None]:
        self.num += 1
        try:
            yield
        finally:
            self.num -= 1


def serving(files: CaptureFiles | None) -> tuple[TestClient, Life]:
    app, life = FastAPI(), Life()
    app.state.whipstaff_captures, app.state.whipstaff_life = files, life
    app.include_router(captures.router)
    app.add_exception_handler(WhipstaffError, generate.answer_refusal)
    return TestClient(app), life


def test_who_is_fetching_is_being_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, seen, pieces = CaptureFiles(tmp_path, 1, 1 << 20, 60), list[int](), captures._pieces
    number = files.fill(files.reserve(1 << 20), {"0.0.positions": torch.arange(9)}).id
    http, life = serving(files)

    def watched(file: BinaryIO) -> Iterator[bytes]:
        for piece in pieces(file):
            seen.append(life.num)
            yield piece

    monkeypatch.setattr(captures, "_pieces", watched)
    assert http.get(f"/v1/steering/captures/{number}").status_code == 200
    assert seen == [1] and life.num == 0
    assert http.get("/v1/steering/captures/other").status_code == 404 and life.num == 0


def test_a_server_without_files_says_how_to_have_them() -> None:
    http, _ = serving(None)
    for method in ("GET", "DELETE"):
        answer: Any = http.request(method, "/v1/steering/captures/any")
        assert answer.status_code == 422 and "--max-downloads" in answer.json()["error"]["message"]
