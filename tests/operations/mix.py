"""Requests of many kinds at once, for as long as one likes, and some that are refused."""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import torch

from whipstaff.server import demo
from whipstaff.steering import vector_file
from whipstaff.steering.vector_file import Header, packed

ADMIN = {"Authorization": "Bearer admin-secret"}
PAIR = {"method": "proxy_tuning", "expert": "tuned", "antiexpert": "untuned"}
SEARCH = {"method": "opera", "beams": 2, "candidates": 2, "threshold": 2, "switch_length": 1}
PROMPT = "Once upon a time there was"
ASK: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 24, "stream": True}
CHEERFUL = {"vector": "cheerful", "scale": 4}


def probe() -> bytes:
    """A direction for conditions of the demo model."""
    shape = vector_file.read(demo.VECTORS / "cheerful.safetensors").header.model
    direction = torch.randn(shape.hidden_size, generator=torch.Generator().manual_seed(0))
    return packed(Header(method="probe", model=shape), {"resid_post.0.direction": direction})


def kinds(number: int) -> list[dict[str, Any]]:
    """One request of each kind; their scales and prompts come again."""
    scale = 1 + number % 5
    return [
        ASK,
        ASK | {"stream": False, "prompt": f"{PROMPT} a very old and very wise bear number {number % 3}" * 3},
        ASK | {"steering": CHEERFUL | {"scale": scale}},
        ASK | {"steering": CHEERFUL | {"scale": scale, "where": "all"}, "prompt": PROMPT * 20},
        ASK | {"steering": CHEERFUL | {"scale": 12, "when": {"probe": "mood", "above": 0, "decide": "step"}}},
        ASK | {"guidance_scale": 1.5, "negative_prompt": "A sad story"},
        ASK | {"decoding": PAIR},
        ASK | {"decoding": PAIR, "steering": CHEERFUL},
        ASK | {"decoding": [{"method": "typical_p", "p": 0.9}]},
        ASK | {"decoding": {"method": "beam_search", "num_beams": 2}},
        ASK | {"decoding": SEARCH},
        ASK | {"model": "demo@gloomy"},
        ASK | {"model": "demo@helpful"},
    ]


REFUSED: list[tuple[int, str, str, dict[str, Any]]] = [
    (400, "POST", "/v1/completions", {"json": ASK | {"steering": CHEERFUL | {"scale": "much"}}}),
    (401, "DELETE", "/v1/steering/vectors/mood", {"headers": {"Authorization": "Bearer guess"}}),
    (404, "POST", "/v1/completions", {"json": ASK | {"steering": {"vector": "absent"}}}),
    (409, "DELETE", "/v1/steering/vectors/cheerful", {"headers": ADMIN}),
    (413, "POST", "/v1/steering/vectors?name=large", {"headers": ADMIN, "content": b"\0" * 2_000_000}),
    (422, "POST", "/invocations", {"json": {"model": "demo", "prompt": "x", "steering": CHEERFUL}}),
]


class Mix:
    """Asks one server."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=300)
        self.ended = 0
        self.wrong: list[str] = []

    async def run(self, seconds: float) -> None:
        async with self._client:
            until = time.monotonic() + seconds
            await self._change("mood")  # before anybody names it
            lanes = [self._lane(index, until) for index in range(len(kinds(0)))]
            await asyncio.gather(*lanes, self._now_and_then(until))

    async def _lane(self, index: int, until: float) -> None:
        for number in itertools.count():
            if time.monotonic() > until:
                return
            answer = await self._client.post("/v1/completions", json=kinds(number)[index])
            self._expect(answer, 200, 503)
            self.ended += answer.status_code == 200

    async def _now_and_then(self, until: float) -> None:
        """What is rare: refusals, clients that leave, more at once than there is room for, changes of the registry."""
        acts: list[Callable[[], Awaitable[None]]] = [self._refusals, self._leave, self._crowd, self._replace]
        for act in itertools.cycle(acts):
            if time.monotonic() > until:
                return
            await act()
            await asyncio.sleep(1)

    async def _refusals(self) -> None:
        for status, method, path, said in REFUSED:
            try:
                self._expect(await self._client.request(method, path, **said), status)
            except (httpx.ReadError, httpx.WriteError):
                if status != 413:  # who hangs up before all has come may not be heard
                    raise

    async def _leave(self) -> None:
        body = ASK | {"max_tokens": 400, "ignore_eos": True, "steering": CHEERFUL}
        async with self._client.stream("POST", "/v1/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                return

    async def _crowd(self) -> None:
        asks = [self._client.post("/v1/completions", json=ASK | {"stream": False}) for _ in range(30)]
        for answer in await asyncio.gather(*asks):
            self._expect(answer, 200, 503)

    async def _replace(self) -> None:
        await self._change("passing")
        self._expect(await self._client.delete("/v1/steering/vectors/passing", headers=ADMIN), 200)

    async def _change(self, name: str) -> None:
        answer = await self._client.post("/v1/steering/vectors", params={"name": name}, content=probe(), headers=ADMIN)
        self._expect(answer, 200, 201)

    def _expect(self, answer: httpx.Response, *statuses: int) -> None:
        if answer.status_code not in statuses:
            self.wrong.append(f"{answer.request.method} {answer.request.url.path}: {answer.status_code} {answer.text}")
