"""vLLM's own command-line flags."""

import os
import shutil
from argparse import Namespace
from typing import Any

from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
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
    _check_compiler()
    validate_parsed_serve_args(args)
    args.enable_offline_docs = not args.disable_fastapi_docs  # else the page /docs would load from another host


def _check_compiler() -> None:
    """On a CPU a C++ compiler compiles what torch.compile writes, which vLLM's sampler calls even when run eagerly.

    Raises: UnsupportedEngine where there is none and torch.compile is on: else a model would be loaded in vain.
    """
    compiler, is_off = os.environ.get("CXX", "g++"), os.environ.get("TORCH_COMPILE_DISABLE") == "1"
    if current_platform.is_cpu() and not is_off and not shutil.which(compiler):
        raise UnsupportedEngine(
            f"there is no C++ compiler {compiler!r}, which torch.compile wants on a CPU: install g++, name another in "
            "CXX, or switch torch.compile off: TORCH_COMPILE_DISABLE=1 in the environment, with --enforce-eager"
        )
