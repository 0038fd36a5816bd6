"""The server that most tests of HTTP share, and ways to ask it (a module with a server of its own defines `server`);
and what servers have loaded, for tests without one."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from asking import PROMPT, Post, post_json
from catalogues import FILES, LIMITS, PLACES, SHAPE, SPARSE_SHAPE
from serving import API_KEY, MODEL, Server, serving_demo
from shared import serving_all
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from whipstaff.decoding.method import Depth
from whipstaff.server.prompt.vocabulary import Vocabulary
from whipstaff.server.registry.capabilities import Capabilities
from whipstaff.server.registry.vectors import VectorSnapshot, read_vectors
from whipstaff.steering import vector_file
from whipstaff.steering.edits import Lengths
from whipstaff.steering.method import HookPoint
from whipstaff.steering.routing_scheme import Scheme
from whipstaff.steering.served import AttentionAbilities
from whipstaff.steering.shape import SITES
from whipstaff.steering.vector_file import Header

GREEDY = {"model": MODEL, "max_tokens": 12, "temperature": 0, "return_token_ids": True}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving_all(tmp_path_factory.mktemp("server")) as running:
        yield running


@pytest.fixture(scope="session")
def demo_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded demo, as `make serve` serves it."""
    with serving_demo(tmp_path_factory.mktemp("demo")) as running:
        yield running


@pytest.fixture(scope="module")
def http(server: Server) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=API_KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="module")
def tokenizer(server: Server) -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(server.models["base"])


@pytest.fixture(scope="module")
def complete(http: httpx.Client) -> Post:
    """Post a greedy completion of 12 tokens, or what the arguments make of it."""

    def post(prompt: Any = PROMPT, **fields: Any) -> httpx.Response:
        return post_json(http, "/v1/completions", GREEDY | {"prompt": prompt} | fields)

    return post


@pytest.fixture(scope="module")
def chat(http: httpx.Client) -> Post:
    """The same for a chat completion, of a user's words or of whole messages."""

    def post(content: Any = "Why?", **fields: Any) -> httpx.Response:
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        return post_json(http, "/v1/chat/completions", GREEDY | {"messages": messages} | fields)

    return post


@pytest.fixture(scope="module")
def vector_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vectors")
    for name, (header, tensors) in FILES.items():
        vector_file.write(folder / f"{name}.safetensors", Header(**{"model": SHAPE} | header), tensors)
    return folder


@pytest.fixture(scope="module")
def caps(vector_files: Path) -> Capabilities:
    lengths = Lengths(dict.fromkeys(PLACES, 10.0))
    return Capabilities(
        VectorSnapshot(read_vectors([vector_files]), SHAPE),
        LIMITS,
        None,
        512,
        num_layers=4,
        hook_points=PLACES,
        lengths=lengths,
    )


@pytest.fixture(scope="module")
def everything(caps: Capabilities, vector_files: Path) -> Capabilities:
    """A server whose model has experts, and whose operator asked for all hooks."""
    hook_points = frozenset(HookPoint(site, layer).canonical for site in SITES for layer in range(4))
    scheme = Scheme(4, 2, "softmax", True, 1, 1, None)
    return replace(
        caps,
        registry=VectorSnapshot(read_vectors([vector_files]), SPARSE_SHAPE),
        hook_points=hook_points,
        attention=AttentionAbilities([0, 1, 2, 3], bias=[0, 1], lacking={2: "its scores are capped"}),
        routing={1: scheme, 2: scheme},
    )


@pytest.fixture(scope="module")
def nothing() -> Capabilities:
    return Capabilities(VectorSnapshot({}, SHAPE), {})


@pytest.fixture(scope="module")
def early(caps: Capabilities) -> Capabilities:
    """A server with a tokenizer, of which two early layers can be read."""
    words = Vocabulary([], {}, (), None)
    return replace(caps, words=words, depth=Depth(4, kept=frozenset({0, 1}), has_norm=False))
