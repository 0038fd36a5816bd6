"""The application refuses to serve a model that does not obey."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from whipstaff.server import app
from whipstaff.server.engine import SelfTestFailed
from whipstaff.server.engine.frontend.selftest import Finding
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorSnapshot
from whipstaff.steering.shape import ModelShape

SHAPE = ModelShape(architecture="Test", hidden_size=8, num_layers=1, num_heads=2, head_dim=4)
GOOD = Finding("resid_post of layer 0", changes=True, off_is_off=True)
DEAF = Finding("attn_head of layer 0", changes=False, off_is_off=True)
LEAKY = Finding("auxiliary model expert", changes=True, off_is_off=False)


def prove(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> list[Finding]:
    async def fake(engine: Any, auxiliaries: list[str]) -> AsyncIterator[Finding]:
        for finding in findings:
            yield finding

    monkeypatch.setattr(app, "self_test", fake)
    return asyncio.run(app.prove(None, Capabilities(VectorSnapshot({}, SHAPE), {})))  # type: ignore[arg-type]


def test_a_model_that_obeys_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    assert prove(monkeypatch, GOOD, GOOD) == [GOOD, GOOD]


@pytest.mark.parametrize("bad", [DEAF, LEAKY])
def test_one_that_does_not_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, bad: Finding) -> None:
    with pytest.raises(SelfTestFailed, match=f"{bad.what} did not obey"):
        prove(monkeypatch, GOOD, bad)
