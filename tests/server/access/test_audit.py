"""The audit log: a line for each event, nothing that a request says, and no end of the service without a disk."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from whipstaff.server import metrics
from whipstaff.server.access.audit import MOST, Audit


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_are_lines_for_its_owner_only(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    Audit(path).event("change", key="root", object="happy", param=None)
    (line,) = lines(path)
    assert line.pop("ts").endswith("+00:00") and line == {"event": "change", "key": "root", "object": "happy"}
    assert path.stat().st_mode & 0o777 == 0o600


def test_many_refusals_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    log = Audit(tmp_path / "audit.jsonl")
    for _ in range(MOST + 7):
        log.refusal("a", status=429)
    log.refusal("b", status=401)
    now[0] += 1
    log.refusal("a", status=429)
    said = lines(tmp_path / "audit.jsonl")
    assert [one["event"] for one in said] == ["refusal"] * (MOST + 1) + ["refusals", "refusal"]
    assert said[-2]["key"] == "a" and said[-2]["unwritten"] == 7


def test_a_file_that_was_moved_away_is_opened_anew(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = Audit(path)
    log.event("one")
    path.rename(tmp_path / "old.jsonl")
    log.event("two")
    log.reopen()
    log.event("three")
    assert [one["event"] for one in lines(tmp_path / "old.jsonl")] == ["one", "two"]
    assert [one["event"] for one in lines(path)] == ["three"]


def test_a_full_disk_does_not_end_the_service() -> None:
    before = metrics.AUDIT_LOST._value.get()
    Audit(Path("/dev/full")).event("change")
    assert metrics.AUDIT_LOST._value.get() == before + 1
    Audit(None).event("change")
    Audit(None).refusal("a")
