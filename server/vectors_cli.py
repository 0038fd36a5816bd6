"""The command line's `whipstaff vectors`. Here: convert, show, combine and diff, of files on this machine."""

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from whipstaff.server import vectors_remote
from whipstaff.server.store import write_whole
from whipstaff.steering import algebra
from whipstaff.steering.artifacts import Header, Vector, packed, parse, read
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.importers import FORMATS, PICKLES, import_file, import_pickle
from whipstaff.steering.importers.importer import Hints
from whipstaff.steering.shape import ModelShape, config_shape
from whipstaff.steering.where import SHORTHANDS, Where

MODEL_HELP = (
    "the model that the vector is for: its folder or config.json, a Whipstaff vector made for it, or its shape as "
    "hidden=4096,layers=32,heads=32,head_dim=128[,kv_heads=8][,experts=0][,architecture=LlamaForCausalLM]"
)
PICKLE_WARNING = """\
WARNING: {name} is opened as a pickle. A pickle is a program: whoever wrote it decides what it does when it is read.
WARNING: It is opened in a process of its own that knows arrays only, and has few means. Trust its author all the same.
"""
MAX_COLUMNS = 16  # of a table of cosines
_SHAPE_NAMES = {
    "hidden": "hidden_size",
    "layers": "num_layers",
    "heads": "num_heads",
    "head_dim": "head_dim",
    "kv_heads": "num_kv_heads",
    "experts": "num_experts",
    "architecture": "architecture",
}
_TRANSFORMS = {"add": 2, "subtract": 2, "scale": 1, "average": 2, "orthogonalise": 2}  # least number of files


def main(words: list[str]) -> int:
    """The exit status: 0, 1 with the reason on stderr; argparse itself exits with 2 for a wrong call."""
    args = _parser().parse_args(words)
    try:
        return int(args.run(args))
    except SteeringError as error:
        where = f"--{error.param.replace('_', '-')}: " if error.param in Hints.model_fields else ""
        print(f"whipstaff vectors {args.command}: {where}{error}", file=sys.stderr)
    except OSError as error:
        print(f"whipstaff vectors {args.command}: {error}", file=sys.stderr)
    return 2 if args.command == "diff" else 1


# ---- convert


def convert(args: Namespace) -> int:
    hints = {name: getattr(args, name) for name in Hints.model_fields if getattr(args, name, None) is not None}
    if "defaults" in hints:
        hints["defaults"] = dict(hints["defaults"])
    _check_target(args.target, args.force)
    if args.unsafe_pickle:
        print(PICKLE_WARNING.format(name=args.source), file=sys.stderr, end="", flush=True)
    importing = import_pickle if args.unsafe_pickle else import_file
    header, tensors = importing(args.source, args.model, args.format, **hints)
    for warning in header.provenance.get("warnings", []):
        print(f"warning: {warning}", file=sys.stderr)
    digest = save(args.target, header, tensors, args.force)
    print(f"{args.target}: {header.method}, {len(tensors)} tensors, sha256 {digest}")
    return 0


# ---- show


def show(args: Namespace) -> int:
    vector = read(args.file)
    for line in described(args.file.name, vector):
        print(line)
    if args.png is not None:
        from whipstaff.server.vectors_plot import plot

        _check_target(args.png, args.force, ".png")
        plot(args.file.name, vector).save(args.png)
        print(f"\nplotted in {args.png}")
    return 0


def described(name: str, vector: Vector) -> Iterator[str]:
    """What `show` prints."""
    header, method = vector.header, vector.method
    yield f"{name}  sha256 {vector.digest}"
    yield f"method    {header.method}" + ("" if header.method == method.name else f", served as {method.name}")
    yield f"paper     {method.paper}"
    shape = header.model
    yield f"model     {shape.architecture} (hidden {shape.hidden_size}, {shape.num_layers} layers, " + (
        f"{shape.num_heads} heads of {shape.head_dim})"
    )
    if method.served_by == "logits":
        yield "sites     none: read by `decoding`"
    else:
        yield f"sites     {'; '.join(_sites(vector)) or 'none: rows beside the prompt'}"
        where = "the method's own" if header.where is None else "the file's"
        yield f"tokens    {_said(header.where or method.where)} ({where})"
    if "scale" in method.params.model_fields:
        yield f"scale     {algebra.strength_of(vector):g} ({'the method' if header.scale is None else 'the file'}'s)"
    if header.defaults:
        yield f"defaults  {json.dumps(header.defaults)}"
    if missing := [n for n, f in method.params.model_fields.items() if f.is_required() and n not in header.defaults]:
        yield f"requests  must say {', '.join(missing)}"
    for label, text in (("licence", header.licence), ("about", header.description)):
        if text:
            yield f"{label:<9} {text}"
    if header.provenance:
        yield f"from      {json.dumps(header.provenance)}"
    yield ""
    yield from _norms(vector)
    for group, rows in groups(vector).items():
        if group.startswith("attn_head.") and all(row.ndim == 2 for row in rows.values()):
            yield from _head_norms(group, rows)
    for group, rows in groups(vector).items():
        if len(rows) > 1:
            yield from _cosines(group, rows)


def groups(vector: Vector) -> dict[str, dict[int, Tensor]]:
    """`{site}.{part}` -> layer -> numbers, for parts of equal shape and at least one dimension."""
    found: dict[str, dict[int, Tensor]] = {}
    for name, tensor in algebra.numbers_of(vector).items():
        if name.count(".") == 2 and tensor.ndim:
            site, layer, part = name.split(".")
            found.setdefault(f"{site}.{part}", {})[int(layer)] = tensor
    return {
        group: dict(sorted(rows.items()))
        for group, rows in found.items()
        if len({row.shape for row in rows.values()}) == 1
    }


def cosines(rows: Mapping[int, Tensor]) -> Tensor:
    """(layers, layers); 0 beside what has no length."""
    units = [row.flatten().double() / row.double().norm().clamp_min(1e-30) for row in rows.values()]
    together = torch.stack(units)
    return together @ together.T


def _sites(vector: Vector) -> Iterator[str]:
    for site in vector.sites:
        layers = sorted(place.layer for place in vector.tensors if place.site == site)
        spans: list[list[int]] = []
        for layer in layers:
            if spans and spans[-1][-1] == layer - 1:
                spans[-1].append(layer)
            else:
                spans.append([layer])
        said = ", ".join(f"{span[0]}-{span[-1]}" if len(span) > 1 else str(span[0]) for span in spans)
        yield f"{site}, layer{'s' if len(layers) > 1 else ''} {said}"


def _norms(vector: Vector) -> Iterator[str]:
    tensors = algebra.numbers_of(vector)
    width = max(map(len, tensors))
    yield f"{'tensor':<{width}}  {'norm':>10}  shape"
    for name, tensor in tensors.items():
        yield f"{name:<{width}}  {float(tensor.double().norm()):>10.4g}  {list(tensor.shape)}"


def _head_norms(group: str, rows: Mapping[int, Tensor]) -> Iterator[str]:
    norms = {layer: row.double().norm(dim=1) for layer, row in rows.items()}
    yield f"\nnorms per head of {group}"
    yield "layer " + "".join(f"{head:>8}" for head in range(len(next(iter(norms.values())))))
    for layer, row in norms.items():
        yield f"{layer:>5} " + "".join(f"{value:>8.3g}" for value in row.tolist())


def _cosines(group: str, rows: Mapping[int, Tensor]) -> Iterator[str]:
    layers, matrix = list(rows), cosines(rows)
    if len(layers) > MAX_COLUMNS:
        yield f"\ncosine with the next layer, of {group} (all pairs: --png)"
        for index, layer in enumerate(layers[:-1]):
            yield f"{layer:>5} {matrix[index, index + 1]:>7.3f}"
        return
    yield f"\ncosines of {group}"
    yield "layer " + "".join(f"{layer:>7}" for layer in layers)
    for layer, row in zip(layers, matrix.tolist(), strict=True):
        yield f"{layer:>5} " + "".join(f"{value:>7.3f}" for value in row)


# ---- combine


def combine(args: Namespace) -> int:
    least = _TRANSFORMS[args.operation]
    if len(args.files) < least or (args.operation == "scale" and len(args.files) > 1):
        raise SteeringError(f"{args.operation} takes {'one file' if least == 1 else f'at least {least} files'}")
    if (args.factor is None) == (args.operation == "scale"):
        raise SteeringError("--factor goes with scale, and scale needs it")
    _check_target(args.output, args.force)
    sources = [algebra.Source(path.name, read(path)) for path in args.files]
    said: dict[str, Any] = {"description": args.description or ""}
    if args.where is not None:
        said["where"] = args.where
    if args.factor is not None:
        said["factor"] = args.factor
    header, tensors = getattr(algebra, args.operation)(sources, **said)
    digest = save(args.output, header, tensors, args.force)
    print(f"{args.output}: {header.method}, {len(tensors)} tensors, sha256 {digest}")
    return 0


# ---- diff


def diff(args: Namespace) -> int:
    """0 when both files mean the same, 1 when they differ."""
    one, other = read(args.a), read(args.b)
    lines = list(differences(one, other))
    for line in lines:
        print(line)
    if not lines:
        same = "the same bytes" if one.digest == other.digest else "the same header and numbers"
        print(f"{args.a} and {args.b}: {same}")
    return 1 if lines else 0


def differences(one: Vector, other: Vector) -> Iterator[str]:
    mine, its = (vector.header.model_dump(mode="json") for vector in (one, other))
    for field in mine:
        if mine[field] != its[field]:
            yield f"{field}: {json.dumps(mine[field])} -> {json.dumps(its[field])}"
    first, second = algebra.numbers_of(one), algebra.numbers_of(other)
    for name in sorted(first.keys() | second.keys()):
        if name not in second or name not in first:
            yield f"{name}: only in the {'first' if name in first else 'second'}"
            continue
        a, b = first[name].double(), second[name].double()
        if a.shape != b.shape:
            yield f"{name}: shape {list(a.shape)} -> {list(b.shape)}"
        elif not torch.equal(a, b):
            cosine = cosines({0: a.reshape(-1), 1: b.reshape(-1)})[0, 1]
            yield (
                f"{name}: norm {a.norm():.6g} -> {b.norm():.6g}, cosine {cosine:.6f}, "
                f"largest difference {(a - b).abs().max():.6g}"
            )


# ---- models and files


def shape_of(text: str) -> ModelShape:
    """What `--model` says."""
    path = Path(text)
    try:
        if path.is_file() and path.suffix == ".safetensors":
            return read(path).header.model
        if path.exists():
            return _configured(path)
        if "=" not in text:
            raise ArgumentTypeError(f"{text}: no such folder or file. {MODEL_HELP}")
        return _spelled(text)
    except (SteeringError, OSError) as error:
        raise ArgumentTypeError(f"{text}: {error}") from error


def _spelled(text: str) -> ModelShape:
    said: dict[str, Any] = {"architecture": "unnamed"}
    for pair in text.split(","):
        name, _, value = pair.partition("=")
        if name.strip() not in _SHAPE_NAMES:
            raise ArgumentTypeError(f"{name!r} is none of {', '.join(_SHAPE_NAMES)}")
        said[_SHAPE_NAMES[name.strip()]] = value.strip()
    try:
        return ModelShape.model_validate(said)
    except ValidationError as error:
        first = error.errors()[0]
        short = {ours: name for name, ours in _SHAPE_NAMES.items()}[str(first["loc"][0])]
        raise ArgumentTypeError(f"{short}: {first['msg']}") from error


def _configured(path: Path) -> ModelShape:
    """From a config.json, whose defaults transformers knows; no code of the folder's runs."""
    from transformers import AutoConfig

    try:
        return config_shape(AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False))
    except (OSError, ValueError, AttributeError) as error:  # ValidationError is a ValueError
        raise ArgumentTypeError(f"{path} has no config.json that transformers knows: {error}") from error


def save(target: Path, header: Header, tensors: Mapping[str, Tensor], force: bool) -> str:
    """Write a checked vector file at once or not at all; its digest."""
    data = packed(header, tensors)
    digest = parse(data).digest
    _check_target(target, force)
    write_whole(target, data, target.parent)
    return digest


def _check_target(target: Path, force: bool, suffix: str = ".safetensors") -> None:
    if target.suffix != suffix:
        raise SteeringError(f"{target} does not end in {suffix}")
    if not target.parent.is_dir():
        raise SteeringError(f"{target.parent}: no such folder")
    if target.exists() and not force:
        raise SteeringError(f"{target} exists; say --force to replace it")


def _said(where: Any) -> str:
    return cast(str, where if isinstance(where, str) else where.model_dump_json(exclude_none=True))


# ---- flags


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="whipstaff vectors", description="Vector files on this machine, and a server's.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_convert(commands)
    one = commands.add_parser("show", help="method, sites, layers, norms and cosines of a vector file")
    one.add_argument("file", type=Path)
    one.add_argument("--png", type=Path, metavar="FILE", help="plot norms and cosines")
    one.add_argument("--force", action="store_true", help="replace FILE")
    one.set_defaults(run=show)
    one = commands.add_parser("combine", help="a new vector file from others")
    one.add_argument("operation", choices=_TRANSFORMS, help="subtract and orthogonalise: the first, less the others")
    one.add_argument("files", type=Path, nargs="+", metavar="FILE")
    one.add_argument("-o", "--output", type=Path, required=True, metavar="TARGET")
    one.add_argument("--factor", type=float, help="of scale")
    one.add_argument("--where", type=_clause, help="tokens, where the files' own differ")
    one.add_argument("--description")
    one.add_argument("--force", action="store_true", help="replace TARGET")
    one.set_defaults(run=combine)
    one = commands.add_parser("diff", help="what differs; exits with 0 for nothing, 1 for something, 2 for trouble")
    one.add_argument("a", type=Path)
    one.add_argument("b", type=Path)
    one.set_defaults(run=diff)
    vectors_remote.add_commands(commands, partial(_add_hints, with_files=False))
    return parser


def _add_convert(commands: Any) -> None:
    files = {name: one.files for name, one in FORMATS.items()} | {name: one.files for name, one in PICKLES.items()}
    formats = "\n".join(f"  {name:<20}{its}" for name, its in files.items())
    parser = commands.add_parser(
        "convert",
        help="a vector file from a foreign file or folder",
        formatter_class=RawDescriptionHelpFormatter,
        epilog=f"formats:\n{formats}\n\nangular and tarot are pickles: --unsafe-pickle",
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--model", type=shape_of, required=True, help=MODEL_HELP)
    parser.add_argument("--format", choices=[*FORMATS, *PICKLES], metavar="FORMAT", help="default: found out")
    parser.add_argument("--unsafe-pickle", action="store_true", help="open a pickle, in a process of its own")
    parser.add_argument("--force", action="store_true", help="replace TARGET")
    _add_hints(parser)
    parser.set_defaults(run=convert)


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
