"""vLLM's load generator (`vllm bench serve`), whose requests are of several kinds, each with fields of its own.

Datasets, arrivals and flags are vLLM's. Requests are sent by a function of ours: vLLM's takes an answer that broke off
for a whole one and the closing event for a token, and keeps no word of what a refusal said.
"""

import asyncio
import contextlib
import dataclasses
import gc
import io
import json
import time
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple
from unittest import mock

import aiohttp
from vllm.benchmarks import serve
from vllm.benchmarks.lib.endpoint_request_func import (
    ASYNC_REQUEST_FUNCS,
    RequestFuncInput,
    RequestFuncOutput,
    StreamedResponseHandler,
    _get_chat_messages,
)
from vllm.utils.argparse_utils import FlexibleArgumentParser

ENDPOINTS = {"openai": "/v1/completions", "openai-chat": "/v1/chat/completions"}  # by --backend
_BROKEN = ("abort", "error")  # reasons to finish that are no answer's
_WORDS = ("text", "content", "reasoning", "reasoning_content", "tool_calls")  # where an event has what was generated
_MAX_WORDS = 300  # characters that are kept of a refusal

Overrides = Mapping[str, Any]
Assign = Callable[[str, int], tuple[Sequence[Overrides], Sequence[Overrides]]]
"""Of the served model's name and the number of requests: fields of each request's body, and of each that warms up."""


class Answer(NamedTuple):
    """What came of one request; times in seconds."""

    error: str  # "" of an answer that came whole
    start: float  # since the first request
    ttft: float  # until the first token; 0 where none came
    itls: list[float]  # between events with tokens of one sequence: servers may send several tokens in one
    e2e: float  # until the last
    tokens: int  # generated


def parser(program: str) -> Any:
    """A parser of every flag that `vllm bench serve` takes."""
    made = FlexibleArgumentParser(prog=program)
    serve.add_cli_args(made)
    return made


def run(args: Namespace, assign: Assign) -> tuple[str, float, list[Answer]]:
    """Put the load of these flags on a server: the model's name, how many seconds it took, and an answer per request.

    vLLM's own report is held back; its bar of progress goes to stderr.

    Raises:
        ValueError, RuntimeError, OSError: flags that do not go together, or no server there.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    load = serve.benchmark

    async def measured(**how: Any) -> dict[str, Any]:
        name, requests = str(how["model_name"] or how["model_id"]), how["input_requests"]
        overrides, warming = assign(name, len(requests))
        if warming:
            once = {"request_rate": float("inf"), "ramp_up_strategy": None, "probe_request_rate": 0.0, "num_warmups": 0}
            quiet = {"disable_tqdm": True, "profile": False, "self_timed": False}
            await load(**how | once | quiet | {"input_requests": _with(requests, warming)})
            how["ready_check_timeout_sec"] = 0  # it was ready
        result: dict[str, Any] = await load(**how | {"input_requests": _with(requests, overrides)})
        found.append((name, dict(result)))
        return result

    with (
        contextlib.redirect_stdout(io.StringIO()),
        mock.patch.dict(ASYNC_REQUEST_FUNCS, dict.fromkeys(ENDPOINTS, send)),
        mock.patch.object(serve, "benchmark", measured),
    ):
        asyncio.run(serve.main_async(args))
    gc.unfreeze()  # vLLM froze what was there, which at exit would be told as leaked
    ((name, result),) = found
    return name, float(result["duration"]), _answers(result)


def _with(requests: Sequence[Any], overrides: Sequence[Overrides]) -> list[Any]:
    """As many requests as there are overrides, each with its own."""
    return [
        dataclasses.replace(one, request_overrides={**(one.request_overrides or {}), **mine})
        for one, mine in zip(
            (requests[index % len(requests)] for index in range(len(overrides))), overrides, strict=True
        )
    ]


def _answers(result: Mapping[str, Any]) -> list[Answer]:
    first = min(result["start_times"])
    names = ("errors", "start_times", "ttfts", "itls", "latencies", "output_lens")
    return [
        Answer(error, start - first, ttft, itls, e2e, int(tokens))
        for error, start, ttft, itls, e2e, tokens in zip(*(result[name] for name in names), strict=True)
    ]


async def send(request_func_input: RequestFuncInput, session: Any, pbar: Any = None) -> RequestFuncOutput:
    """One request, whose answer is streamed; what vLLM's `RequestFunc` is. An answer is good that ends as one ends."""
    output = RequestFuncOutput(prompt_len=request_func_input.prompt_len, start_time=time.perf_counter())
    headers = dict(request_func_input.extra_headers or {})
    if request_func_input.request_id:
        headers["x-request-id"] = request_func_input.request_id
    try:
        url = request_func_input.api_url
        async with session.post(url=url, json=_body(request_func_input), headers=headers) as response:
            if response.status == 200:
                await _read(response, output)
            else:
                output.error = f"{response.status}: {_message(await response.text())}"
    except (aiohttp.ClientError, OSError, ValueError) as error:  # a time-out is an OSError
        output.error = f"{type(error).__name__}: {error}"
    output.success = not output.error
    if pbar is not None:
        pbar.update(1)
    return output


def _body(request: RequestFuncInput) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": request.model_name or request.model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if request.api_url.endswith(ENDPOINTS["openai-chat"]):
        messages = request.chat_messages if request.chat_messages is not None else _get_chat_messages(request)
        body |= {"messages": messages, "max_completion_tokens": request.output_len}
    else:
        body |= {"prompt": request.prompt, "max_tokens": request.output_len}
        if request.logprobs is not None:
            body["logprobs"] = request.logprobs
    if request.ignore_eos:
        body["ignore_eos"] = True
    return body | (request.extra_body or {})


async def _read(response: Any, output: RequestFuncOutput) -> None:
    """Note when tokens came, and whether the answer came to its end."""
    last: dict[int, float] = {}  # by sequence, when its last token came
    reasons: set[str] = set()
    events = StreamedResponseHandler()
    async for data in response.content.iter_any():
        now = time.perf_counter()
        for event in events.add_chunk(data):
            if event.startswith(":") or (text := event.removeprefix("data:").strip()) == "[DONE]":
                continue
            said = json.loads(text)
            if "error" in said:
                output.error = _message(text)
                return
            for choice in said.get("choices") or ():
                if _has_token(choice):
                    _note(output, last, int(choice.get("index", 0)), now)
                if choice.get("finish_reason"):
                    reasons.add(choice["finish_reason"])
                output.latency = now - output.start_time
            if usage := said.get("usage"):
                output.output_tokens = usage.get("completion_tokens") or 0
                output.prompt_len = usage.get("prompt_tokens") or output.prompt_len
    if not reasons:
        output.error = "the answer broke off: it has no finish_reason"
    elif broken := reasons & {*_BROKEN}:
        output.error = f"the answer broke off: its finish_reason is {min(broken)!r}"


def _has_token(choice: Mapping[str, Any]) -> bool:
    """A chat begins with an event that names the role alone, and an answer may end with one without a token."""
    said = choice.get("delta") or choice
    if any(said.get(name) for name in _WORDS):
        return True
    return not choice.get("finish_reason") and "role" not in said  # such as half of a character


def _note(output: RequestFuncOutput, last: dict[int, float], index: int, now: float) -> None:
    if index in last:
        output.itl.append(now - last[index])
    elif not last:
        output.ttft = now - output.start_time
    last[index] = now


def _message(text: str) -> str:
    """What an error says, of OpenAI's form or any other."""
    try:
        said = json.loads(text)
        said = said.get("error", said)
        words = str(said.get("message", said) if isinstance(said, dict) else said)
    except (ValueError, AttributeError):
        words = text
    return " ".join(words.split())[:_MAX_WORDS]
