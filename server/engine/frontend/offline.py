"""Requests without HTTP: vLLM's own sampling parameters with the extra fields, their way into the engine, and outputs
that say what was done. `server.llm` puts it together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

from pydantic import PrivateAttr
from vllm.config import CompilationConfig, ProfilerConfig, StructuredOutputsConfig
from vllm.config.compilation import CompilationMode
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import RetryableRequestError, VLLMClientError
from vllm.lora.request import LoRARequest
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.renderers import ChatParams, merge_kwargs
from vllm.renderers.chat_utils import load_chat_template
from vllm.renderers.inputs.preprocess import (
    conversation_to_seq,
    extract_prompt_len,
    parse_model_prompt,
    prompt_to_seq,
)
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.mistral import is_mistral_tokenizer

from whipstaff.server.engine import EngineDied, UnsupportedEngine
from whipstaff.server.engine.frontend import openai
from whipstaff.server.engine.frontend.blame import field_meant
from whipstaff.server.engine.frontend.launch import Engine
from whipstaff.server.engine.frontend.requests import Chats, Extras, chats_by
from whipstaff.server.engine.patch import become
from whipstaff.server.errors import BadRequest

_CONFIGS = {  # arguments that vLLM's own `LLM` takes as objects of JSON
    "compilation_config": CompilationConfig,
    "profiler_config": ProfilerConfig,
    "structured_outputs_config": StructuredOutputsConfig,
}


def engine_args(model: str, **arguments: Any) -> AsyncEngineArgs:
    """vLLM's engine arguments, of what its own `LLM` takes. Raises: TypeError, UnsupportedEngine."""
    if int(arguments.get("data_parallel_size") or 1) > 1:
        raise UnsupportedEngine("data_parallel_size > 1 is not supported together with steering")
    if arguments.get("default_mm_loras"):
        raise UnsupportedEngine("default_mm_loras: name the adapter of a request by its lora_request")
    made: dict[str, Any] = {"disable_log_stats": True}
    for name, value in arguments.items():
        if name == "compilation_config" and isinstance(value, int):
            value = CompilationConfig(mode=CompilationMode(value))
        elif name in _CONFIGS and isinstance(value, dict):
            value = _CONFIGS[name](**value)
        made[name] = value
    return AsyncEngineArgs(model=model, **made)


# ---- requests


class OfflineRequest(Extras):
    """vLLM's sampling parameters with the extra fields. What is told here are those that admission reads and presets
    fill in; the others stay where they are."""

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: Any = None
    stop_token_ids: Any = None
    bad_words: Any = None
    logit_bias: Any = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    structured_outputs: Any = None
    allowed_token_ids: Any = None
    repetition_detection: Any = None
    # what requests have over HTTP only
    vllm_xargs: Any = None  # here, `extra_args`
    response_format: None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    stream: bool = False
    _params: SamplingParams = PrivateAttr(default_factory=SamplingParams)

    @classmethod
    def of(cls, params: SamplingParams, **fields: Any) -> Self:
        """A request of these parameters, which stay as they are. One that has vLLM's default says nothing."""
        said = {name: value for name in _TOLD if (value := getattr(params, name)) != getattr(_SILENT, name)}
        made = cls(**said, vllm_xargs=dict(params.extra_args or {}) or None, **fields)
        made._params = params
        return made

    @property
    def sent_fields(self) -> dict[str, Any]:
        """What it says, for presets."""
        return {name: value for name in self.model_fields_set if (value := getattr(self, name)) is not None}

    @property
    def scores_prompt(self) -> bool:
        """Whether log-probabilities of its prompt are wanted."""
        return self._params.prompt_logprobs is not None or self._params.prompt_logprob_token_ids is not None

    @property
    def echoes_scores(self) -> bool:
        """Whether vLLM scores its prompt though nobody asked."""
        return False

    @property
    def logprobs_field(self) -> str:
        """The field by which it asks for log-probabilities; "" if none does."""
        if self.scores_prompt:
            return "prompt_logprobs"
        asked = ("logprobs", "logprob_token_ids")
        return next((name for name in asked if getattr(self._params, name) is not None), "")

    def to_sampling_params(self, most: int, *_: Any) -> SamplingParams:
        """What vLLM samples by, where so many tokens may follow the prompt at most."""
        return self.planned(partial(self._made, most))

    def _made(self, most: int) -> SamplingParams:
        told = {name: getattr(self, name) for name in _TOLD}
        bias = None if self.logit_bias is None else {int(token): by for token, by in self.logit_bias.items()}
        told |= {"logit_bias": bias, "max_tokens": max(most, 1), "extra_args": self.vllm_xargs}
        kept = {name: getattr(self._params, name) for name in _KEPT}
        return SamplingParams(**told, **kept, output_kind=RequestOutputKind.FINAL_ONLY)


class OfflineText(OfflineRequest):
    """Of a prompt as vLLM takes it: a text, tokens, or an object that holds more."""

    prompt: Any
    add_special_tokens: bool = True


class OfflineChat(OfflineRequest):
    """Of a conversation."""

    messages: list[Any]
    add_special_tokens: bool = False

    @property
    def is_chat(self) -> bool:
        return True


_SILENT = SamplingParams()
_TOLD = tuple(name for name in OfflineRequest.model_fields if name in SamplingParams.__struct_fields__)
_OTHERWISE = {"extra_args", "output_kind", "output_text_buffer_length", "skip_clone"}
_KEPT = tuple(
    name
    for name in SamplingParams.__struct_fields__
    if not (name.startswith("_") or name in _TOLD or name in _OTHERWISE)
)


def prompts_of(prompts: Any) -> Sequence[Any]:
    """One prompt, or several, as several."""
    found: Sequence[Any] = prompt_to_seq(prompts)
    return found


def conversations_of(messages: Any) -> Sequence[Any]:
    """One conversation, or several, as several."""
    found: Sequence[Any] = conversation_to_seq(messages)
    return found


# ---- into the engine


@dataclass(frozen=True)
class Writing:
    """How a call wants its prompts made: what vLLM's `generate` and `chat` take for that."""

    tokenization: Mapping[str, Any] = field(default_factory=dict)
    mm_processor: Mapping[str, Any] | None = None
    template: str | None = None  # None: the engine's
    content_format: str = "auto"
    template_arguments: Mapping[str, Any] = field(default_factory=dict)


class Offline:
    """An engine as requests without HTTP find it: it stands where vLLM's serving classes stand for those over HTTP."""

    def __init__(self, engine: Engine, chat_template: Path | str | None = None) -> None:
        self.engine_client, self.model_config, self.renderer = engine, engine.model_config, engine.renderer
        self.default_sampling_params: dict[str, Any] = {}
        self.override_max_tokens = None
        self.models = self.online_renderer = self
        self.lora_requests: dict[str, LoRARequest] = {}  # those that were named, by name
        self.chat_template = load_chat_template(chat_template)
        self.use_harmony = False

    def _extract_prompt_len(self, prompt: Any) -> int:
        found: int = extract_prompt_len(self.model_config, prompt)
        return found

    def default_params(self) -> SamplingParams:
        """What the model's authors recommend."""
        return SamplingParams.from_optional(**self.model_config.get_diff_sampling_param())

    async def admit(self, request: OfflineText | OfflineChat, writing: Writing) -> Any:
        """The prompt of a request, as the engine takes it, once everything is checked that can be before anything is
        scheduled. Raises: BadRequest, and what placing it does."""
        try:
            if isinstance(request, OfflineChat):
                prompt, chats = await self._chat(request, writing)
            else:
                prompt, chats = await self._text(request, writing), None
            if request.is_plain and not request.lists_tokens:  # else it is checked where it is placed
                await request.check([prompt], self, request.max_tokens)
            most = await openai.place(request, [prompt], self, request.max_tokens, lambda: [chats])
        except (ValueError, TypeError, OverflowError, VLLMClientError) as error:
            said = str(error.args[0] if error.args else error)
            raise BadRequest(said, getattr(error, "parameter", None) or field_meant(said, request)) from error
        if most is not None:
            request.max_tokens = most
        return prompt

    async def _text(self, request: OfflineText, writing: Writing) -> Any:
        tokenizing = self.renderer.default_cmpl_tok_params.with_kwargs(**writing.tokenization)
        request.add_special_tokens = tokenizing.add_special_tokens
        more = None if writing.mm_processor is None else {"mm_processor_kwargs": dict(writing.mm_processor)}
        parsed = parse_model_prompt(self.model_config, request.prompt)
        (prompt,) = await self.renderer.render_cmpl_async([parsed], tokenizing, prompt_extras=more)
        return prompt

    async def _chat(self, request: OfflineChat, writing: Writing) -> tuple[Any, Chats | None]:
        is_tokenized = is_mistral_tokenizer(self.renderer.tokenizer) or self.model_config.enable_prompt_embeds
        chat = ChatParams(
            chat_template=self.chat_template if writing.template is None else writing.template,
            chat_template_content_format=writing.content_format,
            chat_template_kwargs=merge_kwargs(dict(writing.template_arguments), {"tokenize": is_tokenized}),
            mm_processor_kwargs=None if writing.mm_processor is None else dict(writing.mm_processor),
        )
        wanted = {"add_special_tokens": False, **writing.tokenization}
        tokenizing = self.renderer.default_chat_tok_params.with_kwargs(**wanted)
        request.add_special_tokens = tokenizing.add_special_tokens
        more = None if writing.mm_processor is None else {"mm_processor_kwargs": dict(writing.mm_processor)}
        told, (prompt,) = await self.renderer.render_chat_async(
            [request.messages], chat, tokenizing, prompt_extras=more
        )
        settings = chat.with_defaults({"tools": None, "tokenize": False}).get_apply_chat_template_kwargs()
        return prompt, chats_by(settings | {"tokenize": False}, told[0], self, request.add_special_tokens)

    async def reason_against(self, request: Any) -> str | None:
        """Why no prompt can be made of a request's text or messages; None where one can."""
        params = SamplingParams(max_tokens=1)
        made: OfflineText | OfflineChat
        if hasattr(request, "messages"):
            made = OfflineChat.of(params, messages=request.messages)
        else:
            made = OfflineText.of(params, prompt=request.prompt)
        try:
            await self.admit(made, Writing(template_arguments={"add_generation_prompt": True}))
        except BadRequest as error:
            return error.message
        return None

    async def generate(
        self, request: OfflineRequest, prompt: Any, name: str, adapter: LoRARequest | None, priority: int
    ) -> "Output":
        """The whole answer. Raises: EngineDied."""
        params = request.to_sampling_params(self._room(request, prompt))
        last: Any = None
        try:
            async for output in self.engine_client.generate(
                prompt, params, name, lora_request=adapter, priority=priority
            ):
                last = output
        except RetryableRequestError as error:
            raise EngineDied(str(error)) from None
        become(last, Output)
        for completion in last.outputs:
            become(completion, Completion)
        made: Output = last
        return made

    def _room(self, request: OfflineRequest, prompt: Any) -> int:
        room: int = self.model_config.max_model_len - self._extract_prompt_len(prompt)
        return room if request.max_tokens is None else min(room, request.max_tokens)


# ---- outputs


class Output(RequestOutput):
    """vLLM's, and beside it what answers over HTTP say under the same name."""

    whipstaff: dict[str, Any] | None = None  # the receipt; None of a request that asked for nothing


class Completion(CompletionOutput):
    """Likewise, of one sequence."""

    explain: list[dict[str, Any]] | None = None  # what was said of each of its tokens; None where nobody asked
