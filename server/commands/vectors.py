"""The command line's `whipstaff vectors`. Here: convert, show, combine and diff, of files on this machine."""

import json
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import ValidationError
from torch import Tensor

from whipstaff.server.commands import vectors_flags as flags
from whipstaff.server.commands import vectors_remote as remote
from whipstaff.server.registry.folder import write_whole
from whipstaff.steering import algebra
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.hints import Hints
from whipstaff.steering.importers import FORMATS, PICKLES, import_file, import_pickle
from whipstaff.steering.importers.importer import Importer
from whipstaff.steering.importers.nearest import unknown_name
from whipstaff.steering.importers.pickles import Pickle
from whipstaff.steering.shape import ModelShape, config_shape
from whipstaff.steering.vector_file import Header, Vector, packed, parse, read

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


def main(words: list[str]) -> int:
    """The exit status: 0, 1 with the reason on stderr; argparse itself exits with 2 for a wrong call."""
    return run(flags.parse(words))


def run(args: Namespace) -> int:
    """Do what the flags say; the exit status."""
    try:
        return int(COMMANDS[args.command](args))
    except SteeringError as error:
        where = f"--{error.param.replace('_', '-')}: " if error.param in (*Hints.model_fields, "format") else ""
        print(f"whipstaff vectors {args.command}: {where}{error}", file=sys.stderr)
    except OSError as error:
        print(f"whipstaff vectors {args.command}: {error}", file=sys.stderr)
    return 2 if args.command == "diff" else 1


# ---- formats


def formats(args: Namespace) -> int:
    """Every foreign format, and the flags that it takes beside those that all take."""
    known: dict[str, Importer | Pickle] = {**FORMATS, **PICKLES}
    for name, one in known.items():
        taken = " ".join(f"--{hint.replace('_', '-')}" for hint in sorted(one.takes))
        print(f"{name:<20}{one.files}" + (f"  [{taken}]" if taken else ""))
    print(f"\n{' and '.join(PICKLES)} are pickles, as any other may be: --unsafe-pickle")
    return 0


# ---- convert


def convert(args: Namespace) -> int:
    hints = {name: getattr(args, name) for name in Hints.model_fields if getattr(args, name, None) is not None}
    if "defaults" in hints:
        hints["defaults"] = dict(hints["defaults"])
    check_target(args.target, args.force)
    if args.unsafe_pickle:
        print(PICKLE_WARNING.format(name=args.source), file=sys.stderr, end="", flush=True)
    if args.format not in (None, *FORMATS, *PICKLES):
        raise SteeringError(unknown_name(args.format, FORMATS), "format")
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
        from whipstaff.server.commands.vectors_plot import plot

        check_target(args.png, args.force, ".png")
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
    if method.kind.named_in == "decoding":
        yield "sites     none: read by `decoding`"
    else:
        yield f"sites     {'; '.join(_sites(vector)) or 'none: rows beside the prompt'}"
        where = "the method's own" if header.where is None else "the file's"
        yield f"tokens    {_clause_text(header.where or method.where)} ({where})"
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
        layers = sorted(point.layer for point in vector.tensors if point.site == site)
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
    least = flags.TRANSFORMS[args.operation]
    if len(args.files) < least or (args.operation == "scale" and len(args.files) > 1):
        raise SteeringError(f"{args.operation} takes {'one file' if least == 1 else f'at least {least} files'}")
    if (args.factor is None) == (args.operation == "scale"):
        raise SteeringError("--factor goes with scale, and scale needs it")
    check_target(args.output, args.force)
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
            raise ArgumentTypeError(f"{text}: no such folder or file. {flags.MODEL_HELP}")
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
    check_target(target, force)
    write_whole(target, data, target.parent)
    return digest


def check_target(target: Path, force: bool, suffix: str = ".safetensors") -> None:
    if target.suffix != suffix:
        raise SteeringError(f"{target} does not end in {suffix}")
    if not target.parent.is_dir():
        raise SteeringError(f"{target.parent}: no such folder")
    if target.exists() and not force:
        raise SteeringError(f"{target} exists; say --force to replace it")


def _clause_text(where: Any) -> str:
    return cast(str, where if isinstance(where, str) else where.model_dump_json(exclude_none=True))


COMMANDS = {
    "formats": formats,
    "convert": convert,
    "show": show,
    "combine": combine,
    "diff": diff,
    "list": remote.list_vectors,
    "add": remote.add,
    "remove": remote.remove,
}
