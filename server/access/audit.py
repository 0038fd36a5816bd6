"""The audit log: who changed what, what was refused to whom. One JSON object a line; nothing that a request says."""

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from whipstaff.server import metrics

MOST = 10  # refusals of one key a second that are written one by one


class Audit:
    """Of one process; several may write to one file, a line at a time."""

    def __init__(self, path: Path | None) -> None:
        """None: nothing is written. Raises: OSError."""
        self._path, self._file = path, -1
        self._second, self._counts = 0, dict[str, int]()
        self.reopen()

    def reopen(self) -> None:
        """The file was moved away. Raises: OSError."""
        if self._path is not None:
            before, self._file = self._file, os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            if before >= 0:
                os.close(before)

    def refusal(self, key: str, **said: Any) -> None:
        """What was refused; of many in one second, some, and how many there were."""
        if self._path is None:
            return
        if (second := int(time.monotonic())) != self._second:
            for name, count in self._counts.items():
                if count > MOST:
                    self.event("refusals", key=name, unwritten=count - MOST)
            self._second, self._counts = second, {}
        self._counts[key] = self._counts.get(key, 0) + 1
        if self._counts[key] <= MOST:
            self.event("refusal", key=key, **said)

    def event(self, event: str, **said: Any) -> None:
        """A disk that is full does not end the service; what was lost is counted."""
        if self._path is None:
            return
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = json.dumps({"ts": now, "event": event, **{k: v for k, v in said.items() if v is not None}}) + "\n"
        try:
            os.write(self._file, line.encode())
        except OSError:
            metrics.AUDIT_LOST.inc()
