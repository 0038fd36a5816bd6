"""The flags of `whipstaff eval`, apart from what they start."""

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from pathlib import Path

FORM = "Q: {prompt}\nA: {response}"


def parse(words: list[str]) -> Namespace:
    """Exits with 0 after help, with 2 for a wrong call."""
    parser = ArgumentParser(
        prog="whipstaff eval",
        description="What a vector does to a server's answers, beside what it costs, at several strengths.",
    )
    parser.add_argument("data", type=Path, help="questions, choices, demos or responses: see docs/fit.md")
    parser.add_argument("--vector", required=True, help="the name of a vector that the server has")
    parser.add_argument(
        "--scales", "--multipliers", "--strengths", type=_numbers, default=[1.0], metavar="A,B | A:B:STEP"
    )
    parser.add_argument(
        "--layers", type=_layers, default=[None], metavar="8;10;8,10", help="sets of layers to try apart"
    )
    parser.add_argument(
        "--form", default=FORM, help=f"default: {FORM!r}; '{{prompt}}{{response}}' takes texts as they are"
    )
    parser.add_argument("--neutral", type=Path, metavar="FILE", help="plain texts: KL to the plain model, perplexity")
    parser.add_argument("--match", metavar="REGEX", help="score generated answers by this pattern, too")
    parser.add_argument("--metric", help="what is shown and chosen by; default: mc1 of answers, exact_match of text")
    parser.add_argument("--max-tokens", type=int, default=32, help="of generated answers (32)")
    parser.add_argument(
        "--part", choices=("all", "dev", "test"), default="all", help="of the data, as `fit` splits it (all)"
    )
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument(
        "--choose", type=Path, metavar="FILE", help="write the best scale into this vector file's header"
    )
    parser.add_argument(
        "--max-kl", type=float, default=0.1, help="of what is chosen, in nats a token of --neutral (0.1)"
    )
    parser.add_argument("--parallel", type=int, default=8, help="requests at once (8)")
    parser.add_argument("--resume", action="store_true", help="go on with an evaluation that was cut off")
    parser.add_argument("--force", action="store_true", help="replace what is in the folder")
    parser.add_argument("-o", "--output", type=Path, metavar="FOLDER", help="cells.jsonl, summary.json, dose.png")
    parser.add_argument(
        "--url", default=os.environ.get("WHIPSTAFF_URL", "http://localhost:8000"), help="or WHIPSTAFF_URL"
    )
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"), help="or VLLM_API_KEY")
    return parser.parse_args(words)


def _numbers(text: str) -> list[float]:
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (float(part) for part in text.split(":"))
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: say 1,2,4 or -2:2:0.5") from error
    if step <= 0 or last < first or (last - first) / step > 1000:
        raise ArgumentTypeError(f"{text!r}: from low to high in at most 1,000 steps")
    return [round(first + index * step, 10) for index in range(int((last - first) / step + 1e-9) + 1)]


def _layers(text: str) -> list[list[int] | None]:
    try:
        return [[int(layer) for layer in part.split(",")] for part in text.split(";")]
    except ValueError as error:
        raise ArgumentTypeError(f"{text!r}: say 8;10 or 8,9;10,11") from error
