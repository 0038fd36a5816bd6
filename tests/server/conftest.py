"""The server that most tests of HTTP share, and ways to ask it. A module with a server of its own defines `server`."""

from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from .asking import PROMPT, Post, post_json
from .serving import API_KEY, MODEL, Server
from .shared import everything

GREEDY = {"model": MODEL, "max_tokens": 12, "temperature": 0, "return_token_ids": True}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with everything(tmp_path_factory.mktemp("server")) as running:
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
