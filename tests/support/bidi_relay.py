"""Stands between Playwright and a stock Firefox: `python bidi_relay.py FIREFOX [its arguments]` runs it, and relays
WebDriver BiDi.

Playwright begins every context with a command that Debian's Firefox does not know yet. It is answered here: nothing is
emulated, and a story that asks for it shows what the browser has by itself.
"""

import asyncio
import json
import re
import sys
from asyncio.subprocess import PIPE
from functools import partial

from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

UNKNOWN = ("emulation.setMediaFeaturesOverride",)


async def pump(source: ClientConnection | ServerConnection, target: ClientConnection | ServerConnection) -> None:
    """Until the source ends; then the target does."""
    try:
        async for message in source:
            said = json.loads(message)
            if said.get("method") in UNKNOWN:
                await source.send(json.dumps({"type": "success", "id": said["id"], "result": {}}))
            else:
                await target.send(message)
    except ConnectionClosed:
        pass
    finally:
        await target.close()


async def relay(client: ServerConnection, url: str) -> None:
    """One connection of Playwright's."""
    assert client.request is not None
    async with connect(url + client.request.path, max_size=None, origin=None) as firefox:
        await asyncio.gather(pump(client, firefox), pump(firefox, client))


async def main(command: list[str]) -> int:
    """Firefox's exit status."""
    firefox = await asyncio.create_subprocess_exec(*command, stderr=PIPE)
    assert firefox.stderr is not None
    async for line in firefox.stderr:
        text = line.decode(errors="replace").rstrip()
        if found := re.search(r"WebDriver BiDi listening on (ws://\S+)", text):
            server = await serve(partial(relay, url=found[1]), "127.0.0.1", 0, max_size=None)
            port = server.sockets[0].getsockname()[1]
            text = f"WebDriver BiDi listening on ws://127.0.0.1:{port}"
        print(text, file=sys.stderr, flush=True)
    return await firefox.wait()


if __name__ == "__main__":
    sys.exit(asyncio.run(main(sys.argv[1:])))
