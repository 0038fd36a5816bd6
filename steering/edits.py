"""What an entry of a request does at each hook point: its ops, what they take of the tables, and how far they reach."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from whipstaff.steering.dose import Dose, dose, largest
from whipstaff.steering.errors import SteeringError
from whipstaff.steering.method import EditParams, HookPoint, Scaled
from whipstaff.steering.ops import Diagonal, EditOp
from whipstaff.steering.overflow import Bound, bound
from whipstaff.steering.plan import Edit, ModuleEdit
from whipstaff.steering.programs import Step, assemble, lines_of
from whipstaff.steering.vector_file import Vector

_MAX_SETTINGS = 1024  # as JSON, parsed


@lru_cache(maxsize=_MAX_SETTINGS)
def _parsed(params: type[EditParams], setting: str) -> EditParams:
    return params.model_validate_json(setting)


def settings_of(vector: Vector, edit: Edit | ModuleEdit) -> Any:
    """The parameters that an edit was planned with, as its method's own type."""
    return _parsed(vector.method.params, edit.setting)


def edits_of(vector: Vector, edit: Edit) -> dict[HookPoint, tuple[EditOp, ...]]:
    """What an edit does at each hook point, by its canonical name."""
    params = settings_of(vector, edit)
    found: dict[HookPoint, tuple[EditOp, ...]] = {}
    for point, tensors in vector.tensors.items():
        if edit.layers is None or point.layer in edit.layers:
            ops = tuple(_made(vector, edit, params, point, tensors))
            if ops:
                found[point.canonical] = (*found.get(point.canonical, ()), *ops)
    return found


def _made(vector: Vector, edit: Edit, params: EditParams, point: HookPoint, tensors: Any) -> Sequence[EditOp]:
    method, model = vector.method, vector.header.model
    if not edit.normalize:
        return method.ops(tensors, params, point, model)
    assert isinstance(params, Scaled)
    if not params.scale:
        return ()
    ops = method.ops(tensors, params.model_copy(update={"scale": 1.0}), point, model)
    adds = [op.add for op in ops if isinstance(op, Diagonal) and op.add is not None and op.add.any()]
    return [Diagonal(None, params.scale * add / add.norm()) for add in adds]


def _only_adds(op: EditOp) -> bool:
    return isinstance(op, Diagonal) and op.mul is None


class Weight(NamedTuple):
    """What an edit takes of the engine's tables, and how far it reaches.

    Edits that share a row take no more than the sum: neighbours that become one have fewer lines and instructions, and
    lines that are the same are held once.
    """

    num_lines: int  # of the pool from which it takes most
    num_instructions: int  # of its longest program
    bounds: tuple[tuple[HookPoint, Bound], ...]
    only_adds: bool  # and so commutes with others that do


def weigh(vector: Vector, edit: Edit) -> Weight:
    """Raises: SteeringError when the edit cannot be made so."""
    outlined = edit._replace(gate=edit.gate.outline)
    return vector.once(outlined, lambda: _weigh(vector, outlined))


def _weigh(vector: Vector, edit: Edit) -> Weight:
    if edit.normalize and not _can_normalize(vector, edit):
        raise SteeringError("normalize is for vectors that are added; this one does something else", "normalize")
    made = edits_of(vector, edit)
    programs = {point: assemble([], [Step(ops, edit.gate, edit.renorm)]) for point, ops in made.items()}
    num_lines = max(map(len, lines_of(programs).values()), default=0)
    longest = max((len(program.codes) for program in programs.values()), default=0)
    bounds = tuple((point, bound(ops)) for point, ops in sorted(made.items(), key=lambda item: item[0].layer))
    only_adds = not edit.renorm and all(_only_adds(op) for ops in made.values() for op in ops)
    return Weight(num_lines, longest, bounds, only_adds)


@dataclass(frozen=True, eq=False)
class Lengths:
    """The usual length of activations at every hook point of the served model."""

    by_point: Mapping[HookPoint, float]


def strongest(vector: Vector, edit: Edit, lengths: Lengths) -> Dose | None:
    """The largest relative dose of an edit, over the hook points whose lengths are known."""
    return vector.once((edit, lengths), lambda: _strongest(vector, edit, lengths.by_point))


def _strongest(vector: Vector, edit: Edit, known: Mapping[HookPoint, float]) -> Dose | None:
    return largest({point: dose(ops, known[point]) for point, ops in edits_of(vector, edit).items() if point in known})


def _can_normalize(vector: Vector, edit: Edit) -> bool:
    params = settings_of(vector, edit)
    if not isinstance(params, Scaled):
        return False
    one, model = params.model_copy(update={"scale": 1.0}), vector.header.model
    return all(
        _only_adds(op)
        for point, tensors in vector.tensors.items()
        for op in vector.method.ops(tensors, one, point, model)
    )
