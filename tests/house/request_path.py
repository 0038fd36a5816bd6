"""Which of our files a request enters, from its HTTP route to the kernels and back, in the API server's process and in
that of the scheduler and the worker: found by tracing them.

    cd tests && ../.venv/bin/python -m house.request_path

A file counts when a function of it runs while one request is answered, by a server that answered its like before, from
its route on: what every request passes before it, bounds and keys, is no part of its way. It is on the way to the
kernels when that was before the last of the request's kernels was first called; where it calls none of ours, before
the worker entered the last of its files.
"""

import asyncio
import json
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the worker shares the process of the scheduler
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
_ROUTES = os.path.join("server", "api", "generate.py")
_KERNELS = os.path.join("cuda_ext", "__init__.py")
_OURS = tuple(f"{ROOT / room}{os.sep}" for room in ("server", "steering", "decoding", "cuda_ext"))

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steered": {"steering": {"vector": "push", "scale": 0.1}},
    "proxy-tuned": {"decoding": {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}},
    "cfg": {"decoding": {"method": "cfg", "guidance_scale": 2.0, "negative_prompt": "You are rude."}},
}


class Trace:
    """The files of ours in which this process called a function, and the kernels, with when it first did."""

    def __init__(self) -> None:
        self._is_on = False
        self._files: dict[str, float] = {}
        self._kernels: dict[str, float] = {}
        threading.setprofile(self._note)  # of threads that begin from here on
        sys.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if self._is_on and event == "call":
            name = frame.f_code.co_filename
            if name.startswith(_OURS) and frame.f_code.co_name != "<module>":
                if name.endswith(_ROUTES) and name not in self._files:
                    self._files.clear()
                self._files.setdefault(name, time.monotonic())  # one clock for all processes
                if name.endswith(_KERNELS):
                    self._kernels.setdefault(frame.f_code.co_name, time.monotonic())

    def start(self) -> None:
        self._files, self._kernels, self._is_on = {}, {}, True

    def stop(self) -> tuple[dict[str, float], list[float]]:
        """When each file was first entered, and each kernel first called."""
        self._is_on = False
        return {str(Path(name).relative_to(ROOT)): at for name, at in self._files.items()}, [*self._kernels.values()]


TRACE = Trace()


class TracedWorker:
    """What vLLM adds to the worker, which shares a process with the scheduler."""

    def trace_start(self) -> None:
        TRACE.start()

    def trace_stop(self) -> tuple[dict[str, float], list[float]]:
        return TRACE.stop()


class Way(NamedTuple):
    """The files that a request enters, in their order."""

    there: list[str]  # to the kernels
    back: list[str]


async def traced(folder: Path) -> dict[str, Way]:
    """The way of each of REQUESTS."""
    import httpx
    from serving import save_models, save_vectors

    from whipstaff.server import app
    from whipstaff.server.commands.main import parse
    from whipstaff.server.engine.frontend import openai
    from whipstaff.server.engine.frontend.lifecycle import Lifecycle
    from whipstaff.server.registry import live

    live.PAUSE = 3600.0  # nobody looks at the registry but the requests
    made, vectors = save_models(folder), save_vectors(folder / "vectors")
    words = [
        *(made["base"], "--served-model-name", "tiny", "--dtype", "float32", "--enforce-eager"),
        *("--max-model-len", "256", "--max-num-seqs", "4", "--kv-cache-memory-bytes", "64M"),
        *("--vectors", str(vectors), "--aux", f"expert={made['expert']}", "--aux", f"anti={made['anti']}"),
        *("--worker-extension-cls", "house.request_path.TracedWorker", "--distributed-executor-backend", "uni"),
    ]
    args, settings = parse("serve", words)
    files, store = app.read_files(settings)
    engine = app.launch(args, settings, files)
    try:
        library = await app.load(engine, settings, files, store)
        served = await app.extend(await openai.build(engine, args), engine, library, settings, Lifecycle(engine, 0, ()))
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(served), base_url="http://test", timeout=120
        ) as http:
            return {name: await _way_of(http, engine, fields) for name, fields in REQUESTS.items()}
    finally:
        engine.shutdown()


async def _way_of(http: Any, engine: Any, fields: dict[str, Any]) -> Way:
    async def ask(content: str) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
        answer = await http.post("/v1/chat/completions", json=body | fields)
        assert answer.status_code == 200, answer.text

    for content in ("How do you do?", "And how are you?"):
        await ask(content)
    await engine.collective_rpc("trace_start")
    TRACE.start()
    await ask("What is this?")
    here, _ = TRACE.stop()
    ((there, kernels),) = await engine.collective_rpc("trace_stop")
    first = {file: min(files[file] for files in (here, there) if file in files) for file in here | there}
    files, end = sorted(first, key=first.__getitem__), max(kernels or there.values())
    return Way([file for file in files if first[file] <= end], [file for file in files if first[file] > end])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(traced(Path(folder)))
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    for name, way in found.items():
        print(f"{name}: {len(way.there)} files to the kernels", *way.there, sep="\n    ")
        print(f"  and {len(way.back)} on the way back", *way.back, sep="\n    ")


if __name__ == "__main__":
    main()
