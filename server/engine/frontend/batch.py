"""Several chats in one request (`/v1/chat/completions/batch`), as vLLM serves them: one compiled request, placed in
each conversation, as a completion is in each of its prompts."""

from collections.abc import Callable
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import Field, PrivateAttr, model_validator
from starlette.requests import Request
from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch
from vllm.entrypoints.openai.chat_completion.protocol import BatchChatCompletionRequest, ChatCompletionRequest
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.sampling_params import RepetitionDetectionParams, SamplingParams

from whipstaff.server.engine.frontend import openai
from whipstaff.server.engine.frontend.requests import Chats, Extras, blaming, chats_of, read_messages
from whipstaff.server.engine.patch import swap
from whipstaff.server.names import FIELDS


class BatchRequest(BatchChatCompletionRequest, Extras):
    """Several chats with the extra fields."""

    # Of the fields of chats, those that vLLM's batches hand on without knowing them.
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] = Field(default_factory=list)
    ignore_eos: bool = False
    min_tokens: int = 0
    repetition_detection: RepetitionDetectionParams | None = None
    stop_token_ids: list[int] | None = Field(default_factory=list)
    vllm_xargs: dict[str, str | int | float | list[str | int | float]] | None = None
    _asked: "_OneChat | None" = PrivateAttr(None)  # of the chats, the one whose sampling parameters are made

    @model_validator(mode="wrap")
    @classmethod
    def _blames(cls, body: Any, handler: Callable[[Any], Any]) -> Any:
        return blaming(body, handler)

    @model_validator(mode="after")
    def _reads_messages(self) -> "BatchRequest":
        for index, messages in enumerate(self.messages):
            read_messages(messages, f"messages[{index}]")
        return self

    @property
    def is_chat(self) -> bool:
        return True

    @property
    def stream(self) -> bool:
        """vLLM answers batches whole."""
        return False

    @property
    def num_prompts(self) -> int:
        return len(self.messages)

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompts are wanted: its answer has no place for them."""
        return False

    @property
    def echoes_scores(self) -> bool:
        """Whether vLLM scores its prompts though nobody asked."""
        return bool(self.echo and self.logprobs)

    @property
    def logprobs_field(self) -> str:
        """The field by which it asks for log-probabilities; "" if none does."""
        return "logprobs" if self.logprobs else ""

    @property
    def explicit_max_tokens(self) -> int | None:
        """How many tokens the client itself wants at most, of each answer."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    def cap(self, most: int) -> None:
        """Where the client does not say how many: at most so many tokens."""
        self.max_completion_tokens = most

    def to_chat_completion_request(self, messages: list[Any]) -> ChatCompletionRequest:
        said = self.model_dump(include={*type(self).model_fields} - {*FIELDS, "messages"}, exclude_none=True)
        made = _OneChat.model_validate(said | {"messages": messages})
        made._batch = self
        return made

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        """Those of its first chat, which differ from the others' in nothing that is checked."""
        return self.to_chat_completion_request(self.messages[0]).to_sampling_params(*args, **kwargs)

    def params_of(self, chat: "_OneChat", make: Callable[[], SamplingParams]) -> SamplingParams:
        """Of a chat, with its plan."""
        self._asked = chat
        try:
            params = self.planned(make)
        finally:
            self._asked = None
        if self._compiled is not None and not self._compiled.scores_prompts:
            params.prompt_logprobs, params.skip_reading_prefix_cache = None, False  # as of a chat
        return params

    @property
    def _vllm(self) -> Any:
        return self if self._asked is None else self._asked


class _OneChat(ChatCompletionRequest):
    """One of several chats, as vLLM asks it for its sampling parameters."""

    _batch: BatchRequest = PrivateAttr()

    def to_sampling_params(self, *args: Any, **kwargs: Any) -> SamplingParams:
        return self._batch.params_of(self, partial(super().to_sampling_params, *args, **kwargs))


class ServingBatch(OpenAIServingChatBatch):
    """Places requests between tokenising and scheduling."""

    async def render_batch_chat_request(self, request: Any) -> Any:
        result = await super().render_batch_chat_request(request)
        if not isinstance(request, BatchRequest) or isinstance(result, ErrorResponse):
            return result
        singles, conversations, inputs = result

        def chats() -> list[Chats | None]:
            return [chats_of(one, said, self) for one, said in zip(singles, conversations, strict=True)]

        most = await openai.place(request, inputs, self, request.explicit_max_tokens, chats)
        if most is not None:
            request.max_completion_tokens = most
        return result


def serve_batches(app: FastAPI) -> None:
    """Have vLLM's application place batches."""
    swap(app.state.openai_serving_chat_batch, ServingBatch)


async def answer(request: BatchRequest, raw: Request) -> Any:
    """vLLM's answer: an error Response, or a response model."""
    serving = raw.app.state.openai_serving_chat_batch
    result = await openai.naming(request, serving.create_batch_chat_completion(request, raw))
    return JSONResponse(result.model_dump(), result.error.code) if isinstance(result, ErrorResponse) else result
