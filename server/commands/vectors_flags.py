"""The flags of `whipstaff vectors`, apart from what they start: nothing here imports torch, so help comes at once."""

import json
import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from whipstaff.steering.hints import Hints
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.where import SHORTHANDS, Where

MODEL_HELP = (
    "the model that the vector is for: its folder or config.json, a Whipstaff vector made for it, or its shape as "
    "hidden=4096,layers=32,heads=32,head_dim=128[,kv_heads=8][,experts=0][,architecture=LlamaForCausalLM]"
)
FORMAT_HELP = "default: found out; `whipstaff vectors formats` lists them all"
TRANSFORMS = {"add": 2, "subtract": 2, "scale": 1, "average": 2, "orthogonalise": 2}  # least number of files


def parse(words: list[str]) -> Namespace:
    """Exits with 0 after help, with 2 for a wrong call."""
    return _parser().parse_args(words)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="whipstaff vectors", description="Vector files on this machine, and a server's.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("formats", help="the foreign formats that are read, and the flags of each")
    _add_convert(commands)
    one = commands.add_parser("show", help="method, sites, layers, norms and cosines of a vector file")
    one.add_argument("file", type=Path)
    one.add_argument("--png", type=Path, metavar="FILE", help="plot norms and cosines")
    one.add_argument("--force", action="store_true", help="replace FILE")
    one = commands.add_parser("combine", help="a new vector file from others")
    one.add_argument("operation", choices=TRANSFORMS, help="subtract and orthogonalise: the first, less the others")
    one.add_argument("files", type=Path, nargs="+", metavar="FILE")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="TARGET")
    one.add_argument("--factor", type=float, help="of scale")
    one.add_argument("--where", type=_clause, help="tokens, where the files' own differ")
    one.add_argument("--description")
    one.add_argument("--force", action="store_true", help="replace TARGET")
    one = commands.add_parser("diff", help="what differs; exits with 0 for nothing, 1 for something, 2 for trouble")
    one.add_argument("a", type=Path)
    one.add_argument("b", type=Path)
    _add_remote(commands)
    return parser


def _add_convert(commands: Any) -> None:
    parser = commands.add_parser("convert", help="a vector file from a foreign file or folder")
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", type=_shape_of, required=True, help=MODEL_HELP)
    parser.add_argument("--format", metavar="FORMAT", help=FORMAT_HELP)
    parser.add_argument("--unsafe-pickle", action="store_true", help="open a pickle, in a process of its own")
    parser.add_argument("--force", action="store_true", help="replace TARGET")
    _add_hints(parser)


def _add_hints(parser: ArgumentParser, with_files: bool = True) -> None:
    """What foreign files leave unsaid; `with_files`, further files too."""
    for name, field in Hints.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if field.annotation == Path | None and not with_files:
            continue
        if name == "projected":
            parser.add_argument(flag, action="store_true", default=None, help=field.description)
        elif name == "defaults":
            parser.add_argument(
                "--default", dest=name, action="append", type=_pair, metavar="NAME=JSON", help=field.description
            )
        elif name == "where":
            parser.add_argument(flag, type=_clause, help=f"{field.description}: {', '.join(SHORTHANDS)} or JSON")
        else:
            parser.add_argument(flag, help=field.description)


def _shape_of(text: str) -> ModelShape:
    from whipstaff.server.commands.vectors import shape_of

    return shape_of(text)


def _pair(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    if not separator:
        raise ArgumentTypeError(f"{text!r} is not NAME=JSON")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a bare word


def _clause(text: str) -> Any:
    if text in SHORTHANDS:
        return text
    try:
        return Where.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        raise ArgumentTypeError(f"none of {', '.join(SHORTHANDS)}, nor a clause in JSON: {first['msg']}") from error


def _add_remote(commands: Any) -> None:
    """Those that ask a running server."""
    one = commands.add_parser("list", help="the vectors of a running server")
    _add_server(one)
    one = commands.add_parser("add", help="upload a vector, or replace the one of that name")
    one.add_argument("file", type=Path, help="a vector file, or a foreign file of a format that is one file")
    one.add_argument("--name", help="default: the file's, without its ending")
    one.add_argument("--format", metavar="FORMAT", help=FORMAT_HELP)
    _add_hints(one, with_files=False)
    _add_server(one)
    one = commands.add_parser("remove", help="remove a vector; requests that run keep it until they end")
    one.add_argument("name")
    _add_server(one)


def _add_server(parser: ArgumentParser) -> None:
    env = os.environ
    parser.add_argument("--url", default=env.get("WHIPSTAFF_URL", "http://localhost:8000"), help="or WHIPSTAFF_URL")
    parser.add_argument("--api-key", default=env.get("VLLM_API_KEY"), help="the user's, if any; or VLLM_API_KEY")
    parser.add_argument("--admin-key", default=env.get("WHIPSTAFF_ADMIN_KEY"), help="or WHIPSTAFF_ADMIN_KEY")
