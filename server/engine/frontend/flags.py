"""vLLM's own command-line flags."""

from argparse import Namespace
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.utils.argparse_utils import FlexibleArgumentParser

from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.compat import cli_env_setup, make_arg_parser, validate_parsed_serve_args


def parser(program: str) -> Any:
    """A parser of every flag that `vllm serve` takes."""
    cli_env_setup()
    return make_arg_parser(FlexibleArgumentParser(prog=program))


def names_model(args: Namespace) -> bool:
    """Whether --model or a config file named a model."""
    return bool(args.model != AsyncEngineArgs.model)


def finish(args: Namespace) -> None:
    """What `vllm serve` does between parsing and starting. Raises: UnsupportedEngine."""
    if args.model_tag is not None:
        args.model = args.model_tag
    if args.api_server_count == 0 or args.headless or args.data_parallel_size > 1 or args.grpc:
        raise UnsupportedEngine("--headless, --grpc and data parallelism are not supported together with steering")
    validate_parsed_serve_args(args)
    args.enable_offline_docs = not args.disable_fastapi_docs  # else the page /docs would load from another host
