"""What differs between the minor versions of vLLM that are supported.

Decided once, at import: nothing here asks for the version while a step runs.
"""

from typing import Any

from whipstaff.server.engine import SUPPORTED, minor_version

if minor_version() == SUPPORTED[0]:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup

    def fail_request(scheduler: Any, request_id: str, why: str) -> None:
        """Let vLLM's scheduler end a request with an error in its next step. This version has one message for all."""
        scheduler.grammar_compile_error_reqs.add(request_id)

    def chat_params(request: Any, renderer: Any) -> Any:
        """What a chat request says about its template, beside the server's defaults."""
        return request.build_chat_params(renderer.chat_template, renderer.chat_template_content_format)

    async def effort_of(serving: Any, request: Any) -> Any:
        """The reasoning effort of a chat that stands for a message request."""
        if request.thinking is None or request.thinking.type != "disabled":
            return "none"
        return await serving._get_disabled_thinking_effort()

else:
    from vllm.entrypoints.common.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.common.startup import cli_env_setup
    from vllm.outputs import RequestError

    def fail_request(scheduler: Any, request_id: str, why: str) -> None:
        """Let vLLM's scheduler end a request with an error in its next step."""
        scheduler.grammar_compile_error_reqs[request_id] = RequestError(code="validation_error", message=why)

    def chat_params(request: Any, renderer: Any) -> Any:
        """What a chat request says about its template, beside the server's defaults."""
        return request.build_chat_params(
            renderer.chat_template, renderer.chat_template_content_format, renderer.reasoning_effort_map
        )

    async def effort_of(serving: Any, request: Any) -> Any:
        """The reasoning effort of a chat that stands for a message request."""
        return await serving.disabled_thinking_effort_resolver.resolve_for(request)


__all__ = [
    "chat_params",
    "cli_env_setup",
    "effort_of",
    "fail_request",
    "make_arg_parser",
    "validate_parsed_serve_args",
]
