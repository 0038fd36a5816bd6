"""Which of our files a request enters, from its HTTP route to the kernels and back, in the API server's process and in
that of the scheduler and the worker: found by tracing them.

    cd tests && ../.venv/bin/python -m house.request_path

A file counts when a function of it runs while one request is answered, by a server that answered its like before.
"""

import asyncio
import json
import os
import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "support"))
os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # so that the worker shares the process of the scheduler
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
_OURS = tuple(f"{ROOT / room}{os.sep}" for room in ("server", "steering", "decoding", "cuda_ext"))

REQUESTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "steered": {"steering": {"vector": "push", "scale": 0.1}},
    "proxy-tuned": {"decoding": {"method": "proxy_tuning", "expert": "expert", "antiexpert": "anti"}},
    "cfg": {"decoding": {"method": "cfg", "guidance_scale": 2.0, "negative_prompt": "You are rude."}},
}


class Trace:
    """The files of ours in which this process called a function, in the order in which it first did."""

    def __init__(self) -> None:
        self._is_on = False
        self._files: dict[str, None] = {}
        threading.setprofile(self._note)  # of threads that begin from here on
        sys.setprofile(self._note)

    def _note(self, frame: FrameType, event: str, _: Any) -> None:
        if self._is_on and event == "call":
            name = frame.f_code.co_filename
            if name not in self._files and name.startswith(_OURS) and frame.f_code.co_name != "<module>":
                self._files[name] = None

    def start(self) -> None:
        self._files, self._is_on = {}, True

    def stop(self) -> list[str]:
        self._is_on = False
        return [str(Path(name).relative_to(ROOT)) for name in self._files]


TRACE = Trace()


class TracedWorker:
    """What vLLM adds to the worker, which shares a process with the scheduler."""

    def trace_start(self) -> None:
        TRACE.start()

    def trace_stop(self) -> list[str]:
        return TRACE.stop()


async def traced(folder: Path) -> dict[str, list[str]]:
    """The files that each of REQUESTS enters."""
    import httpx
    from serving import save_models, save_vectors

    from whipstaff.server import app
    from whipstaff.server.commands.main import parse
    from whipstaff.server.engine.frontend import openai
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
        served = await app.extend(await openai.build(engine, args), engine, library, settings)
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(served), base_url="http://test", timeout=120
        ) as http:
            return {name: await _files_of(http, engine, fields) for name, fields in REQUESTS.items()}
    finally:
        engine.shutdown()


async def _files_of(http: Any, engine: Any, fields: dict[str, Any]) -> list[str]:
    async def ask(content: str) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0}
        answer = await http.post("/v1/chat/completions", json=body | fields)
        assert answer.status_code == 200, answer.text

    for content in ("How do you do?", "And how are you?"):
        await ask(content)
    await engine.collective_rpc("trace_start")
    TRACE.start()
    await ask("What is this?")
    here = TRACE.stop()
    (there,) = await engine.collective_rpc("trace_stop")
    return list(dict.fromkeys([*here, *there]))


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(traced(Path(folder)))
    if "--json" in sys.argv:
        print(json.dumps(found))
        return
    for name, files in found.items():
        print(f"{name}: {len(files)} files", *files, sep="\n    ")


if __name__ == "__main__":
    main()
