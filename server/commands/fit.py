"""`whipstaff fit`: a vector file from data, with a model on this machine or one that a server runs."""

import json
import shutil
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

from pydantic import ValidationError
from tqdm import tqdm

from whipstaff.server import demo
from whipstaff.server.commands import vectors, vectors_remote
from whipstaff.server.commands.fit_flags import parse
from whipstaff.server.commands.fit_server import PARALLEL, served
from whipstaff.server.registry.vectors import NAME
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fit import fitting
from whipstaff.steering.fit.job import Job
from whipstaff.steering.fit.local import LocalModel
from whipstaff.steering.fit.options import Options
from whipstaff.steering.fit.recipes import RECIPES
from whipstaff.steering.fit.source import Source
from whipstaff.steering.sites import SitesNotFound


def main(words: list[str]) -> int:
    """The exit status: 0, 2 with the reason on stderr, 130 after an interrupt; --resume then goes on."""
    return run(parse(words))


def run(args: Namespace) -> int:
    """Do what the flags say; the exit status."""
    if args.method == "methods":
        return methods()
    bars = Bars(is_shown=not args.json)
    try:
        return _fit(args, bars)
    except (SteeringError, ValidationError, SitesNotFound, OSError) as error:
        bars.close()
        print(f"whipstaff fit: {_sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        bars.close()
        print("whipstaff fit: stopped; --resume goes on where it was", file=sys.stderr)
        return 130


def methods() -> int:
    """Every method that can be fitted, its data and its own flags."""
    for name, recipe in RECIPES.items():
        flags = " ".join(f"--{flag.replace('_', '-')}" for flag in sorted(recipe.takes))
        print(f"{name:<21}{' or '.join(recipe.kinds)}: {recipe.about}" + (f"  [{flags}]" if flags else ""))
    return 0


def _fit(args: Namespace, bars: "Bars") -> int:
    fitting.recipe_of(args.method)
    _check_where(args)
    if args.data is None:
        raise SteeringError("has to be said", "data")
    options = Options(**{name: value for name in Options.model_fields if (value := getattr(args, name)) is not None})
    fitting.check_options(fitting.recipe_of(args.method), options)
    folder = _work_folder(args)
    job = fitting.prepared(
        args.method,
        _source(args),
        args.data,
        options,
        folder,
        shares=args.split,
        limit=args.limit,
        neutral=args.neutral,
        goes_on=args.resume and folder.exists(),
        progress=bars.show,
        say=bars.say,
    )
    if args.dry_run:
        for line in fitting.dry_run(args.method, job):
            print(line)
        return _warned(job)
    made = fitting.fit(args.method, job)
    bars.close()
    said = {"description": args.description or made.header.description, "licence": args.licence}
    digest = vectors.save(args.output, made.header.model_copy(update=said), made.tensors, args.force)
    if args.name is not None:
        with redirect_stdout(sys.stderr):  # what a program reads is the summary alone
            _load(args)
    if args.json:
        print(json.dumps(fitting.describe(made) | {"file": str(args.output), "sha256": digest}, indent=1))
        return 0
    _warned(job)
    _score(made)
    size = args.output.stat().st_size / 1024
    print(
        f"wrote {args.output} ({made.header.method}, {len(made.tensors)} tensors, {size:.0f} KiB, "
        f"sha256 {digest[:12]}); the test split was not looked at"
    )
    name = args.name or args.output.name.partition(".")[0]
    print(f'next: {_served_by(args)}ask with "steering": {{"vector": "{name}"}}')
    return 0


def _load(args: Namespace) -> None:
    """Upload the file; it stays where it is whatever comes of that. Raises: SteeringError."""
    said = Namespace(file=args.output, name=args.name, url=args.server, format=None)
    said.api_key, said.admin_key = args.api_key, args.admin_key
    try:
        vectors_remote.add(said)
    except SteeringError as error:
        raise SteeringError(f"{args.output} is written, and was not loaded: {error}", "name") from error


def _served_by(args: Namespace) -> str:
    """The command that makes a file known to a server, unless it is known already."""
    if args.name is not None:
        return ""
    if args.server is not None:
        return f"whipstaff vectors add {args.output} --url {args.server}    and "
    served = "" if args.model == "demo" else f" {args.model}"
    return f"whipstaff serve{served} --vectors {args.output}    and "


def _work_folder(args: Namespace) -> Path:
    """Where rows are kept meanwhile. Raises: SteeringError."""
    if args.dry_run:
        return Path("nowhere")
    if args.output is None:
        raise SteeringError("has to be said: -o FILE", "output")
    vectors.check_target(args.output, args.force)
    folder = Path(f"{args.output}.rows")
    if args.force and not args.resume and folder.exists():
        shutil.rmtree(folder)
    return folder


def _check_where(args: Namespace) -> None:
    """Raises: SteeringError unless there is one model, and what is said of it can be meant."""
    if (args.model is None) == (args.server is None):
        said = "has to be said, or --server URL" if args.model is None else "say this or --server, not both"
        raise SteeringError(said, "model")
    if args.name is not None and not NAME.fullmatch(args.name):
        raise SteeringError("a name has at most 128 letters, digits, `.`, `_` and `-`, and begins with no sign", "name")
    if args.server and args.name is not None and args.admin_key is None:
        raise SteeringError("--name changes the server's registry: say --admin-key or WHIPSTAFF_ADMIN_KEY", "admin_key")
    for flag in ("dtype", "device") if args.server else ("tokenizer", "parallel", "name"):
        if getattr(args, flag) is not None:
            raise SteeringError("the server chose it" if args.server else "goes with --server", flag)


def _source(args: Namespace) -> Source:
    if args.server is not None:
        return served(args.server, args.api_key, args.tokenizer, args.batch_size, args.parallel or PARALLEL)
    name = str(demo.MODELS / "demo") if args.model == "demo" else args.model
    return LocalModel.load(name, args.dtype or "float32", args.device, args.batch_size)


def _warned(job: Job, most: int = 8) -> int:
    for text in job.warnings[:most]:
        print(f"warning: {text}", file=sys.stderr)
    if len(job.warnings) > most:
        print(f"warning: and {len(job.warnings) - most} more", file=sys.stderr)
    return 0


def _score(made: fitting.Made) -> None:
    for name, value in made.header.provenance["score"].items():
        if not isinstance(value, list):
            print(f"  {name.replace('_', ' '):<32}{value}")


def _sentence(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        said = first["msg"].removeprefix("Value error, ")
        return f"--{'.'.join(map(str, first['loc'])).replace('_', '-')}: {said}"
    param = error.param if isinstance(error, SteeringError) else ""
    return (f"--{param.replace('_', '-')}: " if param else "") + str(error)


class Bars:
    """A bar for each thing that takes a while, one after the other."""

    def __init__(self, is_shown: bool) -> None:
        self.is_shown = is_shown
        self._bar: tqdm[None] | None = None
        self._what = ""

    def show(self, what: str, done: int, of: int) -> None:
        if not self.is_shown:
            return
        if self._bar is None or self._what != what or self._bar.total != of:
            self.close()
            self._what = what
            self._bar = tqdm(total=of, desc=f"{what:<16}", initial=done, disable=None, mininterval=0.5)
        self._bar.update(done - self._bar.n)

    def say(self, line: str) -> None:
        if self.is_shown:
            tqdm.write(line)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
