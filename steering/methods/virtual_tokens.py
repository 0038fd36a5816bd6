"""Learned tokens that stand in no vocabulary. The engine inserts them; there is nothing to edit.

soft_prompt  rows of the embedding layer, inserted into the prompt
prefix_kv    keys and values of every layer that stand before the prompt, in its KV cache
"""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from whipstaff.steering.errors import SteeringError
from whipstaff.steering.inserts import InsertParams
from whipstaff.steering.kinds.attention import AttentionEdit, AttentionMethod, PrefixRows
from whipstaff.steering.kinds.rows import RowsMethod
from whipstaff.steering.method import EditParams, HookPoint, Tensors
from whipstaff.steering.shape import ModelShape
from whipstaff.steering.where import Where

MAX_TOKENS = 4096


class SoftPrompt(RowsMethod[InsertParams]):
    """Rows are kept as the embedding layer gives them, before models such as Gemma scale them. Prompt tuning puts them
    first, SPRING between the retrieved text and the question, DRO where the system prompt stands."""

    name = "soft_prompt"
    paper = (
        "Lester et al. 2021, arXiv:2104.08691; Zheng et al. 2024, arXiv:2401.18018; Zhu et al. 2024, arXiv:2405.19670"
    )
    params = InsertParams
    off: ClassVar = {}


class PrefixKV(AttentionMethod[EditParams]):
    """Keys are kept as they stand in the cache, after any rotary embedding; the prompt's tokens begin at position P."""

    name, paper = "prefix_kv", "Li and Liang 2021, arXiv:2101.00190; Liu et al. 2021, arXiv:2110.07602"
    params, sites, where = EditParams, ("attn_head",), "all"
    off: ClassVar = {}
    parts: ClassVar = {
        "key": ("num_tokens", "kv_heads", "head_dim"),
        "value": ("num_tokens", "kv_heads", "head_dim"),
    }

    def check(self, tensors: Tensors, point: HookPoint, model: ModelShape) -> None:
        if not model.num_kv_heads:
            raise SteeringError("a file with keys and values must state the model's num_kv_heads")
        if not 1 <= len(tensors["key"]) <= MAX_TOKENS:
            raise SteeringError(f"layer {point.layer} has {len(tensors['key'])} tokens, wanted 1 to {MAX_TOKENS}")

    def check_params(self, params: EditParams, tensors: Mapping[HookPoint, Tensors]) -> None:
        lengths = {len(parts["key"]) for parts in tensors.values()}
        if len(lengths) > 1:
            raise SteeringError(
                f"the file's layers have {sorted(lengths)} tokens; they must have equally many", "vector"
            )
        layers = sorted(point.layer for point in tensors)
        if layers != list(range(len(layers))):
            raise SteeringError(f"the file has layers {layers}; every layer needs its keys and values", "vector")

    def own_where(self, tensors: Mapping[HookPoint, Tensors]) -> Where | None:
        return Where(prompt=[(0, self.num_placeholders(tensors))])

    def num_placeholders(self, tensors: Mapping[HookPoint, Tensors]) -> int:
        return len(next(iter(tensors.values()))["key"])

    def attention_edits(
        self, params: EditParams, tensors: Mapping[HookPoint, Tensors], prompt_len: int
    ) -> Iterator[AttentionEdit]:
        yield PrefixRows({point.layer: (parts["key"], parts["value"]) for point, parts in tensors.items()})
