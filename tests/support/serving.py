"""A `whipstaff serve` process for tests: tiny random models with a tokenizer, vector files, a server of its own."""

import os
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import warm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from whipstaff.steering import vector_file
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Header

API_KEY = "test-key"
MODEL = "tiny"
VOCABULARY = 512
MAX_LEN = 512
SHORT_LEN = 96  # the context of the auxiliary model "short"
STEP_TOKENS = 64  # --max-num-batched-tokens: longer prompts are chunked
MAX_SEQS = 16  # sequences at once, and slots for configurations
START_PATIENCE, STOP_PATIENCE = 780, 30  # seconds
HIDDEN, LAYERS, HEADS = 128, 3, 4
FEATURES = 9  # of the sparse autoencoder
BASE = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
SHAPE = ModelShape(
    architecture="LlamaForCausalLM", hidden_size=HIDDEN, num_layers=LAYERS, num_heads=HEADS, head_dim=HIDDEN // HEADS
)
_FORKS = """
from multiprocessing import get_context
from vllm.v1.engine import utils
from vllm.v1.executor import multiproc_executor
for module in (utils, multiproc_executor):
    module.get_mp_context = lambda: get_context("fork")
"""
CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def make_tokenizer(vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the standard library, the same in every run of one Python."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]
    tokenizer.train([str(path) for path in sources], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def save_llama(folder: Path, tokenizer: PreTrainedTokenizerFast | None, seed: int, **changes: Any) -> str:
    """Write a random Llama whose greedy output is not one token over and over; the folder as a string."""
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
    } | changes
    torch.manual_seed(seed)
    config = LlamaConfig(
        **shape, intermediate_size=2 * shape["hidden_size"], bos_token_id=0, eos_token_id=1, pad_token_id=2
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def save_models(folder: Path) -> dict[str, str]:
    """The base, a pair for proxy-tuning and a model with a shorter context: name -> path."""
    tokenizer = make_tokenizer()
    return {
        "base": save_llama(folder / "base", tokenizer, 0, **BASE),
        "expert": save_llama(folder / "expert", tokenizer, 1),
        "anti": save_llama(folder / "anti", tokenizer, 2),
        "short": save_llama(folder / "short", tokenizer, 3, max_position_embeddings=SHORT_LEN),
    }


def save_vectors(folder: Path) -> Path:
    """Vectors of many methods, and one made for another model; the folder."""
    folder.mkdir()
    torch.manual_seed(7)
    heads = (HEADS, HIDDEN // HEADS)
    residual = {f"resid_post.{layer}.add": torch.randn(HIDDEN) for layer in range(LAYERS)}
    directions = {f"attn_head.{layer}.direction": torch.randn(heads) for layer in range(LAYERS)}
    sigmas = {f"attn_head.{layer}.sigma": torch.rand(HEADS) for layer in range(LAYERS)}
    gains = {f"attn_head.{layer}.{part}": torch.randn(heads) for layer in range(LAYERS) for part in ("A", "v")}
    encoder, project = torch.randn(FEATURES, HIDDEN) / HIDDEN**0.5, torch.randn(2, HIDDEN) / HIDDEN**0.5
    codes = {"encoder": encoder, "decoder": encoder * HIDDEN**0.5, "decoder_bias": torch.randn(HIDDEN)}
    learned = {"weight": torch.randn(2, HIDDEN), "bias": torch.randn(2), "rotate": torch.linalg.qr(project.T)[0].T}
    for name, method, tensors, more in (
        ("push", "caa", residual, {}),
        ("iti", "iti", directions | sigmas, {"scale": 15.0, "description": "head outputs, strong by default"}),
        ("lofit", "lofit", gains, {}),
        ("late", "caa", {"resid_post.2.add": residual["resid_post.2.add"]}, {"where": "generation"}),
        ("both", "vector", {"resid_post.0.gain": torch.full((HIDDEN,), 0.5), **residual}, {}),
        ("ablate", "directional_ablation", {"direction": torch.randn(HIDDEN)}, {}),
        ("sae", "sae", {f"resid_post.1.{part}": numbers for part, numbers in codes.items()}, {}),
        ("loreft", "loreft", {f"resid_post.1.{part}": numbers for part, numbers in learned.items()}, {}),
        ("probe", "probe", {"resid_post.0.direction": torch.randn(HIDDEN)}, {}),
        ("soft", "soft_prompt", {"rows": torch.randn(3, HIDDEN)}, {}),
        ("experts", "vector", {"router.1.add": torch.ones(4)}, {"model": SHAPE.model_copy(update={"num_experts": 4})}),
    ):
        header = Header(**{"method": method, "model": SHAPE} | more)
        vector_file.write(folder / f"{name}.safetensors", header, tensors)
    other = SHAPE.model_copy(update={"hidden_size": 64, "head_dim": 16})
    tensors = {"resid_post.0.add": torch.ones(64)}
    vector_file.write(folder / "misfit.safetensors", Header(method="caa", model=other), tensors)
    return folder


def environment() -> dict[str, str]:
    """Of a child process: no model hub, no tracking, no flags from outside."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("WHIPSTAFF_", "VLLM_API"))}
    own |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    return own | {"OMP_NUM_THREADS": "1"}  # an engine's processes run beside those of another


def whipstaff(*words: str, forks: bool = False) -> list[str]:
    """The installed command line, by this interpreter. One that `forks` does not import vLLM anew in the processes of
    its engine, whose environment must then say how many threads OpenMP has."""
    program = "from whipstaff.server.commands.main import main; main()"
    return [sys.executable, "-c", _FORKS + program if forks else program, *words]


Process = subprocess.Popen[bytes] | warm.CommandLine


@dataclass(frozen=True)
class Server:
    """A running server: where it is, what it serves and what it has said so far."""

    url: str
    models: dict[str, str]
    log: Path
    process: Process

    def client(self, **settings: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {API_KEY}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=120, **settings)

    def said(self) -> str:
        return self.log.read_text()

    def kill(self) -> None:
        """End all of its processes at once, without a word."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(STOP_PATIENCE)

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """The engine stands still, but for a moment whenever what this gives is called: however slow whoever looks on
        is, answers stay in their midst."""
        engine = psutil.Process(self.process.pid).children(recursive=True)  # of a server with one API server

        def send(number: int) -> None:
            for one in engine:
                with suppress(psutil.NoSuchProcess):
                    one.send_signal(number)

        def go_on() -> None:
            send(signal.SIGCONT)
            time.sleep(0.02)
            send(signal.SIGSTOP)

        send(signal.SIGSTOP)
        try:
            yield go_on
        finally:
            send(signal.SIGCONT)


@contextmanager
def serving(folder: Path, *flags: str, has_key: bool = True) -> Iterator[Server]:
    """Start a server on a free port, wait until it is healthy, and stop it with all of its processes at the end.

    A folder that was served before is served as it is. One that `has_key` takes API_KEY and no other.
    """
    vectors = folder / "vectors"
    if vectors.exists():
        made = {name: str(folder / name) for name in ("base", "expert", "anti", "short")}
    else:
        made = save_models(folder)
        save_vectors(vectors)
    port, log = free_port(), folder / "server.log"
    words = [
        *("serve", made["base"], "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)),
        *(("--api-key", API_KEY) if has_key else ()),
        *("--dtype", "float32", "--enforce-eager", "--max-model-len", str(MAX_LEN)),
        *("--max-num-batched-tokens", str(STEP_TOKENS), "--max-num-seqs", str(MAX_SEQS), "--block-size", "32"),
        *("--kv-cache-memory-bytes", "64M", "--vectors", str(vectors)),
        *(
            "--structured-outputs-config",
            '{"backend": "xgrammar", "disable_any_whitespace": true}',
        ),  # random models love blanks
        *(word for name in ("expert", "anti", "short") for word in ("--aux", f"{name}={made[name]}")),
        *flags,
    ]
    process = warm.CommandLine(whipstaff(*words, forks=True), log, environment())
    with _running(process, port, made, log) as server:
        yield server


@contextmanager
def serving_demo(folder: Path, *flags: str, python: str | Path = sys.executable, **variables: str) -> Iterator[Server]:
    """The same for the embedded demo and what is served with it, by anybody's key. This server starts as a user's.

    `python` has the command line, `variables` are more of its environment.
    """
    port = free_port()
    words = ["serve", "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--kv-cache-memory-bytes", "64M"]
    words += flags
    log = folder / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(python), *whipstaff(*words)[1:]],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment() | variables,
            start_new_session=True,
        )
    with _running(process, port, {}, log) as server:
        yield server


@contextmanager
def _running(process: Process, port: int, made: dict[str, str], log: Path) -> Iterator[Server]:
    server = Server(f"http://127.0.0.1:{port}", made, log, process)
    try:
        wait_until_healthy(server)
        yield server
    finally:
        stop(process)


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_PATIENCE
    with server.client() as client:  # making one takes longer than asking with it
        while time.monotonic() < deadline:
            if (code := server.process.poll()) is not None:
                raise RuntimeError(f"the server stopped with {code}:\n{server.said()[-4000:]}")
            try:
                if client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
    raise RuntimeError(f"the server was not healthy after {START_PATIENCE} s:\n{server.said()[-4000:]}")


def stop(process: Process) -> None:
    """Ask it to stop. Raises: RuntimeError, after killing its process group, if anything of it is left."""
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + STOP_PATIENCE
    while time.monotonic() < deadline:
        process.poll()  # reaps it
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(10)
    raise RuntimeError(f"the server, or a process it started, was still there {STOP_PATIENCE} s after SIGTERM")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
