"""vLLM's own command-line flags."""

import logging
import os
import shutil
import subprocess
import sysconfig
from argparse import Namespace
from typing import Any

from torch._dynamo import config as dynamo
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from whipstaff.server.engine import UnsupportedEngine
from whipstaff.server.engine.compat import cli_env_setup, make_arg_parser, validate_parsed_serve_args

logger = logging.getLogger("vllm.whipstaff")  # below vLLM's logger, so that its format and level apply
_NO_COMPILING = "TORCH_COMPILE_DISABLE"  # torch's variable, which vLLM reads, too
_PROBE = "#include <Python.h>\n#include <omp.h>\n"  # what the programs of torch.compile begin with


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
    _do_without_a_compiler(args)
    validate_parsed_serve_args(args)
    args.enable_offline_docs = not args.disable_fastapi_docs  # else the page /docs would load from another host


def _do_without_a_compiler(args: Namespace) -> None:
    """Where a CPU has no C++ compiler, nothing is compiled: neither the model nor vLLM's sampler, which torch.compile
    compiles even where the model runs eagerly. `args.whipstaff_uncompiled` then says why.

    Raises: UnsupportedEngine where the compiler that is no good is one that CXX names.
    """
    args.whipstaff_uncompiled = None
    if not current_platform.is_cpu() or os.environ.get(_NO_COMPILING) == "1" or (why := _no_compiler()) is None:
        return
    if "CXX" in os.environ:
        raise UnsupportedEngine(
            f"CXX: {why}; name another, or leave it out: what is there is used, or nothing compiled"
        )
    logger.warning("%s: torch.compile is off, and --enforce-eager on", why)
    args.whipstaff_uncompiled, args.enforce_eager = why, True
    os.environ[_NO_COMPILING] = "1"  # for processes that import torch anew
    dynamo.disable = True  # for those that are forked from this one


def _no_compiler() -> str | None:
    """Why torch.compile could compile nothing for a CPU, or None."""
    name = os.environ.get("CXX", "g++")
    if not shutil.which(name):
        return f"there is no C++ compiler {name!r}"
    command = [name, "-fopenmp", "-fsyntax-only", f"-I{sysconfig.get_path('include')}", "-x", "c++", "-"]
    done = subprocess.run(command, input=_PROBE, capture_output=True, text=True)
    said = [line.strip() for line in done.stderr.splitlines() if "error" in line]
    return f"{name!r} compiles nothing with Python and OpenMP: {said[:1]}" if done.returncode else None
