"""Learned rows: they are inserted into the prompt, in place of placeholder tokens' embeddings."""

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.fed import Fed
from whipstaff.steering.inserts import Inserted, InsertParams, num_rows
from whipstaff.steering.kinds.kind import OF_ACTIVATIONS, Entry, EntryKind, UncheckedEntry
from whipstaff.steering.method import HookPoint, Method, Tensors
from whipstaff.steering.plan import SteeringPlan
from whipstaff.steering.planner import Planner
from whipstaff.steering.served import Served
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.vector_file import Vector

ROWS_PART = "rows"  # the part of a file that holds them, (tokens, hidden)


class RowsKind(EntryKind):
    name = "rows"
    meaningless = ("where", *OF_ACTIVATIONS)

    def lacking(self, vector: Vector, layers: Sequence[int] | None, served: Served) -> str | None:
        if served.takes_soft_prompts:
            return None
        return (
            "the served model's tokens are embedded where rows cannot be inserted; start it without "
            "--enable-prompt-embeds, or with a model of text only"
        )

    def is_off(self, unchecked: UncheckedEntry) -> bool:
        return False

    def admit(self, unchecked: UncheckedEntry, planner: Planner, others: Sequence[Entry], served: Served) -> Entry:
        for name in sorted(unchecked.params.model_fields_set - {"vector"}):
            raise SteeringError("a soft prompt takes the place of tokens; there is nothing that this could mean", name)
        vector = unchecked.vector
        params = vector.method.params.model_validate({**vector.header.known_defaults, **unchecked.own})
        assert isinstance(params, InsertParams)
        inserted = Inserted(params, num_rows(params, len(vector.shared_parts[ROWS_PART])))
        return Entry(unchecked.params, vector, inserted=inserted)

    def describe(self, entry: Entry, plan: SteeringPlan, fed: Sequence[Fed], served: Served) -> dict[str, Any]:
        assert entry.inserted is not None
        params, num = entry.inserted
        return {**params.model_dump(exclude_none=True), "prompt_tokens": num}  # which usage counts


ROWS = RowsKind()
R = TypeVar("R", bound=InsertParams)


class RowsMethod(Method[R]):
    """A method whose rows stand in the prompt."""

    kind = ROWS
    sites, where = (), "prompt"
    parts: ClassVar = {ROWS_PART: ("tokens", "hidden")}

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        raise SteeringError("the rows of a soft prompt stand in no layer; name the tensor rows")
