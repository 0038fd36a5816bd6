"""Learned tokens that stand in no vocabulary. The engine inserts them; there is nothing to edit.

soft_prompt  rows of the embedding layer, inserted into the prompt
prefix_kv    keys and values of every layer that stand before the prompt, in its KV cache
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.method import EditParams, HookPoint, Method, Tensors
from whipstaff.steering.ops import EditOp
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.where import Index

MAX_TOKENS = 4096
ROWS = "rows"  # the part of a soft prompt's file


class MessageEdge(BaseModel):
    """Where the content of one message of a chat begins or ends. `role` and `index` choose as in where clauses."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    class Chosen(BaseModel):
        model_config = ConfigDict(extra="forbid", frozen=True)

        role: str | None = Field(None, min_length=1, max_length=64)
        index: Index | None = None

    message: Chosen
    at: Literal["start", "end"] = "start"


class InsertParams(EditParams):
    insert: Index | MessageEdge = Field(
        0,
        description="the rows come before this token of the prompt as sent; negative counts from its end, and its "
        "length puts them last; or an edge of a message's content",
    )
    tokens: int | None = Field(
        None, strict=True, ge=1, lt=1 << 31, description="only the first so many rows; none: all of them"
    )


class SoftPrompt(Method[InsertParams]):
    """Rows are kept as the embedding layer gives them, before models such as Gemma scale them. Prompt tuning puts them
    first, SPRING between the retrieved text and the question, DRO where the system prompt stands."""

    name = "soft_prompt"
    paper = (
        "Lester et al. 2021, arXiv:2104.08691; Zheng et al. 2024, arXiv:2401.18018; Zhu et al. 2024, arXiv:2405.19670"
    )
    params, sites, where = InsertParams, (), "prompt"
    off: ClassVar = {}
    served_by = "rows"
    parts: ClassVar = {ROWS: ("tokens", "hidden")}

    def check(self, tensors: Tensors, place: HookPoint, model: ModelShape) -> None:
        raise SteeringError("the rows of a soft prompt stand in no layer; name the tensor rows")

    def ops(self, tensors: Tensors, params: InsertParams, place: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return ()


class PrefixKV(Method[EditParams]):
    """Keys are kept as they stand in the cache, after any rotary embedding; the prompt's tokens begin at position P."""

    name, paper = "prefix_kv", "Li and Liang 2021, arXiv:2101.00190; Liu et al. 2021, arXiv:2110.07602"
    params, sites, where = EditParams, ("attn_head",), "all"
    off: ClassVar = {}
    served_by = "attention"
    parts: ClassVar = {
        "key": ("num_tokens", "kv_heads", "head_dim"),
        "value": ("num_tokens", "kv_heads", "head_dim"),
    }

    def check(self, tensors: Tensors, place: HookPoint, model: ModelShape) -> None:
        if not model.num_kv_heads:
            raise SteeringError("a file with keys and values must state the model's num_kv_heads")
        if not 1 <= len(tensors["key"]) <= MAX_TOKENS:
            raise SteeringError(f"layer {place.layer} has {len(tensors['key'])} tokens, wanted 1 to {MAX_TOKENS}")

    def check_params(self, params: EditParams, tensors: Mapping[HookPoint, Tensors]) -> None:
        lengths = {len(parts["key"]) for parts in tensors.values()}
        if len(lengths) > 1:
            raise SteeringError(
                f"the file's layers have {sorted(lengths)} tokens; they must have equally many", "vector"
            )
        layers = sorted(place.layer for place in tensors)
        if layers != list(range(len(layers))):
            raise SteeringError(f"the file has layers {layers}; every layer needs its keys and values", "vector")

    def ops(self, tensors: Tensors, params: EditParams, place: HookPoint, model: ModelShape) -> Sequence[EditOp]:
        return ()
