"""Receipts: what was done to a request, for its response. Same request and same receipt mean same behaviour."""

import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

from whipstaff.server.admission.explanations import Explained
from whipstaff.server.admission.steering import Fed

FIELD = "whipstaff"


class Tally:
    """Counts the tokens of a request's sequences as its outputs pass by, and keeps them where the plan needs them."""

    def __init__(self) -> None:
        self.keeps_tokens = False
        self._prompts: dict[str, list[int]] = {}
        self._generated: dict[tuple[str, int], list[int]] = {}
        self._counts: dict[tuple[str, int], int] = {}

    def note(self, output: Any) -> None:
        """One vLLM RequestOutput; its token ids are what came since the last one."""
        if output.prompt_token_ids is not None:
            self._prompts[output.request_id] = output.prompt_token_ids
        for sequence in output.outputs:
            key = output.request_id, sequence.index
            self._counts[key] = self._counts.get(key, 0) + len(sequence.token_ids)
            if self.keeps_tokens:
                self._generated.setdefault(key, []).extend(sequence.token_ids)

    def fed(self) -> list[Fed]:
        """Every sequence."""
        found = []
        for (request_id, index), generated in self._counts.items():
            prompt = self._prompts[request_id]
            ids = [*prompt, *self._generated[request_id, index]] if self.keeps_tokens else []
            found.append(Fed(len(prompt), len(prompt) + max(generated - 1, 0), ids))
        return found


async def with_extras(
    chunks: AsyncGenerator[str, None],
    receipt: Callable[[], Awaitable[dict[str, Any]]],
    explained: Explained | None,
) -> AsyncGenerator[str, None]:
    """Server-sent events with explanations in every choice, and the receipt in the last data event before [DONE].
    Closing this closes `chunks`."""
    held: str | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.startswith("data: [DONE]") and held is not None:
                held = _changed(held, {FIELD: await receipt()})
            if held is not None:
                yield held
            held = chunk if explained is None or chunk.startswith("data: [DONE]") else _changed(chunk, {}, explained)
    if held is not None:
        yield held


def _changed(event: str, more: dict[str, Any], explained: Explained | None = None) -> str:
    body = {**json.loads(event.removeprefix("data: ")), **more}
    if explained is not None:
        explained.add_to(body)
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
