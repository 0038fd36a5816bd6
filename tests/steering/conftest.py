"""Pickles are opened in processes of their own. Here those have imported torch already, but where a test says no."""

import subprocess
from types import SimpleNamespace

import pytest
import warm

from whipstaff.steering.importers import pickles


@pytest.fixture(autouse=True)
def warm_pickles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "cold_pickles" not in request.fixturenames:
        kept = {name: getattr(subprocess, name) for name in ("DEVNULL", "TimeoutExpired")}
        monkeypatch.setattr(pickles, "subprocess", SimpleNamespace(run=warm.run, **kept))


@pytest.fixture
def cold_pickles() -> None:
    """The process is started as a user's is: isolated, with nothing imported."""
