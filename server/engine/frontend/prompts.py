"""A request's prompts beyond their tokens: the messages that stand in them, what else can be made of them, and how the
served model scores a text."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from uuid import uuid4

from vllm.renderers.hf import HfRenderer, safe_apply_chat_template
from vllm.sampling_params import SamplingParams

from whipstaff.server import plan as plans
from whipstaff.server.engine.compat import chat_params
from whipstaff.server.engine.frontend.launch import PlanDict
from whipstaff.server.leases import Lease
from whipstaff.server.plan import Scoring
from whipstaff.server.prompt.message_spans import Chat
from whipstaff.server.prompt.prompt_source import LocateChat, PromptSource

Render = Callable[[Sequence[Any], bool], str]  # of messages, as a prompt or as they stand in one


class Chats(NamedTuple):
    """A chat request's messages, and what its template makes of messages."""

    messages: Sequence[Any]
    text_of: Render
    locate: LocateChat
    adds_special_tokens: bool


def chats_of(request: Any, conversation: list[Any], serving: Any) -> Chats | None:
    """How the messages of a prompt are found; None where something else than a Hugging Face template made it."""
    renderer, tokenizer = serving.online_renderer, serving.renderer.tokenizer
    if not isinstance(serving.renderer, HfRenderer) or renderer.use_harmony or not tokenizer.is_fast:
        return None
    tools = None
    if request.tools and not (request.tool_choice == "none" and renderer.exclude_tools_when_tool_choice_none):
        tools = [tool.model_dump() for tool in request.tools]
    params = chat_params(request, renderer)
    defaults = {**renderer.default_chat_template_kwargs, "tools": tools, "tokenize": False}
    settings = params.with_defaults(defaults).get_apply_chat_template_kwargs()

    def text_of(messages: Sequence[Any], is_prompt: bool) -> str:
        ends_here = {} if is_prompt else {"add_generation_prompt": False, "continue_final_message": False}
        return str(
            safe_apply_chat_template(serving.model_config, tokenizer, list(messages), **{**settings, **ends_here})
        )

    def locate(messages: Sequence[Any], ids: Sequence[int]) -> Chat:
        return Chat(tokenizer, messages, ids, text_of)

    return Chats(conversation, text_of, locate, request.add_special_tokens)


def source_of(request: Any, prompt: Any, serving: Any, chat: Chats | None) -> PromptSource | None:
    """A prompt as a source of others; None for chats that no Hugging Face template made."""
    tokenizer, renderer = serving.renderer.tokenizer, serving.online_renderer
    if tokenizer is None or (chat is None and request.is_chat):
        return None

    def ids_of(messages: Sequence[Any]) -> list[int]:
        if chat is not None:
            text, adds = chat.text_of(messages, True), chat.adds_special_tokens
        else:
            template = {"chat_template": renderer.chat_template, "add_generation_prompt": True, "tokenize": False}
            text = str(safe_apply_chat_template(serving.model_config, tokenizer, list(messages), **template))
            adds = False
        found: list[int] = tokenizer.encode(text, add_special_tokens=adds)
        return found

    adds_special_tokens = bool(getattr(request, "add_special_tokens", True))
    messages, written = chat.messages if chat else None, prompt.get("prompt")
    locate = None if chat is None else chat.locate
    return PromptSource(prompt["prompt_token_ids"], tokenizer, adds_special_tokens, ids_of, messages, written, locate)


async def log_probabilities(serving: Any, wanted: Scoring, model: str | None, lease: Lease) -> list[float]:
    """Of every token of a text but the first, under the served model, or an adapter of it, steered as asked by vectors
    of which the caller has a lease."""
    plan = PlanDict(plans.RequestPlan(wanted.steering).to_wire(), lease=lease) if wanted.steering else None
    extra = {plans.PLAN_KEY: plan} if plan else None
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False, extra_args=extra)
    ids = list(wanted.ids)
    prompt, adapter, said = {"prompt_token_ids": ids}, serving.models.lora_requests.get(model), None
    async for output in serving.engine_client.unwatched(prompt, params, f"score-{uuid4()}", lora_request=adapter):
        said = output.prompt_logprobs or said
    return [said[position][ids[position]].logprob for position in wanted.positions[1:]] if said else []
