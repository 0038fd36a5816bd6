"""Vectors made of vectors: sums, differences, multiples, averages, and what is left at right angles to others.

Only methods whose edit is linear in their numbers can be combined. The numbers are taken at their files' own strengths.
Where those agree the result keeps them; where they differ they are multiplied in, so that the sum of two files does
what both do together.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.method import HookPoint, Tensors
from whipstaff.steering.vector_file import GENERIC, Header, Vector
from whipstaff.steering.where import Where

Numbers = dict[str, Tensor]  # by tensor name, float64


class Source(NamedTuple):
    """A vector and what it is called in the result's provenance."""

    name: str
    vector: Vector


def numbers_of(vector: Vector) -> dict[str, Tensor]:
    """A vector's tensors as its file names them."""
    found = dict(vector.shared_parts)
    for (site, layer), parts in vector.tensors.items():
        own = {part: tensor for part, tensor in parts.items() if vector.shared_parts.get(part) is not tensor}
        found |= {f"{site}.{layer}.{part}": tensor for part, tensor in own.items()}
    return found


def cosine(one: Vector, other: Vector) -> float | None:
    """Of the numbers that both have at the same places, as one row each; None where there are none, or no length."""
    ours, theirs = numbers_of(one), numbers_of(other)
    shared = [name for name, tensor in ours.items() if name in theirs and tensor.shape == theirs[name].shape]
    if not shared:
        return None
    a, b = (torch.cat([numbers[name].flatten().double() for name in shared]) for numbers in (ours, theirs))
    lengths = float(a.norm() * b.norm())
    return float(a @ b) / lengths if lengths > 0 else None


def strength_of(vector: Vector) -> float:
    """The strength of a request that names none."""
    field = vector.method.params.model_fields.get("scale")
    default = 1.0 if field is None else float(field.default)
    return default if vector.header.scale is None else vector.header.scale


def add(sources: Sequence[Source], **said: Any) -> tuple[Header, Numbers]:
    return weighted("add", sources, [1.0] * len(sources), **said)


def subtract(sources: Sequence[Source], **said: Any) -> tuple[Header, Numbers]:
    """The first less all others."""
    return weighted("subtract", sources, [1.0] + [-1.0] * (len(sources) - 1), **said)


def average(sources: Sequence[Source], **said: Any) -> tuple[Header, Numbers]:
    return weighted("average", sources, [1 / len(sources)] * len(sources), **said)


def scale(sources: Sequence[Source], factor: float, **said: Any) -> tuple[Header, Numbers]:
    return weighted("scale", sources, [factor] * len(sources), factor=factor, **said)


def weighted(
    operation: str, sources: Sequence[Source], weights: Sequence[float], **said: Any
) -> tuple[Header, Numbers]:
    """Raises: SteeringError when the sources cannot be combined."""

    def summed(found: Sequence[Numbers]) -> Numbers:
        names = dict.fromkeys(name for numbers in found for name in numbers)
        return {
            name: torch.stack([w * n[name] for w, n in zip(weights, found, strict=True) if name in n]).sum(0)
            for name in names
        }

    return _combined(operation, sources, summed, **said)


def orthogonalise(sources: Sequence[Source], **said: Any) -> tuple[Header, Numbers]:
    """The first without what lies in the span of the others, point by point; heads and rows each for themselves."""

    def rest(found: Sequence[Numbers]) -> Numbers:
        first, *others = found
        left = {name: _rest(t, [other[name] for other in others if name in other]) for name, t in first.items()}
        if all(left[name].norm() <= 1e-6 * first[name].norm() for name in left):
            raise SteeringError("nothing is left: the first vector lies in the span of the others")
        return left

    return _combined("orthogonalise", sources, rest, **said)


def _combined(
    operation: str,
    sources: Sequence[Source],
    combine: Callable[[Sequence[Numbers]], Numbers],
    where: Any = None,
    description: str = "",
    **said: Any,
) -> tuple[Header, Numbers]:
    first = sources[0].vector
    method = _method([source.vector for source in sources])
    for name, vector in sources[1:]:
        try:
            vector.check_fits(first.header.model)
        except SteeringError as error:
            raise SteeringError(f"{name} does not fit {sources[0].name}: {error}") from error
    strengths = [strength_of(vector) for _, vector in sources]
    agree = len(set(strengths)) == 1 and method == first.header.method
    if not agree and first.method.combines == "directions":
        raise SteeringError(f"the strengths {strengths} differ, and are no factor of {method}'s direction")
    factors = [1.0 if agree else strength for strength in strengths]
    found = [
        {name: factor * tensor.double() for name, tensor in _linear_numbers(source.vector).items()}
        for factor, source in zip(factors, sources, strict=True)
    ]
    _check_shapes(found, sources)
    result = combine(found)
    header = Header(
        method=method,
        model=first.header.model,
        scale=first.header.scale if agree else 1.0,
        defaults=_same("defaults", [(name, vector.header.defaults) for name, vector in sources]),
        where=_where(sources, method) if where is None else where,
        description=description,
        provenance={"operation": operation, **said, "sources": list(map(_provenance, sources, factors))},
        licence=_licence([vector.header.licence for _, vector in sources]),
    )
    return header, {name: tensor.float() for name, tensor in result.items()}


def _method(vectors: Sequence[Vector]) -> str:
    """The result's."""
    for vector in vectors:
        vector.method.check_linear(vector.header.defaults)
    methods = {vector.header.method for vector in vectors}
    if unfit := {vector.method.name for vector in vectors if vector.method.combines == "never"}:
        named = ", ".join(sorted(unfit))
        raise SteeringError(f"{named}: its edit is not linear in its numbers, so files of it cannot be combined")
    if len(methods) == 1:
        return methods.pop()
    if all(vector.method.combines == "added" for vector in vectors):
        return GENERIC
    raise SteeringError(f"{', '.join(sorted(methods))} keep different numbers and cannot be combined")


def _linear_numbers(vector: Vector) -> dict[str, Tensor]:
    """The numbers in which the edit is linear, as a file would name them."""
    parts = {point: vector.method.linear_parts(its) for point, its in vector.tensors.items()}
    return numbers_of(replace(vector, tensors=parts, shared_parts=_left(vector.shared_parts, parts)))


def _left(shared: Tensors, parts: Mapping[HookPoint, Tensors]) -> Tensors:
    """Of the shared parts, those that hook points still have."""
    return {name: tensor for name, tensor in shared.items() if any(its.get(name) is tensor for its in parts.values())}


def _check_shapes(found: Sequence[Numbers], sources: Sequence[Source]) -> None:
    known: dict[str, tuple[str, torch.Size]] = {}
    for numbers, source in zip(found, sources, strict=True):
        for name, tensor in numbers.items():
            where, shape = known.setdefault(name, (source.name, tensor.shape))
            if shape != tensor.shape:
                raise SteeringError(f"{name} has shape {list(shape)} in {where}, {list(tensor.shape)} in {source.name}")


def _rest(tensor: Tensor, others: Sequence[Tensor]) -> Tensor:
    rows = tensor.view(1, -1) if tensor.ndim == 1 else tensor.flatten(0, -2)
    left = rows.clone()
    for index in range(len(rows)):
        span = [each.view_as(tensor).reshape(rows.shape)[index] for each in others]
        span = [each / each.norm() for each in span if each.any()]
        if span:
            basis = torch.stack(span, 1)  # (width, others)
            u, sizes, _ = torch.linalg.svd(basis, full_matrices=False)
            u = u[:, sizes > 1e-9 * sizes[0]]
            left[index] -= u @ (u.T @ left[index])
            left[index] -= u @ (u.T @ left[index])  # once more: rounding
    return left.view_as(tensor)


def _where(sources: Sequence[Source], method: str) -> Any:
    """Tokens on which all agree; None where they are the method's own."""
    stated = [(name, Where.of(v.header.where or v.method.where)) for name, v in sources]
    clause = _same("where", stated)
    if all(vector.header.where is None and vector.header.method == method for _, vector in sources):
        return None
    return clause


def _same(what: str, stated: Sequence[tuple[str, Any]]) -> Any:
    name, value = stated[0]
    for other, its in stated[1:]:
        if its != value:
            raise SteeringError(f"{what} differs: {name} says {_text_of(value)}, {other} {_text_of(its)}", what)
    return value


def _text_of(value: Any) -> str:
    return value.model_dump_json(exclude_none=True) if isinstance(value, Where) else repr(value)


def _provenance(source: Source, factor: float) -> Mapping[str, Any]:
    header = source.vector.header
    said: dict[str, Any] = {"name": source.name, "sha256": source.vector.digest, "method": header.method}
    if factor != 1:
        said["multiplied_by"] = factor
    if header.licence:
        said["licence"] = header.licence
    return said | ({"provenance": header.provenance} if header.provenance else {})


def _licence(licences: Sequence[str]) -> str:
    different = sorted(set(filter(None, licences)))
    together = " AND ".join(different)
    return together if len(together) <= 128 else "several, see provenance"
