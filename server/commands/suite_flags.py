"""The flags of `whipstaff eval suite`, apart from what they start."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path


def parse(words: list[str]) -> Namespace:
    """Exits with 0 after help, with 2 for a wrong call."""
    parser = ArgumentParser(
        prog="whipstaff eval suite",
        description="Every method on the tasks that it is for, beside plain answers, rivals and costs, on a server of "
        "the demo; what that refuses stands in the table, too.",
    )
    parser.add_argument("--subset", choices=("all", "small"), default="all", help="small: 4 items a seed, not 12")
    parser.add_argument("--only", type=lambda text: text.split(","), default=[], metavar="A,B", help="families")
    parser.add_argument("--part", choices=("train", "dev", "test"), default="test", help="of the tasks (test)")
    parser.add_argument(
        "--parallel", type=int, choices=range(1, 65), default=8, metavar="N", help="requests at once (8)"
    )
    parser.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    parser.add_argument("-o", "--output", type=Path, default=Path("eval/suite"), metavar="FOLDER", help="(eval/suite)")
    parser.add_argument(
        "--write",
        type=Path,
        metavar="FILE",
        help="put the table into this document, the summary and pictures beside it",
    )
    parser.add_argument("--json", action="store_true", help="print the summary, and nothing else")
    parser.add_argument(
        "--url", "--server", default=os.environ.get("WHIPSTAFF_URL", "http://localhost:8000"), help="or WHIPSTAFF_URL"
    )
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"), help="or VLLM_API_KEY")
    return parser.parse_args(words)
