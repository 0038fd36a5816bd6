"""Activation addition: x[p_i] <- x[p_i] + scale * rows[i], the states of a short prompt added to one of ours.

Rows go to consecutive prompt positions, one each: from the front, around the middle, at the back, or from any position
on. `mid` starts at len(prompt) // 2 - n // 2, as in the release. Prompts with fewer tokens than rows are refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.kinds.edits import ScaledMethod
from whipstaff.steering.method import HookPoint, Scaled, Tensors
from whipstaff.steering.ops import EditOp, diagonal
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.where import Where

MAX_ROWS = 64
_Start = Annotated[int, Field(strict=True, ge=-(1 << 30), lt=1 << 30)]


class ActAddParams(Scaled):
    location: Literal["front", "mid", "back"] | _Start = Field(
        "front",
        description="where row 0 goes: to the front, so that the rows lie around the middle or the last row meets the "
        "last token, or a position",
    )
    row: int | None = Field(None, strict=True, ge=0, description="only this row; none: all of them")


class ActAdd(ScaledMethod[ActAddParams]):
    name, paper = "actadd", "Turner et al. 2023, arXiv:2308.10248"
    params, sites, where = ActAddParams, ("resid_pre",), "prompt"
    combines = "alike"
    parts: ClassVar = {"rows": ("n", "width")}

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if not 1 <= len(tensors["rows"]) <= MAX_ROWS:
            raise SteeringError(f"rows of layer {point.layer}: {len(tensors['rows'])} rows, wanted 1 to {MAX_ROWS}")

    def check_params(self, params: ActAddParams, tensors: Mapping[HookPoint, Tensors]) -> None:
        num_rows = _num_rows(tensors)
        if params.row is not None and params.row >= num_rows:
            raise SteeringError(f"the file has rows 0 to {num_rows - 1}", "row")
        if isinstance(params.location, int) and -num_rows < params.location < 0:
            raise SteeringError(f"{num_rows} rows from {params.location} on would reach past the prompt", "location")

    def edits(self, tensors: Tensors, params: ActAddParams, point: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        assert params.row is not None  # `spread` names it
        return (diagonal(params.scale, tensors["rows"][params.row]),)

    def spread(
        self, params: ActAddParams, tensors: Mapping[HookPoint, Tensors], where: Where
    ) -> Iterator[tuple[ActAddParams, Where]]:
        """One edit per row."""
        if where != Where.of(self.where):
            raise SteeringError("actadd's rows have positions of their own; say `location` instead", "where")
        num_rows = _num_rows(tensors)
        for row in range(num_rows) if params.row is None else [params.row]:
            yield params.model_copy(update={"row": row}), _position(params.location, row, num_rows)


def _position(location: str | int, row: int, num_rows: int) -> Where:
    """Where one row goes."""
    if location == "mid":
        first = row - num_rows // 2
        return Where(middle=[(first, first + 1)])
    first = row + (location if isinstance(location, int) else 0 if location == "front" else -num_rows)
    return Where(prompt=[(first, None if first == -1 else first + 1)])


def _num_rows(tensors: Mapping[HookPoint, Tensors]) -> int:
    counts = {len(parts["rows"]) for parts in tensors.values()}
    if len(counts) != 1:
        raise SteeringError(f"the file's layers have {sorted(counts)} rows; they must have equally many", "vector")
    return counts.pop()
