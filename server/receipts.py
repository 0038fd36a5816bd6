"""Receipts: what was done to a request, for its response. Same request and same receipt mean same behaviour."""

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from whipstaff.server.schema import Compiled

FIELD = "whipstaff"


class Tally:
    """Counts the tokens of a request's sequences as its outputs pass by."""

    def __init__(self) -> None:
        self._prompts: dict[str, int] = {}
        self._generated: dict[tuple[str, int], int] = {}

    def note(self, output: Any) -> None:
        """One vLLM RequestOutput; its token ids are what came since the last one."""
        if output.prompt_token_ids is not None:
            self._prompts[output.request_id] = len(output.prompt_token_ids)
        for sequence in output.outputs:
            key = output.request_id, sequence.index
            self._generated[key] = self._generated.get(key, 0) + len(sequence.token_ids)

    def fed(self) -> list[tuple[int, int]]:
        """(prompt length, positions fed to the model) of every sequence; the last token generated is not fed."""
        return [
            (self._prompts[request_id], self._prompts[request_id] + max(generated - 1, 0))
            for (request_id, _), generated in self._generated.items()
        ]


async def with_receipt(
    chunks: AsyncGenerator[str, None], compiled: Compiled, tally: Tally
) -> AsyncGenerator[str, None]:
    """Server-sent events with the receipt in the last data event before [DONE]. Closing this closes `chunks`."""
    held: str | None = None
    async with aclosing(chunks):
        async for chunk in chunks:
            if chunk.startswith("data: [DONE]") and held is not None:
                held = _with_field(held, compiled.receipt(tally.fed()))
            if held is not None:
                yield held
            held = chunk
    if held is not None:
        yield held


def _with_field(event: str, receipt: dict[str, Any]) -> str:
    body = json.loads(event.removeprefix("data: "))
    return f"data: {json.dumps({**body, FIELD: receipt}, separators=(',', ':'))}\n\n"
