"""Servers that benchmarks start, the models that these serve, and the load that they put on them: a closed loop of
clients over HTTP."""

import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.steering import vector_file
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header

VOCABULARY, HIDDEN, LAYERS, HEADS = 4096, 512, 8, 8
SMALL = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE = ModelShape(
    architecture="LlamaForCausalLM", hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS, head_dim=HIDDEN // HEADS
)
PROMPT_LEN, MAX_TOKENS = 32, 48
START_PATIENCE = 300  # seconds
# What `vllm serve` runs; that command itself stumbles over the CPU wheel, whose distribution is not called vllm.
STOCK = "vllm.entrypoints.launchers.api_server.entry"


@dataclass(frozen=True)
class Variant:
    """A way to ask: which server, and the extra fields of the i-th request."""

    name: str
    server: str
    extras: Callable[[int], dict[str, Any]]
    headers: str = ""  # further ones, as they go over the wire


def make_models(folder: Path) -> dict[str, str]:
    """Random Llamas with one tokenizer, and a vector for both sites of every layer: name -> path."""
    words = {f"w{index}": index for index in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w1")
    base = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    for seed, (name, shape) in enumerate({"base": base, "expert": SMALL, "anti": SMALL}.items()):
        torch.manual_seed(seed)
        more = {"intermediate_size": 4 * shape["hidden_size"], "max_position_embeddings": 512, "eos_token_id": 1}
        LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **shape, **more)).save_pretrained(folder / name)
        fast.save_pretrained(folder / name)
    tensors = {f"resid_post.{layer}.add": torch.randn(HIDDEN) for layer in range(LAYERS)}
    tensors |= {f"attn_head.{layer}.add": torch.randn(HEADS, HIDDEN // HEADS) for layer in range(LAYERS)}
    (folder / "vectors").mkdir()
    vector_file.write(folder / "vectors" / "everywhere.safetensors", Header(method="vector", model=SHAPE), tensors)
    return {name: str(folder / name) for name in ("base", "expert", "anti", "vectors")}


@contextmanager
def running(words: list[str], port: int, log: Path) -> Iterator[int]:
    """A server process with everything it starts, from healthy to gone: the session that they are in."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with log.open("w") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        deadline = time.monotonic() + START_PATIENCE
        while not _is_healthy(port):
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{words[0]} did not start:\n{log.read_text()[-4000:]}")
            time.sleep(0.2)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its own session: only what we started
            process.wait(10)


def _is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@dataclass
class _Client(asyncio.Protocol):
    """Sends completions one after the other and notes when each event of the answer arrives; as little as that."""

    requests: Iterator[bytes]
    done: "asyncio.Future[None]"
    sent: list[float] = field(default_factory=list)
    arrivals: list[list[float]] = field(default_factory=list)
    tail: bytes = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.send()

    def send(self) -> None:
        request = next(self.requests, None)
        if request is None:
            self.transport.close()
            self.done.set_result(None)
            return
        self.sent.append(time.perf_counter())
        self.arrivals.append([])
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(data.decode(errors="replace")))
            self.transport.close()
            return
        self.arrivals[-1] += [now] * data.count(b"data: {")
        self.tail = (self.tail + data)[-32:]
        if b"data: [DONE]" in self.tail and self.tail.endswith(b"0\r\n\r\n"):
            self.tail = b""
            self.send()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or RuntimeError("the server closed the connection"))


def _request(prompt: list[int], extras: dict[str, Any], headers: str) -> bytes:
    fields = {"model": "bench", "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    body = json.dumps(fields | {"ignore_eos": True, "stream": True} | extras).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    return f"{head}\r\n{headers}\r\n".encode() + body


async def load(
    port: int, variant: Variant, concurrency: int, num_requests: int, seed: int, vocabulary: int
) -> dict[str, float]:
    """Requests per second, and milliseconds to the first token, between tokens and to the end of an answer."""
    generator = np.random.default_rng(seed)
    prompts = generator.integers(2, vocabulary, (num_requests, PROMPT_LEN)).tolist()
    requests = iter([_request(prompt, variant.extras(index), variant.headers) for index, prompt in enumerate(prompts)])
    loop = asyncio.get_running_loop()
    clients = [_Client(requests, loop.create_future()) for _ in range(concurrency)]
    start = time.perf_counter()
    for client in clients:
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)  # type: ignore[misc]
    await asyncio.wait_for(asyncio.gather(*(client.done for client in clients)), START_PATIENCE)
    seconds = time.perf_counter() - start
    firsts = [a[0] - sent for client in clients for sent, a in zip(client.sent, client.arrivals, strict=True)]
    wholes = [a[-1] - sent for client in clients for sent, a in zip(client.sent, client.arrivals, strict=True)]
    gaps = np.concatenate([np.diff(a) for client in clients for a in client.arrivals]) * 1e3
    return {
        "requests_per_s": num_requests / seconds,
        "tokens_per_s": num_requests * MAX_TOKENS / seconds,
        "first_token_ms_p50": statistics.median(firsts) * 1e3,
        "inter_token_ms_p50": float(np.percentile(gaps, 50)),
        "inter_token_ms_p99": float(np.percentile(gaps, 99)),
        "answer_ms_p50": float(np.percentile(wholes, 50)) * 1e3,
        "answer_ms_p99": float(np.percentile(wholes, 99)) * 1e3,
    }
