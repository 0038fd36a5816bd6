"""vLLM's own makers of responses, given a search's answers: choices, usage and streams are those of so many answers."""

import asyncio
import json
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from serving import make_tokenizer
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams

from whipstaff.server.engine.frontend.answers import SearchAnswers
from whipstaff.server.engine.frontend.openai import ServingChat, ServingCompletion
from whipstaff.server.engine.frontend.requests import ChatRequest, TextRequest

BEST, SECOND = [70, 71, 72], [70, 80]
RECORD = {
    "hypotheses": [
        {"tokens": BEST, "score": -0.5, "finish_reason": "length"},
        {"tokens": [*SECOND, 1], "score": -0.7, "finish_reason": "stop"},
        {"tokens": [90], "score": -0.9, "finish_reason": "length"},
    ]
}
SETTINGS = {
    **{"enable_force_include_usage": False, "enable_prompt_tokens_details": False, "system_fingerprint": None},
    **{"enable_per_request_metrics": False, "return_tokens_as_token_ids": False, "parser_cls": None},
    **{"enable_auto_tools": False, "enable_log_outputs": False, "enable_log_deltas": False, "request_logger": None},
    **{"response_role": "assistant", "_include_reasoning_tokens_details": False},
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def served(kind: type[Any]) -> Any:
    made = object.__new__(kind)
    made.__dict__.update(SETTINGS)
    return made


async def answers(tokenizer: Any, is_stream: bool) -> AsyncGenerator[Any, None]:
    """A search of which two answers are wanted, and one token settles before its end."""

    def output(tokens: list[int], finish_reason: str | None) -> RequestOutput:
        one = CompletionOutput(0, tokenizer.decode(tokens), tokens, None, None, finish_reason=finish_reason)
        return RequestOutput("r", None, [5, 6], None, [one], finish_reason is not None)

    made = SearchAnswers(2, SamplingParams(), lambda _: None)

    async def engine() -> AsyncGenerator[Any, None]:
        if is_stream:
            yield output(BEST[:1], None)
        made.explained(0, {"search": RECORD})
        yield output(BEST[1:] if is_stream else BEST, "length")

    async for one in made.of(engine(), tokenizer):
        yield one


def events(chunks: list[str]) -> list[dict[str, Any]]:
    assert chunks[-1] == "data: [DONE]\n\n"
    return [json.loads(chunk.removeprefix("data: ")) for chunk in chunks[:-1]]


def test_completions(tokenizer: Any) -> None:
    request, serving = TextRequest(prompt="a", n=2, max_tokens=9, return_token_ids=True), served(ServingCompletion)

    async def run() -> Any:
        (output,) = [one async for one in answers(tokenizer, False)]
        output.prompt = "a"
        meta = SimpleNamespace(final_usage_info=None)
        return serving.request_output_to_completion_response([output], request, "r", 0, "m", tokenizer, meta)

    answer = asyncio.run(run())
    assert [(one.index, one.text) for one in answer.choices] == [
        (0, tokenizer.decode(BEST)),
        (1, tokenizer.decode(SECOND)),
    ]
    assert [one.finish_reason for one in answer.choices] == ["length", "stop"]
    assert [one.token_ids for one in answer.choices] == [BEST, [*SECOND, 1]]
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (2, 6)


def test_streams_of_completions(tokenizer: Any) -> None:
    request = TextRequest(prompt="a", n=2, max_tokens=9, stream=True, stream_options={"include_usage": True}, echo=True)
    serving = served(ServingCompletion)

    async def run() -> list[str]:
        async def numbered() -> AsyncGenerator[Any, None]:
            async for one in answers(tokenizer, True):
                one.prompt = "a"
                yield 0, one

        meta = SimpleNamespace(final_usage_info=None)
        made = serving.completion_stream_generator(request, [], numbered(), "r", 0, "m", 1, tokenizer, meta)
        return [chunk async for chunk in made]

    said = events(asyncio.run(run()))
    texts = ["".join(c["text"] for one in said for c in one["choices"] if c["index"] == index) for index in range(2)]
    assert texts == ["a" + tokenizer.decode(BEST), "a" + tokenizer.decode(SECOND)]
    assert said[-1]["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("is_stream", [False, True])
def test_chats(tokenizer: Any, is_stream: bool) -> None:
    messages = [{"role": "user", "content": "a"}]
    options = {"stream": True, "stream_options": {"include_usage": True}} if is_stream else {}
    request, serving = ChatRequest(messages=messages, n=2, **options), served(ServingChat)
    meta = SimpleNamespace(final_usage_info=None)

    async def run() -> Any:
        outputs = answers(tokenizer, is_stream)
        if not is_stream:
            return await serving.chat_completion_full_generator(request, outputs, "r", "m", [], tokenizer, meta)
        made = serving.chat_completion_stream_generator(request, outputs, "r", "m", [], tokenizer, meta)
        return [chunk async for chunk in made]

    found, wanted = asyncio.run(run()), [tokenizer.decode(BEST), tokenizer.decode(SECOND)]
    if not is_stream:
        assert [one.message.content for one in found.choices] == wanted and found.usage.completion_tokens == 6
        return
    said = events(found)
    choices = [choice for one in said for choice in one["choices"]]
    assert [
        "".join(choice["delta"].get("content") or "" for choice in choices if choice["index"] == index)
        for index in range(2)
    ] == wanted
    assert said[-1]["usage"]["completion_tokens"] == 6
