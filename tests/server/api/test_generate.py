"""What a request names is held from the moment at which it was looked up."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.responses import Response

from whipstaff.server.api import generate
from whipstaff.server.engine.frontend import openai
from whipstaff.server.engine.frontend.requests import OpenAIRequest, TextRequest
from whipstaff.server.leases import Lease, Leases
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.presets import Preset
from whipstaff.server.registry.vectors import VectorFile, VectorSnapshot

PRESET = Preset.of("calm", {"default": {"steering": {"vector": "late"}}})


class Registry:
    """Holds what it names; whatever nobody holds is gone at once."""

    def __init__(self, caps: Capabilities) -> None:
        self.gone: set[str] = set()
        self._leases = Leases(self.gone.add)
        self._caps = replace(caps, presets={PRESET.name: PRESET})
        self._own = self.hold(entry.vector for entry in self._caps.registry)

    async def current(self) -> Capabilities:
        return self._caps

    def hold(self, vectors: Any) -> Lease:
        return self._leases.hold(vector.digest for vector in vectors)

    def replace_late(self) -> None:
        """Another vector gets the name that the preset says."""
        files = {entry.name: VectorFile(entry.path, entry.vector) for entry in self._caps.registry}
        files["late"] = VectorFile(files["late"].path, replace(files["late"].vector, digest="another"))
        self._caps = replace(self._caps, registry=VectorSnapshot(files, self._caps.registry.model))
        before, self._own = self._own, self.hold(entry.vector for entry in self._caps.registry)
        before.release()


def test_a_vector_that_is_replaced_while_the_body_is_read_is_not_lost(
    caps: Capabilities, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A preset fills in what the body does not say, so its body is read again, and meanwhile the registry may change:
    what the request then names must be there until it was answered."""
    registry, named = Registry(caps), list[str]()
    old = caps.registry.entry("late").vector.digest

    async def body() -> dict[str, Any]:
        await asyncio.sleep(0)
        registry.replace_late()
        return {"model": "tiny@calm", "prompt": "Why?"}

    async def answer(request: OpenAIRequest, _: Any) -> Response:
        compiled: Any = request._compiled
        named.extend(vector.digest for vector in compiled.vectors)
        assert not registry.gone & set(named)
        return Response()

    models = SimpleNamespace(is_base_model=lambda name: name == "tiny", lora_requests={})
    state = SimpleNamespace(whipstaff=registry, openai_serving_models=models)
    raw: Any = SimpleNamespace(app=SimpleNamespace(state=state), json=body)
    monkeypatch.setattr(openai, "answer", answer)

    async def run() -> None:
        async with AsyncExitStack() as at_end:
            await generate.generate(TextRequest(model="tiny@calm", prompt="Why?"), raw, at_end)

    asyncio.run(run())
    assert named == ["another"] and registry.gone == {old}
