"""The flags of `whipstaff fit`, apart from what they start: nothing here imports torch, so help comes at once."""

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from whipstaff.steering.fit.options import Options

EPILOG = """\
Two commands from pairs to a served vector:

  whipstaff fit caa --model demo --data pairs.jsonl -o mine.safetensors
  whipstaff serve --vectors mine.safetensors     (or, beside a running server: whipstaff vectors add mine.safetensors)

--server URL, instead of --model, reads from a running server. docs/fit.md has every kind of data, every method, and
what the numbers mean.
"""


def parse(words: list[str]) -> Namespace:
    """Exits with 0 after help, with 2 for a wrong call."""
    return _parser().parse_args(words)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="whipstaff fit",
        description="Make a vector file from data. `whipstaff fit methods` lists the methods.",
        epilog=EPILOG,
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("method", metavar="METHOD", help="caa, iti, probe ...; `methods` lists them with their data")
    parser.add_argument("--model", help="a folder or a name on the hub; demo: the embedded model")
    parser.add_argument("--server", metavar="URL", help="instead: read activations from a running server")
    parser.add_argument(
        "--tokenizer", help="of the server's model, a folder or a name on the hub; default: where the server has it"
    )
    parser.add_argument("--name", help="load the file into the server's registry, to be named so by requests")
    parser.add_argument(
        "--admin-key", default=os.environ.get("WHIPSTAFF_ADMIN_KEY"), help="for --name; or WHIPSTAFF_ADMIN_KEY"
    )
    parser.add_argument("--parallel", type=_count, default=None, help="requests to the server at once (4)")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"), help="the server's; or VLLM_API_KEY")
    parser.add_argument("--data", type=_paths, metavar="FILE[,FILE]", help=".jsonl, .json, .csv or .parquet")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="the vector file, .safetensors")
    parser.add_argument("--neutral", type=Path, metavar="FILE", help="plain texts, on which a probe should not fire")
    for name, field in Options.model_fields.items():
        flag = "--" + name.replace("_", "-")
        if name == "unit":
            parser.add_argument(flag, action="store_true", default=None, help=field.description)
        else:
            parser.add_argument(flag, default=None, help=field.description)
    parser.add_argument(
        "--split", type=_shares, default=(0.7, 0.15, 0.15), metavar="A/B/C", help="train/dev/test, default .7/.15/.15"
    )
    parser.add_argument("--limit", type=int, help="the first so many rows of each file")
    parser.add_argument(
        "--batch-size", type=_count, default=8, help="texts that are computed together (8), or of one request"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of the model (float32)")
    parser.add_argument("--device", help="cpu, cuda ...; default: a GPU where there is one")
    parser.add_argument("--description", help="kept in the file")
    parser.add_argument("--licence", default="", help="kept in the file")
    parser.add_argument(
        "--dry-run", action="store_true", help="show one row as the model gets it and what is read; no model runs"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a fit that was cut off")
    parser.add_argument("--force", action="store_true", help="replace FILE, and what a fit that was cut off has left")
    parser.add_argument("--json", action="store_true", help="print the summary alone, as JSON")
    return parser


def _paths(text: str) -> list[Path]:
    return [Path(part) for part in text.split(",") if part]


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1024:
        raise ArgumentTypeError(f"{text!r} is no number from 1 to 1024")
    return int(text)


def _shares(text: str) -> tuple[float, float, float]:
    try:
        train, dev, test = (float(part) for part in text.split("/"))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r} is not three shares, such as .7/.15/.15") from error
    if min(train, dev, test) < 0 or train <= 0:
        raise ArgumentTypeError(f"{text!r}: shares are not negative, and there is something to learn from")
    return train, dev, test
